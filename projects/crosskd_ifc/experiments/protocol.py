"""Protocols: which arms are compared, with which settings, on which seeds and data.

A protocol is a YAML file::

    name: shapes_faster_rcnn           # of the folders for runs and results
    title: Faster R-CNN R34 -> R18, built-in data set
    seeds: [1, 2, 3, 4, 5]
    validation: crosskd_shapes_val     # settings are chosen on it; optional
    test: crosskd_shapes_test          # reported
    opts: {SOLVER.CHECKPOINT_PERIOD: 1000}              # of every run; optional
    teacher: {config: quick/faster_rcnn_R_34_shapes.yaml, title: R34}
    arms:                              # the main arms
      student: {config: quick/faster_rcnn_R_18_shapes.yaml, title: plain}
      crosskd_ifc: {config: quick/crosskd_ifc_R_18_shapes.yaml, opts: {KEY: VALUE}}
    ablations:                         # optional; groups of arms
      taps:
        fc2: {config: ..., opts: {...}, seeds: [1, 2, 3], versus: [student]}
    contrasts: [[crosskd_ifc, student]]                 # arm minus reference; optional
    margin: 0.5                        # AP; smaller differences aren't worth having; optional
    stability: true                    # students that diverge are results; optional

``teacher`` is trained once for each seed; arms whose config names its config as their teacher start
from it. With fewer ``seeds`` of its own, which may be others, they are taken in turn by the
protocol's: ``seeds: [1, 2, 3, 4]`` and ``teacher: {seeds: [11, 12]}`` give the seeds 1 and 3 the
teacher of seed 11. Arms with a model-zoo teacher, with MODEL.CROSSKD.TEACHER.WEIGHTS among their
``opts`` or with several TEACHERS don't need it. ``versus`` names the arms that paired differences
are taken to. ``contrasts`` are the differences that the protocol is run for; name them before the
first run. They are tested as one family, and for equivalence within ``margin``. With ``stability``
a student whose loss isn't finite ends with an AP of 0 and counts as diverged; the report tells how
often that happens, and how much AP varies.
"""

import dataclasses
import os
from reprlib import repr as short
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..common.config_files import find_config
from ..common.paths import PROTOCOLS
from ..config import ConfigError, distillation_requested
from .protocol_file import ArmEntry, ProtocolEntry, read_protocol_file
from .runs import Run

TEACHER = "teacher"  # the name of the teacher's arm
TEACHER_WEIGHTS, _OPTS = "MODEL.CROSSKD.TEACHER.WEIGHTS", "MODEL.CROSSKD.TEACHER.OPTS"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: also of its runs' folders.
        config: config file.
        title: for people.
        opts: KEY, VALUE, ..., each as on a command line.
        seeds: its seeds.
        group: name of its ablation; "" for a main arm.
        versus: arms that its paired differences are taken to.
    """

    name: str
    config: str
    title: str
    opts: Tuple[str, ...]
    seeds: Tuple[int, ...]
    group: str
    versus: Tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A checked protocol.

    Attributes:
        path: its file.
        name: also of the folders for runs and results.
        title: for people.
        seeds: of all arms that name none.
        validation, test: data sets; validation may be "".
        opts: of every run: KEY, VALUE, ...
        arms: the teacher, if there is one, the main arms, then the ablations, by name.
        contrasts: (arm, reference): the differences that were named beforehand.
        margin: differences below it, in AP, aren't worth having; None if none was named.
        taught: names of the arms that the teacher is trained for.
        stability: whether a student that diverges is a result.
    """

    path: str
    name: str
    title: str
    seeds: Tuple[int, ...]
    validation: str
    test: str
    opts: Tuple[str, ...]
    arms: Mapping[str, Arm]
    contrasts: Tuple[Tuple[str, str], ...] = ()
    margin: Optional[float] = None
    taught: Tuple[str, ...] = ()
    stability: bool = False

    def run(self, name: str, seed: int, folder: str, *, device: str = "") -> Run:
        """The run of one arm and seed.

        Args:
            name: the arm's.
            seed: the run's.
            folder: the folder for all runs of this protocol.
            device: MODEL.DEVICE; "": as in the config.
        """
        arm = self.arms[name]
        tests = tuple(x for x in (self.test, self.validation) if x)
        opts = [*self.opts, *arm.opts, "SEED", str(seed), "DATASETS.TEST", repr(tests)]
        if device:
            opts += ["MODEL.DEVICE", device]
        run = Run(f"{name}, seed {seed}", arm.config, os.path.join(folder, f"{name}_{seed}"), opts)
        run.may_diverge = self.stability and name != TEACHER
        taught_by = self.teacher_of(name, seed)
        if taught_by:
            teacher = self.run(*taught_by, folder, device=device)
            run.needs = (teacher,)
            run.opts += [TEACHER_WEIGHTS, teacher.weights]
            # Whatever changed the teacher's architecture, input or classes must do so here, too.
            changed = _pairs([*self.opts, *self.arms[TEACHER].opts])
            has_card = any(key == "DATASETS.CARDS" for key, _ in changed)
            of_data = ("DATASETS.CARDS", "DATASETS.TRAIN") if has_card else ()
            changed = [(k, v) for k, v in changed if k.startswith(("MODEL.", "INPUT.", *of_data))]
            if changed:
                theirs = run.cfg().MODEL.CROSSKD.TEACHER.OPTS
                ours = [x for pair in changed for x in pair]
                run.opts += [_OPTS, repr((*ours, *theirs))]
        return run

    def teacher_of(self, name: str, seed: int) -> Optional[Tuple[str, int]]:
        """Arm and seed of the teacher that a run of an arm starts from; None if it needs none."""
        if name not in self.taught:
            return None
        theirs = self.arms[TEACHER].seeds
        if seed in theirs:
            return TEACHER, seed
        others = [x for x in self.seeds if x not in theirs]
        return TEACHER, theirs[others.index(seed) % len(theirs)]


