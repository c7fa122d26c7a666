"""Training runs as child processes: skipped when finished, resumed when interrupted, with progress.

Each run is an ordinary ``tools/train_net.py`` run in a folder of its own. A finished one leaves
``run.json`` there, with its results and a digest of all that they depend on.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
from detectron2.config import CfgNode, get_cfg

from .config import add_crosskd_ifc_config
from .config_files import find_config, merge_from_file, merge_from_list
from .visualization import read_metrics


class RunFailed(RuntimeError):
    """A training run ended with an error; the message shows the end of its log."""


@dataclasses.dataclass
class Run:
    """One ``tools/train_net.py`` run.

    Attributes:
        name: for people.
        config: config file.
        folder: its OUTPUT_DIR.
        opts: KEY VALUE overrides.
        needs: runs whose results this one starts from, such as its teacher's.
    """

    name: str
    config: str
    folder: str
    opts: List[str] = dataclasses.field(default_factory=list)
    needs: Sequence["Run"] = ()

    def cfg(self) -> CfgNode:
        """The full config, frozen."""
        cfg = get_cfg()
        add_crosskd_ifc_config(cfg)
        merge_from_file(cfg, find_config(self.config, key=self.name)[0], key=self.name)
        merge_from_list(cfg, [*self.opts, "OUTPUT_DIR", self.folder], key=self.name)
        cfg.freeze()
        return cfg

    def digest(self) -> str:
        """A digest of the config and of those it needs; the folder's place doesn't matter."""
        cfg = self.cfg()
        cfg.defrost()
        cfg.OUTPUT_DIR = ""
        if self.needs:
            cfg.MODEL.CROSSKD.TEACHER.WEIGHTS = ""
        text = "".join([cfg.dump(), *(run.digest() for run in self.needs)])
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def result(self) -> Optional[dict]:
        """The results of a finished run of this very config, or None."""
        done = _read_json(self.path("run.json"))
        return done if done and done["digest"] == self.digest() else None


def train(
    run: Run,
    train_net: str,
    *,
    threads: int = 0,
    stop: Optional[threading.Event] = None,
    on_progress: Callable[[int, int, float], None] = lambda *_: None,
) -> dict:
    """Train and evaluate ``run``, or take its results if it is finished.

    An interrupted run is resumed. A folder that holds a run of another config is moved aside.

    Args:
        run: what to train.
        train_net: path of ``tools/train_net.py``.
        threads: CPU threads for it; 0: as many as torch likes.
        stop: set it from another thread to end the run; a later call resumes it.
        on_progress: called every second with (steps done, steps in all, seconds per step or 0).

    Returns:
        "AP", "AP50", "iterations", "seconds_per_step" (median), "seconds" (wall time since the last
        start), "peak_memory_gb" (of the training process, 0 where there is no /proc) and "digest".

    Raises:
        RunFailed: if the training ended with an error.
    """
    done = run.result()
    if done is not None:
        return done
    digest, started = run.digest(), _read_json(run.path("started.json"))
    if os.path.exists(run.folder) and (started or {}).get("digest") != digest:
        _move_aside(run.folder)
    os.makedirs(run.folder, exist_ok=True)
    _write_json(run.path("started.json"), {"digest": digest})

    steps, start, memory = run.cfg().SOLVER.MAX_ITER, time.monotonic(), 0.0
    command = [sys.executable, "-W", "ignore", train_net, "--resume", "--config-file"]
    command += [find_config(run.config, key=run.name)[0], *run.opts, "OUTPUT_DIR", run.folder]
    with open(run.path("console.log"), "ab") as log:
        environment = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while process.poll() is None and not (stop and stop.is_set()):
                on_progress(*_progress(run, steps))
                memory = max(memory, _peak_memory_gb(process.pid))
                time.sleep(1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        with open(run.path("console.log"), errors="replace") as f:
            tail = "".join(f.readlines()[-12:])
        raise RunFailed(f"{run.name} failed; the end of {run.path('console.log')}:\n{tail}")
    done = {"digest": digest, "seconds": time.monotonic() - start, "peak_memory_gb": memory}
    done.update(_collect(run))
    _write_json(run.path("run.json"), done)
    return done


def _progress(run: Run, steps: int):
    lines = _metrics(run)
    times = [line["time"] for line in lines[-3:] if "time" in line]
    done = min(max((line["iteration"] + 1 for line in lines), default=0), steps)
    return done, steps, times[-1] if times else 0.0


def _peak_memory_gb(pid: int) -> float:
    """The most memory that a process has had resident so far."""
    try:
        with open(f"/proc/{pid}/status") as f:
            lines = [line for line in f if line.startswith("VmHWM")]
    except OSError:
        return 0.0
    return int(lines[0].split()[1]) / 1024**2 if lines else 0.0


def _metrics(run: Run) -> List[dict]:
    path = run.path("metrics.json")
    return read_metrics(path) if os.path.exists(path) else []


def _collect(run: Run) -> Dict[str, float]:
    lines = _metrics(run)
    last = [line for line in lines if "bbox/AP" in line][-1]
    return {
        "AP": last["bbox/AP"],
        "AP50": last["bbox/AP50"],
        "iterations": run.cfg().SOLVER.MAX_ITER,
        "seconds_per_step": float(np.median([x["time"] for x in lines if "time" in x])),
    }


def _move_aside(folder: str) -> None:
    n = 1
    while os.path.exists(f"{folder}.old{n}"):
        n += 1
    os.rename(folder, f"{folder}.old{n}")


def _read_json(path: str) -> Optional[dict]:
    try:
        with open(path) as f:
            return json.load(f)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write_json(path: str, content: dict) -> None:
    with open(f"{path}.partial", "w") as f:
        json.dump(content, f, indent=1)
    os.replace(f"{path}.partial", path)
