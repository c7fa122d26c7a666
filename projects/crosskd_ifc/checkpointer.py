"""Checkpoints that are written whole or not at all, and resumed from the last one that can be
read."""

import contextlib
import os
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .weight_files import SafeReader, load_weights

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
            with _replacing(path) as f:
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
        with _replacing(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, tagged as the last one or not."""
        return has_checkpoint(self.save_dir)

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As the parent's; a last checkpoint that can't be read is named, and the one before it
        taken. The first process chooses for all.

        Raises:
            CheckpointError: if there are checkpoints and none can be read, or if not all processes
                can read the one that the first has chosen.
        """
        if not resume or not any(comm.all_gather(self.has_checkpoint())):
            return super().resume_or_load(path, resume=False)
        chosen, problems = self._choose() if comm.is_main_process() else ("", [])
        chosen, problems = comm.all_gather((chosen, problems))[0]
        if problems and not chosen:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.save_dir} can be read; start "
                "anew, without --resume, in another OUTPUT_DIR. " + "; ".join(problems)
            )
        mine = os.path.join(self.save_dir, chosen)
        faults = comm.all_gather("" if comm.is_main_process() else _fault(mine))
        for fault in filter(None, faults if chosen else ["the first process has no checkpoint"]):
            raise CheckpointError(
                f"not all processes can resume from {chosen or 'a checkpoint'} in OUTPUT_DIR "
                f"{self.save_dir}, which must be one folder for all machines: {fault}"
            )
        return self.load(mine)

    def last_good(self) -> str:
        """The path of the best checkpoint that can be read; "" without one."""
        return next((file for file in self._candidates() if not _fault(file)), "")

    def _choose(self) -> Tuple[str, List[str]]:
        """The name of the best checkpoint that can be read, "" if there is none, and what is wrong
        with better ones."""
        problems: List[str] = []
        for candidate in self._candidates():
            fault = _fault(candidate)
            if not fault:
                if problems:
                    self.logger.warning(f"Resuming from an earlier checkpoint instead: {candidate}")
                return os.path.basename(candidate), problems
            problems.append(fault)
            self.logger.warning(f"A checkpoint can't be read: {fault}")
        return "", problems

    def _candidates(self) -> Iterator[str]:
        """Checkpoints in the folder, the best first."""
        tagged = self.get_checkpoint_file()
        if tagged:
            yield tagged
        if "://" in self.save_dir or not os.path.isdir(self.save_dir):
            return
        names = filter(_NAMES.fullmatch, os.listdir(self.save_dir))
        found = [os.path.join(self.save_dir, name) for name in names]
        for file in sorted(found, key=os.path.getmtime, reverse=True):
            if file != tagged:
                yield file


def has_checkpoint(folder: str) -> bool:
    """Whether a folder holds a checkpoint of detectron2's, also one that its ``last_checkpoint``
    doesn't name."""
    if PathManager.exists(os.path.join(folder, "last_checkpoint")):
        return True
    if "://" in folder or not os.path.isdir(folder):
        return False
    return any(map(_NAMES.fullmatch, os.listdir(folder)))


def _fault(path: str) -> str:
    """Why a checkpoint can't be read, "" if it can."""
    try:
        load_weights(path)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[Any]:
    """A binary file that takes the place of ``path`` when the context ends well; on disk by
    then."""
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".unfinished-{name}")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
