"""Checkpoints that are written whole or not at all, and resumed from the last one that can be
read."""

import contextlib
import os
import re
from typing import Any, Dict, Iterator, List, Optional

import torch

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

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As the parent's; a last checkpoint that can't be read is named, and the one before it
        taken.

        Raises:
            CheckpointError: if there are checkpoints, and none can be read.
        """
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=False)
        problems: List[str] = []
        for candidate in self._candidates():
            try:
                load_weights(candidate)
            except (OSError, ValueError) as error:
                problems.append(str(error))
                self.logger.warning(f"A checkpoint can't be read: {error}")
                continue
            if problems:
                self.logger.warning(f"Resuming from an earlier checkpoint instead: {candidate}")
            return self.load(candidate)
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {self.save_dir} can be read; start anew, "
            "without --resume, in another OUTPUT_DIR. " + "; ".join(problems)
        )

    def _candidates(self) -> Iterator[str]:
        """Checkpoints in the folder, the best first."""
        tagged = self.get_checkpoint_file()
        yield tagged
        if "://" in self.save_dir:
            return
        names = filter(_NAMES.fullmatch, os.listdir(self.save_dir))
        found = [os.path.join(self.save_dir, name) for name in names]
        for file in sorted(found, key=os.path.getmtime, reverse=True):
            if file != tagged:
                yield file


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
