"""The runs of a protocol: which are still to be done, in which order, and several at once.

Every run is one of :mod:`crosskd_ifc.experiments.runs`; each is recorded when it has finished.
"""

import concurrent.futures
import contextlib
import glob
import os
import sys
import threading
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from tqdm import tqdm

from ..common.files import move_aside
from ..config import ConfigError, teacher_configs
from ..training.preflight import check_evaluation_config, check_training_settings
from .child_process import RunFailed
from .protocol import TEACHER, Arm, Protocol
from .results import Key, Results
from .run_training import train
from .runs import Run


def all_runs(protocol: Protocol, folder: str, *, device: str = "") -> Dict[Key, Run]:
    """All runs of a protocol in the order in which they are done: main arms before ablations, all
    arms of a seed before the next seed, a teacher before what needs it."""
    keys = [(arm, seed) for arm in protocol.arms.values() for seed in arm.seeds]

    def turn(key: Tuple[Arm, int]) -> Tuple[bool, int]:
        arm, seed = key
        seeds = arm.seeds if arm.name == TEACHER else protocol.seeds
        return bool(arm.group), seeds.index(seed)

    keys.sort(key=turn)  # else in the protocol's order
    return {(a.name, seed): protocol.run(a.name, seed, folder, device=device) for a, seed in keys}


def select(
    protocol: Protocol,
    runs: Dict[Key, Run],
    *,
    arms: Optional[Sequence[str]] = None,
    seeds: Optional[Sequence[int]] = None,
) -> List[Key]:
    """The runs of some arms and seeds, None for all, in order.

    Raises:
        ConfigError: for an arm or a seed that the protocol doesn't have.
    """
    for what, given, known in (
        ("arm", arms or (), list(protocol.arms)),
        ("seed", seeds or (), sorted({seed for _, seed in runs})),
    ):
        unknown = [str(x) for x in given if x not in known]
        if unknown:
            names = ", ".join(map(str, known))
            raise ConfigError(f"{protocol.path}: no {what} {unknown[0]!r}; there are {names}")
    return [k for k in runs if (not arms or k[0] in arms) and (not seeds or k[1] in seeds)]


def plan(runs: Dict[Key, Run], selected: Iterable[Key], results: Results) -> List[Key]:
    """What is still to be run, in order: what has no result, and the teachers that it needs.

    A result whose folder is gone counts; but a teacher without its weights is trained again if a
    student needs them.
    """
    selected, teachers = set(selected), teachers_of(runs)
    todo, more = set(), {key for key in selected if not results.is_finished(key)}
    while more - todo:
        todo |= more
        needed = {other for key in todo for other in teachers[key]}
        more = {key for key in needed if not has_weights(runs[key])}
        # What an arm teaches depends on the very weights.
        arms = {key for key in todo if key[0] != TEACHER}
        more |= {key for key in selected if teachers[key] & arms}
    return [key for key in runs if key in todo]


def teachers_of(runs: Dict[Key, Run]) -> Dict[Key, Set[Key]]:
    """For each run the others whose weights it names as its teacher's, or starts from."""
    found: Dict[Key, Set[Key]] = {}
    made = {os.path.abspath(run.weights): key for key, run in runs.items()}
    for key, run in runs.items():
        cfg = run.cfg()
        files = [
            cfg.MODEL.WEIGHTS,
            *(one.MODEL.CROSSKD.TEACHER.WEIGHTS for _, one in teacher_configs(cfg)),
        ]
        local = (os.path.abspath(file) for file in files if file and "://" not in file)
        found[key] = {made[file] for file in local if file in made} - {key}
    return found


def has_weights(run: Run) -> bool:
    """Whether a run is finished and its weights are there."""
    return run.result() is not None and os.path.exists(run.weights)


