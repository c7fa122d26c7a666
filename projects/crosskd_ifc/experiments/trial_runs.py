"""The runs of a search: each trial is an arm of a protocol that grows with it.

The folder of a search holds ``study.journal``, Optuna's record of all trials, ``protocol.yaml``, a
protocol with an arm for each of them, and that protocol's ``results.json`` and report.
"""

import ast
import contextlib
import functools
import hashlib
import json
import operator
import os
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from ..analysis.curves import ap_or_zero, read_metrics
from ..common.files import replacing
from ..config import ConfigError
from ..data.files import read_yaml
from ..training.non_finite import DIVERGED
from .child_process import RunDiverged, RunFailed, RunStopped
from .comparison import Comparison, all_runs, has_weights
from .protocol import TEACHER, Protocol, load_protocol
from .protocol_file import OWN_KEYS
from .report import write_report
from .results import Key, Results
from .run_training import train
from .runs import Run
from .tuning import Space

# Of the protocol whose arm is tuned.
_NOT_ITS = ("arms", "ablations", "contrasts", "margin")


class SearchStopped(KeyboardInterrupt):
    """A search was told to stop; it goes on when it is started again."""


class TrialRuns:
    """An objective: the mean AP on the protocol's validation images that an arm reaches with a
    trial's settings, over some seeds.

    A trial whose first seed is behind the median of the earlier ones at an evaluation is pruned:
    its run ends there.
    """

    def __init__(
        self,
        study: optuna.Study,
        protocol: Protocol,
        arm: str,
        folder: str,
        train_net: str,
        *,
        runs: str,
        seeds: Sequence[int],
        device: str = "",
        command: str = "",
        jobs: int = 1,
        train: Callable[..., dict] = train,
        say: Callable[[str], None] = print,
        **options,
    ):
        """
        Args:
            study: of :func:`open_study`.
            protocol: whose ``arm`` is to be tuned.
            arm: its name.
            folder: of the search.
            train_net: path of ``tools/train_net.py``.
            runs: folder for the runs; that of the protocol's own has its teachers.
            seeds: some of the arm's.
            device: MODEL.DEVICE; "": as in the config.
            command: how to run all this again.
            jobs: runs at once.
            train: :func:`.run_training.train`, or what does the same elsewhere, see
                :mod:`.executors`.
            say: called with lines for people.
            options: threads and arguments of :func:`crosskd_ifc.experiments.run_training.train`.

        Raises:
            ConfigError: for an arm, seeds or a validation set that the protocol doesn't have.
        """
        if arm not in protocol.arms:
            raise ConfigError(
                f"{protocol.path}: no arm {arm!r}; there are {', '.join(protocol.arms)}"
            )
        if not protocol.validation:
            raise ConfigError(f"{protocol.path}: validation is missing; settings are chosen on it")
        strange = set(seeds) - set(protocol.arms[arm].seeds)
        if strange:
            raise ConfigError(
                f"{protocol.path}: {arm} has the seeds {list(protocol.arms[arm].seeds)}, not "
                f"{sorted(strange)}"
            )
        self.study, self.base, self.arm, self.folder = study, protocol, arm, folder
        self.train_net, self.runs, self.seeds, self.device = train_net, runs, list(seeds), device
        self.command, self.jobs, self.say, self.options = command, jobs, say, options
        self.train_run = train
        self.stop, self._lock = threading.Event(), threading.RLock()
        self._content = read_yaml(protocol.path)  # once: it may be edited during the search

    def start(self, space: Space) -> Optional[Dict[str, Any]]:
        """The arm's own settings; None if they lie outside of what is searched.

        Raises:
            ConfigError: for a key that isn't one of the config, that the protocol sets, or whose
                value isn't a number of the kind that is searched.
        """
        cfg, found = self.base.run(self.arm, self.seeds[0], "").cfg(), {}
        for key, distribution in space.items():
            try:
                value = functools.reduce(operator.getitem, key.split("."), cfg)
            except (KeyError, TypeError):
                raise ConfigError(f"{key}: the config has no such key") from None
            if key in OWN_KEYS:
                raise ConfigError(f"{key} is set by the protocol; it can't be searched")
            _check_kind(key, value, distribution)
            if isinstance(distribution, CategoricalDistribution):
                same = [x for x in distribution.choices if _literal(x) == _literal(value)]
            else:
                same = [value] if distribution.low <= value <= distribution.high else []
            if not same:
                return None
            found[key] = same[0]
        return found

    def prepare(self) -> None:
        """Train the teachers that are needed and aren't there.

        Raises:
            ConfigError: for what can't run here.
            RunFailed: if one of them failed.
        """
        results, runs = self._results([])
        keys = {self.base.teacher_of(self.arm, seed) for seed in self.seeds} - {None}
        todo = [key for key in runs if key in keys and not has_weights(runs[key])]
        how = dict(jobs=self.jobs, train=self.train_run, say=self.say, **self.options)
        teachers = Comparison(runs, results, self.train_net, **how)
        teachers.check([*todo, next(key for key in runs if key[0] != TEACHER)])
        failed = teachers.train(todo)
        if failed:
            raise RunFailed("\n".join(failed.values()))

    def __call__(self, trial: optuna.Trial, settings: Dict[str, Any]) -> float:
        name, found = self._name(settings), []
        _, runs = self._results([settings])
        for seed in self.seeds:
            run = runs[name, seed]
            self.say(f"trial {trial.number}, seed {seed}: {_shown(settings)}")
            done = self._train(trial, run, prune=seed == self.seeds[0])
            with self._lock:  # other trials have come since
                self._results([settings])[0].add({(name, seed): done})
            found.append(done["splits"][self.base.validation]["AP"])
        self.say(f"trial {trial.number}: AP {np.mean(found):.2f} on {self.base.validation}")
        return float(np.mean(found))

    def report(self) -> str:
        """Write the report of all finished runs; returns its path."""
        content = self._results([])[0].content()
        for arm in content["arms"]:
            if arm["arm"] == TEACHER:
                arm["seeds"] = []  # those it needs may be the comparison's
        return write_report(content, self.folder)

    def arm_of(self, trial: optuna.trial.FrozenTrial) -> Tuple[str, List[str]]:
        """The name of a trial's arm, and its settings as KEY, VALUE, ... of a command line."""
        opts = [text for pair in trial.params.items() for text in map(str, pair)]
        return self._name(trial.params), opts

    def _train(self, trial: optuna.Trial, run: Run, *, prune: bool) -> dict:
        stop, watch = threading.Event(), Watch(run, self.base.validation)

        def tell() -> None:
            for step, score in watch.new_scores() if prune else ():
                trial.report(score, step)

        def every_second(*_) -> None:
            tell()
            if self.stop.is_set() or trial.should_prune():
                stop.set()

        try:
            options = {**self.options, "stop": stop, "on_progress": every_second}
            done = self.train_run(run, self.train_net, **options)
            tell()  # for the median that later trials are compared with
            return done
        except RunStopped:
            if self.stop.is_set():
                raise SearchStopped(f"{run.name} was stopped") from None
            self.say(f"trial {trial.number}: pruned")
            raise optuna.TrialPruned() from None
        except RunFailed as error:
            if os.path.exists(run.path(DIVERGED)):
                raise RunDiverged(str(error)) from None
            self.stop.set()  # such as a full disk: it would hit the other trials, too
            raise

    def _name(self, settings: Mapping[str, Any]) -> str:
        """The same for the same settings: a repeated trial takes over its run."""
        text = json.dumps({key: str(value) for key, value in settings.items()}, sort_keys=True)
        return f"{self.arm}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def _results(self, more: List[Mapping[str, Any]]) -> Tuple[Results, Dict[Key, Run]]:
        """The results and runs of the protocol of all trials and ``more`` settings, written
        anew."""
        path, base = os.path.join(self.folder, "protocol.yaml"), self.base.arms[self.arm]
        own = dict(zip(base.opts[::2], base.opts[1::2]))
        with self._lock:
            trials = [t.params for t in self.study.get_trials(deepcopy=False) if t.params]
            arms = {
                self._name(settings): {
                    "config": base.config,
                    "seeds": list(self.seeds),  # of its own, or YAML would write an alias
                    "title": _shown(settings),
                    "opts": {**own, **{key: str(value) for key, value in settings.items()}},
                }
                for settings in (*trials, *more)
            }
            content = {
                **{k: v for k, v in self._content.items() if k not in _NOT_ITS},
                "name": f"{self.base.name}_{self.arm}_search",
                "title": f"Search: {base.title}; {self.base.title}",
                "arms": arms
                or {self.arm: {"config": base.config, "seeds": self.seeds, "opts": own}},
            }
            os.makedirs(self.folder, exist_ok=True)
            with replacing(path) as f:
                f.write(yaml.safe_dump(content, sort_keys=False).encode())
            protocol = load_protocol(path)
        runs = all_runs(protocol, self.runs, device=self.device)
        file = os.path.join(self.folder, "results.json")
        return Results(protocol, file, runs, command=self.command), runs


