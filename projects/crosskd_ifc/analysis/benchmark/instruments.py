"""How memory and the time of single modules are measured."""

import contextlib
import os
from typing import Callable, Dict, Iterator, Mapping

import torch
from torch import nn


def quiet_profiler() -> None:
    """Without a GPU, torch's profiler would report that it finds none as an error."""
    if not torch.cuda.is_available():
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above its errors and its progress


def peak_on_cpu(part: Callable[[], None]) -> int:
    """From torch's own record of every allocation."""
    quiet_profiler()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        part()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextlib.contextmanager
def timed_modules(
    modules: Mapping[str, nn.Module], pieces: Dict[str, float], clock: Callable[[], float]
) -> Iterator[None]:
    """Within this context, the forward passes of ``modules`` are added to ``pieces``."""
    starts = {}

    def before(name: str):
        return lambda *_: starts.__setitem__(name, clock())

    def after(name: str):
        def add(*_):
            pieces[name] += clock() - starts[name]

        return add

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(before(name)))
            hooks.enter_context(module.register_forward_hook(after(name)))
        yield
