"""Checkpoints that are written whole or not at all, and resumed from the last one that can be
read."""

import os
import re
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..common.files import replacing
from ..weights.reading import SafeReader, load_weights

_NAMES = re.compile(r"model_(\d+|final)\.pth")  # as detectron2's hooks give them


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none can be read."""


class SafeCheckpointer(SafeReader):
    """:class:`SafeReader` whose files in a local folder are complete or absent, whatever happens
    while they are written.

    Attributes:
        saved_iteration: of the last checkpoint that this process has written, or None.
    """

    saved_iteration: Optional[int] = None

    def save(self, name: str, **kwargs: Any) -> None:
        """As the parent's.

        Raises:
            CheckpointError: if the file can't be written; those from before are still there.
        """
        if not self.save_dir or not self.save_to_disk or "://" in self.save_dir:
            super().save(name, **kwargs)
        else:
            self._save_whole(name, **kwargs)
        self.saved_iteration = kwargs.get("iteration")

    def _save_whole(self, name: str, **kwargs: Any) -> None:
        data = {"model": self.model.state_dict()}
        data.update((key, x.state_dict()) for key, x in self.checkpointables.items())
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            with replacing(path) as f:
                torch.save(data, f)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = str(error).strip().split("\n")[0]
            last = self.get_checkpoint_file()
            there = f"The last complete one is {last}" if last else "There is no earlier one"
            raise CheckpointError(
                f"the checkpoint {path} can't be written: {type(error).__name__} {reason}. "
                f"{there}; make room, or repair the folder, and go on with --resume"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint in the folder, be it without ``last_checkpoint``."""
        return has_checkpoint(self.save_dir)

    def all_have_checkpoint(self) -> bool:
        """:meth:`has_checkpoint` of the main process; call it in every process.

        Raises:
            CheckpointError: in every process, if another one has a checkpoint and the main one
                none.
        """
        found = comm.all_gather(self.has_checkpoint())
        if any(found) and not found[0]:
            raise self._not_shared(
                "the main process finds no checkpoint there, but process "
                f"{found.index(True)} does"
            )
        return found[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As the parent's; a last checkpoint that can't be read is named, and the one before it
        taken. The main process chooses, for all; call it in every process.

        Raises:
            CheckpointError: in every process, if there are checkpoints, and none can be read, or if
                the processes see different ones.
        """
        if not resume or not self.all_have_checkpoint():
            return super().resume_or_load(path, resume=False)
        choice = self._choose() if comm.is_main_process() else None
        name, iteration, problems = comm.all_gather(choice)[0]
        if not name:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.save_dir} can be read; start "
                "anew, without --resume, in another OUTPUT_DIR. " + "; ".join(problems)
            )
        file = os.path.join(self.save_dir, name)
        answers = comm.all_gather("" if comm.is_main_process() else _differs(file, iteration))
        if any(answers):
            rank, answer = next((i, x) for i, x in enumerate(answers) if x)
            raise self._not_shared(
                f"the main process resumes from {name}, but process {rank} can't: {answer}"
            )
        return self.load(file)

    def last_good(self) -> str:
        """The best checkpoint in the folder that can be read, or ""."""
        return next((file for file in self._candidates() if not _read(file)[1]), "")

    def _choose(self) -> Tuple[str, Any, List[str]]:
        """The best checkpoint that can be read, its iteration, and what is wrong with better
        ones."""
        problems: List[str] = []
        for candidate in self._candidates():
            content, fault = _read(candidate)
            if fault:
                problems.append(fault)
                self.logger.warning(f"A checkpoint can't be read: {fault}")
                continue
            if problems:
                self.logger.warning(f"Resuming from an earlier checkpoint instead: {candidate}")
            elif not self.get_checkpoint_file():
                self.logger.warning(f"last_checkpoint is missing; resuming from {candidate}")
            name = candidate[len(self.save_dir) :].lstrip("/")
            return name, content.get("iteration"), problems
        return "", None, problems

    def _not_shared(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"OUTPUT_DIR {os.path.abspath(self.save_dir)} must be one folder, which all machines "
            f"share: {what}"
        )

    def _candidates(self) -> Iterator[str]:
        """Checkpoints in the folder, the best first."""
        tagged = self.get_checkpoint_file()
        if tagged:
            yield tagged
        yield from (file for file in find_checkpoints(self.save_dir) if file != tagged)


def has_checkpoint(folder: str) -> bool:
    """Whether there is something to resume from in a run's folder."""
    tag = os.path.join(folder, "last_checkpoint")
    return PathManager.exists(tag) or bool(find_checkpoints(folder))


def find_checkpoints(folder: str) -> List[str]:
    """The checkpoints in a local folder, the newest first."""
    if "://" in folder or not os.path.isdir(folder):
        return []
    names = filter(_NAMES.fullmatch, os.listdir(folder))
    files = [os.path.join(folder, name) for name in names]
    return sorted(files, key=lambda file: (os.path.getmtime(file), file), reverse=True)


def _read(file: str) -> Tuple[Mapping[str, Any], str]:
    """What a checkpoint holds, and why it can't be read, or ""."""
    try:
        return load_weights(file), ""
    except (OSError, ValueError) as error:
        return {}, str(error)


def _differs(file: str, iteration: Any) -> str:
    """Why this process can't go on from ``iteration`` in a checkpoint, or ""."""
    content, fault = _read(file)
    found = content.get("iteration")
    if fault:
        return fault
    return "" if found == iteration else f"there it is of iteration {found}, not {iteration}"