def _check_kind(key: str, value: Any, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} is {value!r}, which isn't a number; search it with --choice")
    if isinstance(value, float) == isinstance(distribution, IntDistribution):
        kind = "have a point, as in 0.0 5.0" if isinstance(value, float) else "be whole"
        raise ConfigError(f"{key} is {value!r}: the numbers of its range must {kind}")


class Watch:
    """The scores that a run under way writes down."""

    def __init__(self, run: Run, dataset: str):
        self._path, self._key = run.path("metrics.json"), f"{dataset}/bbox/AP"
        self._last = run.cfg().SOLVER.MAX_ITER
        self._size, self._told = 0, set()

    def new_scores(self) -> List[Tuple[int, float]]:
        """(steps done, AP) of the evaluations since the last call; the final one is none of
        them."""
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        if size == self._size:
            return []
        self._size, found = size, []
        for line in read_metrics(self._path):
            step = line["iteration"] + 1
            if self._key in line and step < self._last and step not in self._told:
                self._told.add(step)
                found.append((step, ap_or_zero(line[self._key])))
        return found


def _shown(settings: Mapping[str, Any]) -> str:
    """For people: the last parts of the keys are enough."""
    values = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in settings.items()}
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in values.items())


def _literal(value: Any) -> Any:
    """What a command line's text means to a config, where lists and tuples are the same."""
    if isinstance(value, str):
        with contextlib.suppress(SyntaxError, ValueError):
            value = ast.literal_eval(value)
    return tuple(value) if isinstance(value, list) else value
