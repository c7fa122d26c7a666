"""``results.json`` of a protocol: all that a report needs, whatever becomes of the folders.

A finished run stays in the file for good. One of the same arm, seed and settings that is made
again, on another machine or with another version of the code, is another replicate beside it. Runs
of a seed that belong together have the same number, "replicate" (where it isn't there, 1): they
have learned from the same training of a teacher, or come from the same file. Runs of earlier
settings stay, too, and are marked "outdated".
"""

import contextlib
import itertools
import json
import os
from typing import Dict, Iterable, List, Optional, Tuple

from ..common.files import locked, replacing
from ..config import ConfigError, distillation_requested
from .protocol import TEACHER, Arm, Protocol
from .runs import Run, is_same_input
from .tables import replicate_number

Key = Tuple[str, int]  # arm, seed
# What reports read of a run.
_NEEDED = ("arm", "seed", "config_sha256", "AP", "AP50", "iterations", "seconds")
_NEEDED += ("seconds_per_step", "versions", "hardware", "curve")


class Results:
    """``results.json`` of a protocol. Several processes may write to it, each its own runs."""

    def __init__(self, protocol: Protocol, path: str, runs: Dict[Key, Run], *, command: str):
        """
        Args:
            protocol: its arms are described in the file.
            path: the JSON file; its folder is made when it is written.
            runs: all runs of the protocol.
            command: how to run all this again; what the file says stays until runs are added.
        """
        self.protocol, self.path, self.command = protocol, path, command
        self._given_command = command
        self.digests = {key: run.digest() for key, run in runs.items()}
        self._runs = runs
        self._inputs: Dict[Key, Dict[str, Optional[str]]] = {}
        # Beside the file, whatever folder its runs lie in.
        self.lock = os.path.join(os.path.dirname(os.path.abspath(path)), ".results")
        self.entries: List[dict] = []
        self._read()

    def look_again(self, keys: Iterable[Key]) -> None:
        """Read the inputs of these runs anew: other weights to start from are there."""
        for key in keys:
            self._inputs.pop(key, None)

    def is_finished(self, key: Key) -> bool:
        """Whether there is a run of these settings."""
        return any(_key(e) == key and self._is_current(e) for e in self.entries)

    def add(self, found: Dict[Key, dict]) -> None:
        """Put what :func:`crosskd_ifc.experiments.run_training.train` returned into the file."""
        with self._rewriting():
            before = len(self.entries)
            for key, done in found.items():
                entry = self._entry(key, done)
                number = self._number_of_teacher(entry)
                self._put([entry], [] if number is None else [number])
            if len(self.entries) > before:
                self.command = self._given_command

    def include(self, path: str) -> int:
        """Put the runs of another results file of this protocol into this one, such as those of
        another machine; returns how many were new.

        Raises:
            ConfigError: for a file that isn't one of this protocol's.
        """
        groups: Dict[Tuple[int, int], List[dict]] = {}
        for entry in self._read_other(path)["runs"]:
            groups.setdefault((entry["seed"], replicate_number(entry)), []).append(entry)
        with self._rewriting():
            before = len(self.entries)
            for entries in groups.values():
                there = [o for o in self.entries for e in entries if _is_same_run(e, o)]
                self._put(entries, sorted({replicate_number(other) for other in there}))
            return len(self.entries) - before

    def _put(self, entries: List[dict], preferred: List[int]) -> None:
        """Append those that aren't there yet, as replicates of one number."""
        new = [e for e in entries if not any(_is_same_run(e, other) for other in self.entries)]
        taken = {replicate_number(o) for o in self.entries for e in new if _is_same_work(o, e)}
        number = next(n for n in itertools.chain(preferred, itertools.count(1)) if n not in taken)
        for entry in new:
            entry = {k: v for k, v in entry.items() if k != "replicate"}
            self.entries.append({**entry, "replicate": number} if number > 1 else entry)

    def _number_of_teacher(self, entry: dict) -> Optional[int]:
        """The replicate of its teacher that a student has learned from, if that is known."""
        for other in self.entries:
            if other["arm"] == TEACHER != entry["arm"] and "teacher_sha256" in entry:
                if other.get("teacher_sha256") == entry["teacher_sha256"]:
                    return replicate_number(other)
        return None

    @contextlib.contextmanager
    def _rewriting(self):
        os.makedirs(os.path.dirname(self.lock), exist_ok=True)
        with locked(self.lock, "no other comparison may write to it at the same time"):
            self._read()
            yield
            if self.entries:
                self._write()

    def _is_current(self, entry: dict) -> bool:
        key = _key(entry)
        if entry["config_sha256"] != self.digests.get(key):
            return False
        if "diverged" in entry and not self.protocol.stability:
            return False
        if key not in self._inputs:
            self._inputs[key] = self._runs[key].all_inputs()
        present = self._inputs[key]
        # What was outdated stays so where a file isn't there any more that told the difference.
        is_unknown = any(entry.get(name) and value is None for name, value in present.items())
        return is_same_input(entry, present) and not (is_unknown and entry.get("outdated"))

    def content(self) -> dict:
        """What the file holds."""
        protocol = self.protocol
        order = list(protocol.arms)
        for entry in self.entries:
            if self._is_current(entry):
                entry.pop("outdated", None)
            else:
                entry["outdated"] = True

        def place(entry: dict) -> tuple:
            # Arms that the protocol had once come last: they cost time, too.
            arm = entry["arm"]
            known = order.index(arm) if arm in order else len(order)
            return known, arm, entry["seed"], replicate_number(entry)

        return {
            "name": protocol.name,
            "title": protocol.title,
            "command": self.command,
            "validation": protocol.validation,
            "test": protocol.test,
            **({"margin": protocol.margin} if protocol.margin else {}),
            **({"stability": True} if protocol.stability else {}),
            **(_contrasts(protocol) if protocol.contrasts else {}),
            "arms": [
                {
                    "arm": arm.name,
                    "title": arm.title,
                    "group": arm.group,
                    "config": arm.config,
                    "opts": list(arm.opts),
                    "versus": list(arm.versus),
                    "seeds": list(arm.seeds),
                    "taught": arm.name in protocol.taught,
                    **({"given_teacher": True} if self._has_given_teacher(arm) else {}),
                }
                for arm in protocol.arms.values()
            ],
            "runs": sorted(self.entries, key=place),
        }

    def _has_given_teacher(self, arm: Arm) -> bool:
        run = self._runs[arm.name, arm.seeds[0]]
        return arm.name not in self.protocol.taught and distillation_requested(run.cfg())

    def _entry(self, key: Key, done: dict) -> dict:
        splits, validation = done["splits"], self.protocol.validation
        test = splits[self.protocol.test]
        entry = {"arm": key[0], "seed": key[1]}
        entry.update(AP=round(test["AP"], 4), AP50=round(test["AP50"], 4))
        if validation:
            chosen = splits[validation]
            entry.update(AP_val=round(chosen["AP"], 4), AP50_val=round(chosen["AP50"], 4))
        curve = splits[validation or self.protocol.test]["curve"]
        # Which training of its teacher a student learned from.
        is_teacher = key[0] == TEACHER
        teacher = [done.get("weights_sha256")] if is_teacher else done.get("needs_sha256")
        if teacher and teacher[0]:
            entry["teacher_sha256"] = teacher[0]
        taught_by = self.protocol.teacher_of(*key)
        if taught_by:
            entry["teacher_seed"] = taught_by[1]
        for name in ("diverged", "needs_inputs_sha256"):
            if done.get(name) is not None:
                entry[name] = done[name]
        return {
            **entry,
            "config_sha256": done["digest"],
            "inputs_sha256": done.get("inputs_sha256"),
            "iterations": done["iterations"],
            "seconds": round(done["seconds"], 1),
            "seconds_per_step": round(done["seconds_per_step"], 4),
            "versions": done["versions"],
            "hardware": done["hardware"],
            "curve": [[i, round(ap, 4)] for i, ap in curve],
            "statistics": {k: round(v, 4) for k, v in done.get("statistics", {}).items()},
        }

    def _read(self) -> None:
        if os.path.exists(self.path):
            content = self._read_other(self.path)
            self.entries = content["runs"]
            self.command = content.get("command", self.command)

    def _read_other(self, path: str) -> dict:
        try:
            with open(path) as f:
                content = json.load(f)
            name, _ = content["name"], [[run[key] for key in _NEEDED] for run in content["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ConfigError(f"{path}: not the results of a comparison: {reason}") from error
        if name != self.protocol.name:
            raise ConfigError(
                f"{path}: holds the results of {name!r}, not of "
                f"{self.protocol.name!r} ({self.protocol.path}); give another --output"
            )
        return content

    def _write(self) -> None:
        content = self.content()
        # One line for each arm and run: a difference of two versions shows what was added.
        blocks = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in content.items() if _is_flat(v)]
        for key in (k for k, v in content.items() if not _is_flat(v)):
            lines = ",\n".join("  " + json.dumps(entry) for entry in content[key])
            blocks.append(f" {json.dumps(key)}: [\n{lines}\n ]")
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with replacing(self.path) as f:
            f.write(("{\n" + ",\n".join(blocks) + "\n}\n").encode())


def _contrasts(protocol: Protocol) -> dict:
    """The named differences, and how many seeds each is to have."""
    seeds = {arm.name: set(arm.seeds) for arm in protocol.arms.values()}
    return {
        "contrasts": [list(pair) for pair in protocol.contrasts],
        "planned_seeds": [len(seeds[a] & seeds[b]) for a, b in protocol.contrasts],
    }


def _is_flat(value) -> bool:
    return not isinstance(value, list) or all(isinstance(x, int) for x in value)


def _key(entry: dict) -> Key:
    return entry["arm"], entry["seed"]


def _is_same_work(entry: dict, other: dict) -> bool:
    """Whether two entries are of the same arm, seed, settings and, where both name them, inputs."""
    same = all(entry[key] == other[key] for key in ("arm", "seed", "config_sha256"))
    return same and not _differ(entry, other, ("inputs_sha256", "needs_inputs_sha256"))


def _differ(entry: dict, other: dict, keys: Iterable[str]) -> bool:
    """Whether two entries both have one of these keys, with unlike values."""
    return any(len({e.get(key) for e in (entry, other)} - {None}) > 1 for key in keys)


def _is_same_run(entry: dict, other: dict) -> bool:
    """Whether two entries tell of one training, not of two that agree."""
    same = ("AP", "AP50", "seconds", "seconds_per_step", "curve")
    is_same = _is_same_work(entry, other) and all(entry[key] == other[key] for key in same)
    return is_same and not _differ(entry, other, ("teacher_sha256",))
