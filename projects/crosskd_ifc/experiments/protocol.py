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

``teacher`` is trained once for each seed; arms whose config names its config as their teacher start
from it. With fewer ``seeds`` of its own, they are taken in turn by the protocol's: ``seeds: [1, 2,
3, 4]`` and ``teacher: {seeds: [1, 2]}`` give seed 3 the teacher of seed 1, and 4 that of 2. Arms
with a model-zoo teacher, or with MODEL.CROSSKD.TEACHER.WEIGHTS among their ``opts``, don't need it.
``versus`` names the arms that paired differences are taken to.
"""

import dataclasses
import os
import re
from reprlib import repr as short
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..common.config_files import find_config
from ..config import ConfigError, distillation_requested
from ..data.files import read_yaml
from .runs import Run

TEACHER = "teacher"  # the name of the teacher's arm
_KEYS = ("name", "title", "seeds", "validation", "test", "opts", "teacher", "arms", "ablations")
_ARM_KEYS = ("config", "title", "opts", "seeds", "versus")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # names become parts of paths
_OWN_KEYS = ("SEED", "OUTPUT_DIR", "DATASETS.TEST")  # set by the protocol's other keys
_WEIGHTS, _OPTS = "MODEL.CROSSKD.TEACHER.WEIGHTS", "MODEL.CROSSKD.TEACHER.OPTS"


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
    """A checked protocol. ``seeds`` are of all arms that name none; ``arms`` holds the teacher,
    if there is one, the main arms, then the ablations; ``taught`` the names of those that the
    teacher is trained for."""

    path: str
    name: str
    title: str
    seeds: Tuple[int, ...]
    validation: str
    test: str
    opts: Tuple[str, ...]
    arms: Mapping[str, Arm]
    taught: Tuple[str, ...] = ()

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
        taught_by = self.teacher_of(name, seed)
        if taught_by:
            teacher = self.run(*taught_by, folder, device=device)
            run.needs = (teacher,)
            run.opts += [_WEIGHTS, teacher.weights]
            # Whatever changed the teacher's architecture or input must change it here, too.
            changed = _pairs([*self.opts, *self.arms[TEACHER].opts])
            changed = [(k, v) for k, v in changed if k.startswith(("MODEL.", "INPUT."))]
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
        return TEACHER, theirs[self.seeds.index(seed) % len(theirs)]


def load_protocol(path: str) -> Protocol:
    """Read and check a protocol, and the configs of all its arms.

    Raises:
        ConfigError: naming the file and the key.
    """
    try:
        return _load(path)
    except ValueError as error:  # of read_yaml or a ConfigError
        text = str(error)
        raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from error


def _load(path: str) -> Protocol:
    raw = read_yaml(path)
    _check_keys("", raw, _KEYS, ("name", "seeds", "test", "arms"))
    if not isinstance(raw["name"], str) or not _NAME.fullmatch(raw["name"]):
        _refuse("name", raw["name"], "a name of letters, digits, '_', '-' and '.'")
    for key in ("title", "validation", "test"):
        if not isinstance(raw.get(key, ""), str):
            _refuse(key, raw[key], "a string")
    if not raw["test"] or raw["test"] == raw.get("validation"):
        _refuse("test", raw["test"], "the name of a data set, other than validation's")
    seeds, shared = _seeds("seeds", raw["seeds"]), _opts("opts", raw.get("opts", {}))

    entries: List[Tuple[str, str, str, Any]] = []  # key, group, name, content
    if "teacher" in raw:
        entries.append(("teacher", "", TEACHER, raw["teacher"]))
    entries += [("arms", "", n, arm) for n, arm in _mapping("arms", raw["arms"]).items()]
    for group, members in _mapping("ablations", raw.get("ablations", {}), empty=True).items():
        key = f"ablations.{group}"
        entries += [(key, str(group), n, a) for n, a in _mapping(key, members).items()]
    arms: Dict[str, Arm] = {}
    for key, group, name, content in entries:
        key = key if key == "teacher" else f"{key}.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            _refuse(key, name, "a name of letters, digits, '_', '-' and '.'")
        if name in arms or (name == TEACHER and key != "teacher"):
            raise ConfigError(f"{key}: there is another arm {name!r}; names must differ")
        arms[name] = _arm(key, name, group, content, seeds)
    for name, arm in arms.items():
        unknown = [other for other in arm.versus if other not in arms or other == name]
        if unknown:
            _refuse(f"{name}.versus", unknown[0], f"other arms: {', '.join(arms)}")
        if not set(arm.seeds) <= set(seeds):
            _refuse(f"{name}.seeds", list(arm.seeds), f"some of seeds, {list(seeds)}")
    arms = {name: _with_default_versus(arm, arms) for name, arm in arms.items()}
    protocol = Protocol(
        path=path,
        name=raw["name"],
        title=raw.get("title", raw["name"]),
        seeds=seeds,
        validation=raw.get("validation", ""),
        test=raw["test"],
        opts=shared,
        arms=arms,
    )
    Run("opts", next(iter(arms.values())).config, "", list(shared)).cfg()
    taught = tuple(name for name in arms if _needs_teacher(protocol, name))
    return dataclasses.replace(protocol, taught=taught)


def _needs_teacher(protocol: Protocol, name: str) -> bool:
    """Whether an arm starts from the protocol's teacher."""
    arm = protocol.arms[name]
    cfg = protocol.run(name, arm.seeds[0], "").cfg()
    try:
        if not distillation_requested(cfg) or _WEIGHTS in arm.opts[::2]:
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
        f"make them the same, or set {_WEIGHTS} in the arm's opts"
    )


