"""Training runs as child processes: skipped when finished, resumed when interrupted, with progress.

Each run is an ordinary ``tools/train_net.py`` run in a folder of its own. A finished one leaves
``run.json`` there, with its results and a digest of all that they depend on.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode

from ..analysis.curves import ap_or_zero, read_metrics
from ..common.config_files import FILES, find_config, load_config, map_files
from ..common.environment import hardware, versions
from ..common.files import file_sha256, read_json_if_any, write_json
from ..common.paths import resolve_path
from ..config import ConfigError, distillation_requested, teacher_configs
from ..data import shapes
from ..data.cards import describe_data
from ..data.class_names import fill_in_class_count
from ..modeling.attach import load_teacher_config
from ..training.non_finite import DIVERGED
from ..weights.state_dicts import is_missing
from .child_process import RunFailed, RunStopped, StepCounter, claim_folder, supervise
from .settings_digest import digested_settings


@dataclasses.dataclass
class Run:
    """One ``tools/train_net.py`` run.

    Attributes:
        name: for people.
        config: config file.
        folder: its OUTPUT_DIR.
        opts: KEY VALUE overrides.
        needs: runs whose results this one starts from, such as its teacher's.
        may_diverge: whether a loss that isn't finite is a result, an AP of 0, and no failure.
    """

    name: str
    config: str
    folder: str
    opts: List[str] = dataclasses.field(default_factory=list)
    needs: Sequence["Run"] = ()
    may_diverge: bool = False
    _built: Tuple[tuple, Optional[CfgNode]] = dataclasses.field(
        default=((), None), init=False, repr=False, compare=False
    )

    def cfg(self) -> CfgNode:
        """The full config, frozen; its files are read once."""
        key = (self.config, self.folder, *self.opts)
        if self._built[0] != key:
            self._built = key, self._build_cfg()
        return self._built[1]

    def read_again(self) -> "Run":
        """The same run, whose config files will be read anew."""
        return dataclasses.replace(self, needs=tuple(run.read_again() for run in self.needs))

    def _build_cfg(self) -> CfgNode:
        opts = [*self.opts, "OUTPUT_DIR", self.folder]
        cfg = load_config(self.config, opts, key=self.name, opts_key=self.name)
        if cfg.SOLVER.REFERENCE_WORLD_SIZE:
            raise ConfigError(
                f"{self.name}: SOLVER.REFERENCE_WORLD_SIZE is {cfg.SOLVER.REFERENCE_WORLD_SIZE}; "
                "in a comparison the number of GPUs must not change the settings: set it to 0"
            )
        fill_in_class_count(cfg)
        cfg.freeze()
        return cfg

    def digest(self) -> str:
        """A digest of the settings and of those of the runs it needs.

        Folder and device don't matter, nor do keys that are new since then, as long as they are at
        their defaults (those of ``MODEL.CROSSKD``: empty, 0 or False): results outlive new options.
        """
        settings = self._settings(self.cfg())
        if self.needs:
            settings.pop("MODEL.CROSSKD.TEACHER.WEIGHTS", None)
        return _sha256([settings, *(run.digest() for run in self.needs)])

    def inputs(self) -> Optional[str]:
        """A digest of what the settings only name: annotations and classes of the data sets of
        cards, files of IMPORTS, the weights that the student starts from, config and weights of a
        teacher that no run of ``needs`` trains, and the version of the built-in data, from the
        second on. None if the data or one of the weights aren't there.
        """
        cfg, found = self.cfg(), {}
        start = cfg.MODEL.WEIGHTS
        teachers = []
        if not self.needs and distillation_requested(cfg):
            teachers = [(one, *load_teacher_config(one)) for _, one in teacher_configs(cfg)]
        if any(file and is_missing(file) for file in (start, *(x[2] for x in teachers))):
            return None
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        if cfg.DATASETS.CARDS:
            try:
                found["data"] = describe_data(cfg.DATASETS.CARDS, names)
            except (FileNotFoundError, ValueError):
                return None
        for name in cfg.MODEL.CROSSKD.IMPORTS:
            if name.endswith(".py"):
                path = resolve_path(name, what="file", key="MODEL.CROSSKD.IMPORTS")
                key = self._portable(name)  # of two folders perhaps
                found[key] = found.get(key, "") + file_sha256(path)
        if start and "://" not in start:
            found["start"] = file_sha256(start.split("?")[0])
        if shapes.VERSION > 1 and any(name.startswith("crosskd_shapes") for name in names):
            found["shapes"] = shapes.VERSION
        for i, (one, teacher, weights) in enumerate(teachers):
            lazy = not isinstance(teacher, CfgNode)
            settings = _teacher_file(one) if lazy else self._settings(teacher)
            key = f"teacher_{i + 1}" if i else "teacher"
            found[key] = [settings, self._portable(weights), file_sha256(weights)]
        return _sha256(found)

    def all_inputs(self) -> Dict[str, Optional[str]]:
        """:meth:`inputs` and a digest of those of the runs that it needs, None if one of them has
        none, under the names that records have."""
        found = [run.inputs() for run in self.needs]
        needed = _sha256(found) if found and None not in found else None
        return {"inputs_sha256": self.inputs(), "needs_inputs_sha256": needed}

    def _settings(self, cfg: CfgNode) -> Dict[str, Any]:
        settings = digested_settings(cfg)
        for key in settings.keys() & {*FILES, "MODEL.WEIGHTS"}:
            settings[key] = map_files(self._portable, settings[key])
        return settings

    def _portable(self, file: str) -> str:
        """A file's name wherever the project lies: below the config's folder by the path from
        there, elsewhere by its last part. What it holds is digested by itself."""
        if "://" in file or not (os.path.isabs(file) or file.startswith("..")):
            return file
        folder = os.path.dirname(os.path.abspath(find_config(self.config, key=self.name)[0]))
        path = os.path.relpath(os.path.abspath(file), folder)
        return os.path.basename(path) if path.startswith("..") else path

    @property
    def weights(self) -> str:
        """The file of the trained weights, once they are there."""
        return self.path("model_final.pth")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def result(self) -> Optional[dict]:
        """The results of a finished run of this very config, or None."""
        done = read_json_if_any(self.path("run.json"))
        if not done or done["digest"] != self.digest():
            return None
        if "diverged" in done and not self.may_diverge:
            return None
        return done if is_same_input(done, self.all_inputs()) else None


def _sha256(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _teacher_file(cfg: CfgNode) -> str:
    """The digest of a teacher's LazyConfig file, whose contents are code."""
    name = cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE
    return file_sha256(find_config(name, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")[0])


def is_same_input(record: Mapping[str, Any], present: Mapping[str, Optional[str]]) -> bool:
    """Whether a record was made with the present inputs, of :meth:`Run.all_inputs`.

    Records of old have none; and where a file is gone, as in a fresh clone, the record counts.
    """
    return all(None in (record.get(k), v) or record[k] == v for k, v in present.items())


def state_digest(run: Run) -> str:
    """A digest of what the state of an unfinished run depends on: also the very weights of the
    runs that it needs, which may have been trained again since."""
    weights = (file_sha256(needed.weights) for needed in run.needs)
    return "".join([run.digest(), run.inputs() or "", *weights])


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
