"""``results.json`` of a protocol: all that a report needs, whatever becomes of the folders."""

import functools
import json
import os
from typing import Dict, Tuple

from iopath.common.file_io import file_lock

from ..common.files import replacing
from ..config import ConfigError
from .protocol import TEACHER, Protocol
from .runs import Run

Key = Tuple[str, int]  # arm, seed


class Results:
    """``results.json`` of a protocol. Several processes may write to it, each its own runs."""

    def __init__(self, protocol: Protocol, path: str, runs: Dict[Key, Run], *, command: str):
        """
        Args:
            protocol: its arms are described in the file.
            path: the JSON file; its folder is made when it is written.
            runs: all runs of the protocol.
            command: how to run all this again.
        """
        self.protocol, self.path, self.command = protocol, path, command
        self.digests = {key: run.digest() for key, run in runs.items()}
        self._inputs = functools.lru_cache(maxsize=None)(lambda key: runs[key].inputs())
        # Beside the file, whatever folder its runs lie in.
        self.lock = os.path.join(os.path.dirname(os.path.abspath(path)), ".results")
        self.entries: Dict[Key, dict] = {}
        self._read()

    def is_finished(self, key: Key) -> bool:
        """Whether there is an entry for the run's present settings."""
        entry = self.entries.get(key)
        if entry is None or entry["config_sha256"] != self.digests.get(key):
            return False
        inputs = entry.get("inputs_sha256")  # not in records of old
        return inputs is None or inputs == self._inputs(key)

    def add(self, found: Dict[Key, dict]) -> None:
        """Put what :func:`crosskd_ifc.experiments.runs.train` returned into the file."""
        os.makedirs(os.path.dirname(self.lock), exist_ok=True)
        with file_lock(self.lock):
            self._read()
            self.entries.update({key: self._entry(key, done) for key, done in found.items()})
            if self.entries:
                self._write()

    def content(self) -> dict:
        """What the file holds."""
        protocol = self.protocol
        order = list(protocol.arms)
        for key, entry in self.entries.items():
            entry.pop("outdated", None)
            entry.update({} if self.is_finished(key) else {"outdated": True})
        known = sorted(
            (k for k in self.entries if k[0] in order), key=lambda k: (order.index(k[0]), k[1])
        )
        return {
            "name": protocol.name,
            "title": protocol.title,
            "command": self.command,
            "validation": protocol.validation,
            "test": protocol.test,
            **({"margin": protocol.margin} if protocol.margin else {}),
            **({"contrasts": [list(x) for x in protocol.contrasts]} if protocol.contrasts else {}),
            "arms": [
                {
                    "arm": arm.name,
                    "title": arm.title,
                    "group": arm.group,
                    "config": arm.config,
                    "opts": list(arm.opts),
                    "versus": list(arm.versus),
                    "taught": arm.name in protocol.taught,
                }
                for arm in protocol.arms.values()
            ],
            # Also those of arms that the protocol had once: they cost time.
            "runs": [self.entries[k] for k in [*known, *sorted(set(self.entries) - set(known))]],
        }

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
        if not os.path.exists(self.path):
            return
        try:
            with open(self.path) as f:
                content = json.load(f)
            runs, name = content["runs"], content["name"]
            found = {(entry["arm"], entry["seed"]): entry for entry in runs}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path}: not the results of a comparison: {type(error).__name__} {error}"
            ) from error
        if name != self.protocol.name:
            raise ConfigError(
                f"{self.path}: holds the results of {name!r}, not of {self.protocol.name!r} "
                f"({self.protocol.path}); give another --output"
            )
        self.entries.update(found)

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


def _is_flat(value) -> bool:
    return not isinstance(value, list)