class Comparison:
    """Does the runs of a protocol, several at once."""

    def __init__(
        self,
        runs: Dict[Key, Run],
        results: Results,
        train_net: str,
        *,
        jobs: int = 1,
        threads: int = 0,
        arguments: Sequence[str] = (),
        discard_weights: bool = False,
        train: Callable[..., dict] = train,
        say: Callable[[str], None] = tqdm.write,
    ):
        """
        Args:
            runs: all runs of the protocol.
            results: where they are recorded.
            train_net: path of ``tools/train_net.py``.
            jobs: how many runs at once.
            threads: CPU threads of each; 0: as many as torch likes.
            arguments: more arguments for ``tools/train_net.py``.
            discard_weights: delete the checkpoints of students once their results are recorded.
            train: :func:`.run_training.train`, or what does the same elsewhere, see
                :mod:`.executors`.
            say: called with lines for people.
        """
        self.runs, self.results, self.train_net = runs, results, train_net
        self.jobs, self.discard_weights, self.say = jobs, discard_weights, say
        self.train_run = train
        self.options = dict(threads=threads, arguments=arguments)
        self.stop = threading.Event()
        self.steps_done: Dict[Key, int] = {}  # of the runs that are under way
        self._teachers = teachers_of(runs)

    def collect(self) -> None:
        """Record the runs that are finished in their folders."""
        found = {key: run.result() for key, run in self.runs.items() if os.path.isdir(run.folder)}
        finished = {key: done for key, done in found.items() if done is not None}
        self.results.add(finished)
        for key in finished:
            self._discard_weights(key)

    def check(self, todo: Iterable[Key]) -> None:
        """Refuse what can't run here, before anything runs.

        Raises:
            ConfigError: for settings that can't work, data sets or a device that aren't there.
        """
        for arm, key in {key[0]: key for key in todo}.items():
            cfg = self.runs[key].cfg().clone()
            if getattr(self.train_run, "elsewhere", False):
                cfg.defrost()
                cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cpu", False
            try:
                if cfg.MODEL.CROSSKD.IMPORTS:  # code that has to know its names first
                    check_evaluation_config(cfg)
                else:
                    check_training_settings(cfg, teachers_are_there=False)
            except ConfigError as error:
                raise ConfigError(f"{self.results.protocol.path}: {arm}: {error}") from error

    def do(self, selected: Sequence[Key]) -> Dict[Key, str]:
        """Do what is still to be done of some runs.

        Returns:
            The reasons of those that failed, or were left out because their teacher did.

        Raises:
            ConfigError: for what can't run here, before anything runs.
        """
        self.collect()
        todo = plan(self.runs, selected, self.results)
        self.say(f"{self.results.protocol.name}: {len(selected)} runs, to do: {_count(todo)}")
        self.check(todo)
        return self.train(todo)

    def train(self, todo: Sequence[Key]) -> Dict[Key, str]:
        """Train, evaluate and record; returns the reasons of what failed.

        Any exception in here, such as a KeyboardInterrupt, ends the runs that are under way; they
        are resumed when they are started again.
        """
        waiting, running, failed = list(todo), {}, {}
        steps = {key: self.runs[key].cfg().SOLVER.MAX_ITER for key in todo}
        finished = 0
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(self.jobs))
            stack.callback(self.stop.set)  # before the pool waits for its runs
            bar = stack.enter_context(_bar(sum(steps.values())))
            while waiting or running:
                for key in self._ready(waiting, running.values(), failed):
                    waiting.remove(key)
                    self.say(f"{self.runs[key].name}: started")
                    running[pool.submit(self._one, key)] = key
                if not running:
                    names = ", ".join(self.runs[key].name for key in waiting)
                    raise ConfigError(f"{names}: each is to start from weights of another one")
                done, _ = concurrent.futures.wait(running, 1, "FIRST_COMPLETED")
                for future in done:
                    key = running.pop(future)
                    finished += steps[key]
                    self.steps_done.pop(key, None)
                    try:
                        result = future.result()
                    except (RunFailed, ConfigError, OSError) as error:
                        failed[key] = str(error)
                        self.say(str(error))
                    else:
                        self._finish(key, result)
                while left := [k for k in waiting if self._teachers[k] & failed.keys()]:
                    for key in left:
                        waiting.remove(key)
                        finished += steps[key]
                        failed[key] = f"{self.runs[key].name}: not run, its teacher failed"
                under_way = dict(self.steps_done)
                names = (f"{arm} {seed} {n}" for (arm, seed), n in under_way.items())
                bar.set_postfix_str(", ".join(names), refresh=False)
                bar.update(finished + sum(under_way.values()) - bar.n)
        return failed

    def _ready(self, waiting, running, failed) -> List[Key]:
        """The next runs to start: as many as there is room for, in order, teachers first."""
        held = {*waiting, *running, *failed}
        ready = [key for key in waiting if not self._teachers[key] & held]
        return ready[: self.jobs - len(running)]

    def _taught_by(self, key: Key) -> List[Key]:
        return [other for other, of in self._teachers.items() if key in of]

    def _teaches(self, key: Key) -> bool:
        return key[0] == TEACHER or bool(self._taught_by(key))

    def _one(self, key: Key) -> dict:
        run = self.runs[key]
        # Students need it. A student's own weights may be gone: another process has done it.
        if self._teaches(key) and run.result() is not None and not has_weights(run):
            move_aside(run.folder)

        def report(done: int, *_) -> None:
            self.steps_done[key] = done

        options = {**self.options, "stop": self.stop, "on_progress": report}
        return self.train_run(run, self.train_net, **options)

    def _finish(self, key: Key, result: dict) -> None:
        self.results.look_again(self._taught_by(key))
        self.results.add({key: result})
        self._discard_weights(key)
        minutes = result["seconds"] / 60
        self.say(f"{self.runs[key].name}: AP {result['AP']:.1f} in {minutes:.1f} min")

    def _discard_weights(self, key: Key) -> None:
        if self.discard_weights and not self._teaches(key):
            for path in glob.glob(os.path.join(glob.escape(self.runs[key].folder), "*.pth")):
                os.remove(path)


def _count(todo: Sequence[Key]) -> str:
    """How many runs, and how many of them are teachers: those may not be among the selected."""
    teachers = sum(arm == TEACHER for arm, _ in todo)
    return f"{len(todo)}" + (f", {teachers} of them teachers" if teachers else "")


class _Lines:
    """A file for tqdm where there is no terminal: each state of the bar is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _bar(steps: int) -> tqdm:
    """One bar for the steps of all runs."""
    how = dict(total=steps, unit=" steps", smoothing=0.05)
    if sys.stderr.isatty():
        how.update(dynamic_ncols=True)
    else:
        how.update(file=_Lines(), mininterval=60, delay=60, ascii=True, ncols=100)
    return tqdm(**how)
