"""Training as a child process: skipped when finished, resumed when interrupted, with progress."""

import contextlib
import math
import os
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np

from ..analysis.curves import ap_or_zero, read_metrics
from ..common.config_files import find_config
from ..common.environment import hardware, versions
from ..common.files import file_sha256, read_json_if_any, write_json
from ..training.non_finite import DIVERGED
from .child_process import RunFailed, RunStopped, StepCounter, claim_folder, supervise
from .runs import Run, state_digest


def command_of(run: Run, train_net: str, arguments: Sequence[str]) -> List[str]:
    """The command that starts a run or goes on with it; arguments as of :func:`train`."""
    command = [sys.executable, train_net, "--resume", *arguments]
    command += ["--config-file", find_config(run.config, key=run.name)[0]]
    return [*command, *run.opts, "OUTPUT_DIR", run.folder]


def train(
    run: Run,
    train_net: str,
    *,
    arguments: Sequence[str] = (),
    threads: int = 0,
    stop: Optional[threading.Event] = None,
    on_progress: Callable[[int, int, float], None] = lambda *_: None,
    environment: Optional[Mapping[str, str]] = None,
) -> dict:
    """Train and evaluate ``run``, or take its results if it is finished.

    An interrupted run is resumed. A folder that holds a run of another config is moved aside. While
    another process trains in the folder, this one waits.

    Args:
        run: what to train.
        train_net: path of ``tools/train_net.py``.
        arguments: more of its arguments, such as ("--num-gpus", "8").
        threads: CPU threads for it; 0: as many as torch likes.
        stop: set it from another thread to end the run; a later call resumes it.
        on_progress: called every second with (steps done, steps in all, seconds per step or 0).
        environment: what its environment has beside this process's.

    Returns:
        "AP", "AP50" (of the first data set in DATASETS.TEST), "splits" (data set -> "AP", "AP50"
        and "curve", a list of [steps done, AP]), "iterations", "seconds_per_step" (median, 0 for a
        run of a few steps), "statistics" (what the distillation logged as crosskd/..., means over
        the last quarter), "seconds" (wall time of all starts), "peak_memory_gb" (of the training
        process, 0 where there is no /proc), "versions", "hardware", "digest", and SHA-256s:
        those of :meth:`Run.all_inputs`, "weights_sha256" of the final weights' file and
        "needs_sha256" of those of the runs it needs. Of a run that diverged and may, "diverged",
        the iteration, and an AP of 0.

    Raises:
        RunFailed: if the training ended with an error.
        RunStopped: if ``stop`` was set before it ended.
    """
    done = run.result()
    if done is not None:
        return done
    run = run.read_again()  # the child is about to
    digest, inputs, state_sha256 = run.digest(), run.all_inputs(), state_digest(run)
    with claim_folder(run.folder, name=run.name, digest=state_sha256, stop=stop) as log:
        done = run.result()  # of the process that we waited for
        if done is not None:
            return done
        before = read_json_if_any(run.path("started.json")) or {}
        earlier, used = before.get("seconds", 0.0), _joined(before.get("versions", {}))
        state = {"digest": state_sha256, "seconds": earlier, "versions": used}
        write_json(run.path("started.json"), state)
        needs = [file_sha256(needed.weights) for needed in run.needs]
        command = command_of(run, train_net, arguments)
        with contextlib.suppress(FileNotFoundError):
            os.remove(run.path(DIVERGED))
        counter = StepCounter(run.path("metrics.json"), run.cfg().SOLVER.MAX_ITER)
        start = time.monotonic()
        try:
            status, memory = supervise(
                command,
                log,
                threads,
                stop,
                every_second=lambda: on_progress(*counter.look()),
                grace=counter.grace,
                environment=environment,
            )
        finally:
            seconds = earlier + time.monotonic() - start
            write_json(run.path("started.json"), {**state, "seconds": seconds})
        if status != 0 and stop is not None and stop.is_set():
            raise RunStopped(f"{run.name} was stopped")
        diverged = read_json_if_any(run.path(DIVERGED)) if status != 0 and run.may_diverge else None
        if status != 0 and not diverged:
            with open(run.path("console.log"), errors="replace") as f:
                tail = "".join(f.readlines()[-12:])
            raise RunFailed(f"{run.name} failed; the end of {run.path('console.log')}:\n{tail}")
        found = _collect(run) if diverged is None else _collect_diverged(run, diverged["iteration"])
        done = {"digest": digest, "seconds": seconds, "peak_memory_gb": memory, **found}
        done.update(versions=used, hardware=hardware(run.cfg().MODEL.DEVICE, threads))
        done.update(inputs, needs_sha256=needs)
        if diverged is None:
            done["weights_sha256"] = file_sha256(run.weights)
        write_json(run.path("run.json"), done)
        return done