def load_protocol(path: str) -> Protocol:
    """Read and check a protocol, and the configs of all its arms.

    Args:
        path: a file, or the name of one in this project's benchmarks/protocols.

    Raises:
        ConfigError: naming the file and the key.
    """
    known = os.path.join(PROTOCOLS, path.removeprefix("benchmarks/protocols/"))
    path = known if os.path.isfile(known) and not os.path.exists(path) else path
    try:
        return _load(path)
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from error


def _load(path: str) -> Protocol:
    entry = read_protocol_file(path)
    if entry.test == entry.validation:
        raise ConfigError(f"test is {entry.test!r}; expected another data set than validation's")
    protocol = Protocol(
        path=path,
        name=entry.name,
        title=entry.title or entry.name,
        seeds=tuple(entry.seeds),
        validation=entry.validation,
        test=entry.test,
        opts=_as_words(entry.opts),
        arms=_arms(entry),
        contrasts=tuple((arm, reference) for arm, reference in entry.contrasts),
        margin=entry.margin,
        stability=entry.stability,
    )
    _check_contrasts(protocol)
    Run("opts", next(iter(protocol.arms.values())).config, "", list(protocol.opts)).cfg()
    taught = tuple(name for name in protocol.arms if _needs_teacher(protocol, name))
    return dataclasses.replace(protocol, taught=taught)


def _arms(entry: ProtocolEntry) -> Dict[str, Arm]:
    """All arms by name, checked one by one and against each other."""
    found: List[Tuple[str, str, str, ArmEntry]] = []  # key, group, name, content
    found += [(TEACHER, "", TEACHER, entry.teacher)] if entry.teacher else []
    found += [(f"arms.{name}", "", name, arm) for name, arm in entry.arms.items()]
    for group, arms in entry.ablations.items():
        found += [(f"ablations.{group}.{name}", group, name, arm) for name, arm in arms.items()]
    names = [name for _, _, name, _ in found]
    arms = {}
    for key, group, name, arm in found:
        if name in arms or (name == TEACHER and key != TEACHER):
            raise ConfigError(f"{key}: there is another arm {name!r}; names must differ")
        for other in arm.versus:
            if other not in names or other == name:
                _refuse(f"{name}.versus", other, f"other arms: {', '.join(names)}")
        seeds = entry.seeds if arm.seeds is None else arm.seeds
        if name != TEACHER and not set(seeds) <= set(entry.seeds):
            _refuse(f"{name}.seeds", seeds, f"some of seeds, {entry.seeds}")
        arms[name] = Arm(
            name=name,
            config=arm.config,
            title=arm.title or name,
            opts=_as_words(arm.opts),
            seeds=tuple(seeds),
            group=group,
            versus=tuple(arm.versus or _usual_versus(name, group, names)),
        )
        Run(key, arm.config, "", list(arms[name].opts)).cfg()  # for its errors
    return arms


def _usual_versus(name: str, group: str, names: List[str]) -> List[str]:
    if name in (TEACHER, "student"):
        return []
    usual = ["student", "crosskd"] if name != "crosskd" else ["student"]
    usual += ["crosskd_ifc"] if group else []  # what most ablations vary
    return [other for other in usual if other in names]


def _check_contrasts(protocol: Protocol) -> None:
    for i, pair in enumerate(protocol.contrasts):
        for name in pair:
            if name not in protocol.arms:
                _refuse(f"contrasts.{i}", name, f"arms: {', '.join(protocol.arms)}")
        ours, theirs = (set(protocol.arms[name].seeds) for name in pair)
        if len(ours & theirs) < 2:
            _refuse(f"contrasts.{i}", list(pair), "arms with at least two seeds in common")
    if protocol.margin is not None and not protocol.contrasts:
        _refuse("margin", protocol.margin, "contrasts, which it belongs to, or no margin")


def _needs_teacher(protocol: Protocol, name: str) -> bool:
    """Whether an arm starts from the protocol's teacher."""
    arm = protocol.arms[name]
    cfg = protocol.run(name, arm.seeds[0], "").cfg()
    try:
        if not distillation_requested(cfg) or TEACHER_WEIGHTS in arm.opts[::2]:
            return False
        if cfg.MODEL.CROSSKD.TEACHERS:
            return False
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    teacher_config = cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE
    theirs, zoo_name = find_config(teacher_config, key=f"{name}: TEACHER.CONFIG_FILE")
    if TEACHER in protocol.arms:
        ours, _ = find_config(protocol.arms[TEACHER].config, key="teacher.config")
        if os.path.realpath(ours) == os.path.realpath(theirs):
            return True
    if zoo_name:
        return False
    given = protocol.arms[TEACHER].config if TEACHER in protocol.arms else "missing"
    raise ConfigError(
        f"{name}: its config's teacher is {teacher_config!r}, but teacher.config is {given!r}; "
        f"make them the same, or set {TEACHER_WEIGHTS} in the arm's opts"
    )


def _as_words(opts: Mapping[str, Any]) -> Tuple[str, ...]:
    # As on a command line: yacs reads the text of a Python literal. Its tuples and lists replace
    # each other, so a YAML list does for both.
    texts = ((key, value if isinstance(value, str) else repr(value)) for key, value in opts.items())
    return tuple(text for pair in texts for text in pair)


def _refuse(key: str, given: Any, possible: str) -> None:
    raise ConfigError(f"{key} is {short(given)}; expected {possible}")


def _pairs(opts: List[str]) -> List[Tuple[str, str]]:
    return list(zip(opts[::2], opts[1::2]))
