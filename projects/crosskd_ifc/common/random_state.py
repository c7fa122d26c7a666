"""The global random state of Python, numpy and torch: kept, restored, left as it was; and random
numbers beside it."""

import contextlib
import random
from typing import Any, Dict, Iterator

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage


class StepGenerators:
    """Generators that depend on the run's seed, iteration, process and place in the iteration
    alone: a resumed run draws the same, and the global random state is left as it is."""

    def __init__(self):
        self._last = (-1, 0)  # iteration, its generator's number

    def next(self, *more: int) -> torch.Generator:
        """A generator on the CPU, another one for each call and for other numbers ``more``."""
        iteration = get_event_storage().iter
        number = self._last[1] + 1 if self._last[0] == iteration else 0
        self._last = (iteration, number)
        # torch's seed is SEED and the process, and a resumed run has it from its checkpoint.
        place = (torch.initial_seed(), iteration, comm.get_rank(), number, *more)
        key = np.random.SeedSequence(place).generate_state(1)
        return torch.Generator().manual_seed(int(key[0]))


@contextlib.contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Leave the global random state as it was, so that runs with and without a teacher start from
    the same student."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # Only the student's device: naming none, torch reads all, and warns of it.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def get_random_state(device: torch.device) -> Dict[str, Any]:
    """Of Python, numpy, torch and this GPU, if it is one, in tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    state: Dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Dict[str, Any], device: torch.device) -> None:
    """Go on from what :func:`get_random_state` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