def _joined(before: Dict[str, str]) -> Dict[str, str]:
    """The versions of now, after those of earlier starts of the same run where they differ."""
    found = versions()
    earlier = {key: before.get(key, now) for key, now in found.items()}
    return {
        key: earlier[key] if earlier[key].endswith(now) else f"{earlier[key]}, then {now}"
        for key, now in found.items()
    }


def _metrics(run: Run) -> List[dict]:
    path = run.path("metrics.json")
    return read_metrics(path) if os.path.exists(path) else []


def _collect(run: Run) -> Dict[str, Any]:
    cfg, lines = run.cfg(), _metrics(run)
    steps, splits = cfg.SOLVER.MAX_ITER, {}
    for name in cfg.DATASETS.TEST:
        # With several test sets detectron2 writes each one's name before its metrics.
        key = f"{name}/bbox/AP" if len(cfg.DATASETS.TEST) > 1 else "bbox/AP"
        # Those in between are counted from 0, the last is not; a resumed run may have one twice.
        points = {min(line["iteration"] + 1, steps): line for line in lines if key in line}
        if not points:
            raise RunFailed(f"{run.name}: no {key} in {run.path('metrics.json')}")
        if max(points) < steps:
            raise RunFailed(
                f"{run.name}: {run.path('metrics.json')} has no {key} after the last step, as if a "
                "disk had been full; start this again to evaluate it"
            )
        last = points[max(points)]
        splits[name] = {
            "AP": ap_or_zero(last[key]),
            "AP50": ap_or_zero(last[f"{key}50"]),
            "curve": [[i, ap_or_zero(points[i][key])] for i in sorted(points)],
        }
    return _content(splits, steps, lines, _statistics(lines))


def _collect_diverged(run: Run, iteration: int) -> Dict[str, Any]:
    nothing = {"AP": 0.0, "AP50": 0.0, "curve": [[iteration, 0.0]]}
    splits = dict.fromkeys(run.cfg().DATASETS.TEST, nothing)
    return {**_content(splits, iteration, _metrics(run), {}), "diverged": iteration}


def _content(splits: Dict[str, dict], steps: int, lines: List[dict], statistics: Dict[str, float]):
    first = next(iter(splits.values()))
    times = [line["time"] for line in lines if "time" in line]
    return {
        "statistics": statistics,
        "AP": first["AP"],
        "AP50": first["AP50"],
        "splits": splits,
        "iterations": steps,
        "seconds_per_step": float(np.median(times)) if times else 0.0,
    }


def _statistics(lines: List[dict]) -> Dict[str, float]:
    """What the distillation has logged, less "crosskd/": means over the last quarter of the run,
    where they are numbers."""
    end = max(line["iteration"] for line in lines)
    late = [line for line in lines if line["iteration"] >= 0.75 * end]
    names = {name for line in late for name in line if name.startswith("crosskd/")}
    means = {
        name[len("crosskd/") :]: float(np.mean([line[name] for line in late if name in line]))
        for name in sorted(names)
    }
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}