def _arm(key: str, name: str, group: str, raw: Any, seeds: Tuple[int, ...]) -> Arm:
    _check_keys(f"{key}.", raw, _ARM_KEYS, ("config",))
    if not isinstance(raw["config"], str) or not raw["config"]:
        _refuse(f"{key}.config", raw["config"], "a config file")
    if not isinstance(raw.get("title", ""), str):
        _refuse(f"{key}.title", raw["title"], "a string")
    versus = raw.get("versus", [])
    versus = [versus] if isinstance(versus, str) else versus
    if not isinstance(versus, list) or not all(isinstance(x, str) for x in versus):
        _refuse(f"{key}.versus", versus, "names of arms")
    arm = Arm(
        name=name,
        config=raw["config"],
        title=raw.get("title", name),
        opts=_opts(f"{key}.opts", raw.get("opts", {})),
        seeds=_seeds(f"{key}.seeds", raw["seeds"]) if "seeds" in raw else seeds,
        group=group,
        versus=tuple(versus),
    )
    Run(key, arm.config, "", list(arm.opts)).cfg()  # for its errors
    return arm


def _with_default_versus(arm: Arm, arms: Mapping[str, Arm]) -> Arm:
    if arm.versus or arm.name in (TEACHER, "student"):
        return arm
    usual = ["student", "crosskd"] if arm.name != "crosskd" else ["student"]
    usual += ["crosskd_ifc"] if arm.group else []  # what most ablations vary
    return dataclasses.replace(arm, versus=tuple(x for x in usual if x in arms))


def _opts(key: str, raw: Any) -> Tuple[str, ...]:
    opts: List[str] = []
    for name, value in _mapping(key, raw, empty=True).items():
        if not isinstance(name, str) or name in _OWN_KEYS:
            _refuse(key, name, f"config keys other than {', '.join(_OWN_KEYS)}")
        if isinstance(value, dict):
            _refuse(f"{key}.{name}", value, "a value; write nested keys as MODEL.CROSSKD.KEY")
        # As on a command line: yacs reads the text of a Python literal. Its tuples and lists
        # replace each other, so a YAML list does for both.
        opts += [name, value if isinstance(value, str) else repr(value)]
    return tuple(opts)


def _seeds(key: str, raw: Any) -> Tuple[int, ...]:
    good = isinstance(raw, list) and raw and all(type(x) is int and x >= 0 for x in raw)
    if not good or len(set(raw)) < len(raw):
        _refuse(key, raw, "a list of different integers, none below 0")
    return tuple(raw)


def _mapping(key: str, raw: Any, *, empty: bool = False) -> Mapping[Any, Any]:
    if not isinstance(raw, dict) or not (raw or empty):
        _refuse(key, raw, "a mapping" if empty else "a mapping with at least one entry")
    return raw


def _check_keys(prefix: str, raw: Any, known: Tuple[str, ...], needed: Tuple[str, ...]) -> None:
    if not isinstance(raw, dict):
        _refuse(prefix.rstrip(".") or "content", raw, f"a mapping with keys {', '.join(known)}")
    for key in raw:
        if key not in known:
            raise ConfigError(f"{prefix}{short(key)}: unknown key; known are {', '.join(known)}")
    for key in needed:
        if raw.get(key) is None:
            raise ConfigError(f"{prefix}{key}: the key is missing")


def _refuse(key: str, given: Any, possible: str) -> None:
    raise ConfigError(f"{key} is {short(given)}; expected {possible}")


def _pairs(opts: List[str]) -> List[Tuple[str, str]]:
    return list(zip(opts[::2], opts[1::2]))
