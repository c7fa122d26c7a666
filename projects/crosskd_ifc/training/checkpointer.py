"""Checkpoints that are written whole or not at all, with the config of their run, and resumed from
the last one that can be read."""

import os
import shutil
from typing import Any, Collection, Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..common.command_line import tool_command
from ..common.errors import one_line
from ..common.files import replacing
from ..config import ConfigError
from ..modeling.student import adapter_prefixes
from ..weights.held_config import check_class_order
from ..weights.reading import SafeReader, load_weights, unreadable
from ..weights.state_dicts import is_state_dict
from ..weights.strict import describe_misfit
from .run_config import as_table, changed_settings, describe_run, is_distilled
from .run_folder import find_checkpoints, has_checkpoint, number_of, tagged_checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none can be read, or a run can't go on from it."""


class SafeCheckpointer(SafeReader):
    """:class:`SafeReader` whose files in a local folder are complete or absent, whatever happens
    while they are written, and that resumes all of a run or nothing.

    Attributes:
        saved_iteration: of the last checkpoint that this process has written, or None.
        resumed_from: the checkpoint that this process has resumed from, or "".
        is_complete: whether all of the detector was in the weights that it has loaded last.
    """

    saved_iteration: Optional[int] = None
    resumed_from = ""
    is_complete = False
    _missing: Collection[str] = ()

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: Optional[CfgNode] = None,
        **checkpointables: Any,
    ):
        """
        Args:
            cfg: of the run; kept in its checkpoints, and compared when it is resumed.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._cfg = cfg

    def save(self, name: str, **kwargs: Any) -> None:
        """As the parent's.

        Raises:
            CheckpointError: if the file can't be written, or couldn't be read again; those from
                before are still there.
        """
        if self._cfg is not None:
            kwargs["config"] = describe_run(self._cfg)
        if self.save_dir and self.save_to_disk:
            data = {"model": self.model.state_dict()}
            data.update((key, x.state_dict()) for key, x in self.checkpointables.items())
            data.update(kwargs)
            self._check_readable(name, data)
            if "://" in self.save_dir:
                super().save(name, **kwargs)
            else:
                self._write(name, lambda f: torch.save(data, f))
        self.saved_iteration = kwargs.get("iteration")

    def save_weights(self, name: str, weights: Mapping[str, torch.Tensor], **kwargs: Any) -> None:
        """Write a file of weights that no run goes on from, with the config and ``kwargs``.

        Raises:
            CheckpointError: if it can't be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": weights, **kwargs}
        if self._cfg is not None:
            data["config"] = describe_run(self._cfg)
        if "://" in self.save_dir:
            with PathManager.open(os.path.join(self.save_dir, f"{name}.pth"), "wb") as f:
                torch.save(data, f)
        else:
            self._write(name, lambda f: torch.save(data, f), tag=False)

    def save_final(self) -> None:
        """Make the checkpoint that this process has resumed from the final one: the run is over,
        but has died before it could write that."""
        if os.path.basename(self.resumed_from) != "model_final.pth":
            with PathManager.open(self.resumed_from, "rb") as source:
                self._write("model_final", lambda f: shutil.copyfileobj(source, f))

    def _check_readable(self, name: str, data: Mapping[str, Any]) -> None:
        fault = unreadable(data)
        if fault:
            raise CheckpointError(
                f"the checkpoint {name}.pth isn't written, since it couldn't be read again: {fault}"
                ". A state may hold tensors, plain numbers and texts, and lists and dicts of these"
            )

    def _write(self, name: str, write: Any, *, tag: bool = True) -> None:
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            with replacing(path) as f:
                write(f)
            if tag:
                self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            last = self.get_checkpoint_file()
            there = f"The last complete one is {last}" if last else "There is no earlier one"
            raise CheckpointError(
                f"the checkpoint {path} can't be written: {one_line(error)}"
                f"{_free(self.save_dir)}. "
                f"{there}; make room, or repair the folder, and go on with --resume"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename.encode())

    def get_checkpoint_file(self) -> str:
        """The file in this folder that ``last_checkpoint`` names, be it there or not; or ""."""
        if "://" in self.save_dir:
            return super().get_checkpoint_file()
        return tagged_checkpoint(self.save_dir)

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
                the processes see different ones, or if the run's config doesn't fit.
            ConfigError: if nothing of ``path`` is in the model, or classes have changed places.
        """
        if not resume or not self.all_have_checkpoint():
            content = super().resume_or_load(path, resume=False)
            if path:
                self._check_start(path)
            return content
        file, content, problems = self._choose() if comm.is_main_process() else ("", {}, [])
        choice = os.path.basename(file), content.get("iteration"), problems
        name, iteration, problems = comm.all_gather(choice)[0]
        for problem in problems:
            self.logger.warning(f"A checkpoint can't be read: {problem}")
        if not name:
            raise CheckpointError(
                f"none of the {len(problems)} checkpoints in {self.save_dir} can be read; start "
                "anew, without --resume, in another OUTPUT_DIR. " + "; ".join(problems)
            )
        file, fault = os.path.join(self.save_dir, name), ""
        if not comm.is_main_process():
            content, fault = self._read(file)
            if not fault and content["iteration"] != iteration:
                fault = f"there it is of iteration {content['iteration']}, not {iteration}"
        answers = comm.all_gather(fault)
        if any(answers):
            rank, answer = next((i, x) for i, x in enumerate(answers) if x)
            raise self._not_shared(
                f"the main process resumes from {name}, but process {rank} can't: {answer}"
            )
        tagged = self.get_checkpoint_file()
        if not tagged:
            self.logger.warning(f"last_checkpoint is missing; resuming from {file}")
        elif file != tagged:
            self.logger.warning(f"Resuming from an earlier checkpoint instead: {file}")
        self._go_on_from(file, dict(content))
        return content

    def _load_model(self, checkpoint: Any) -> Any:
        misfit = super()._load_model(checkpoint)
        self._missing = set(misfit.missing_keys)  # those of another shape, too
        more = adapter_prefixes(self.model)
        self.is_complete = all(k.startswith(more) for k in misfit.missing_keys)
        return misfit

    def _check_start(self, path: str) -> None:
        """Look at what a run starts from: without its weights, a layer stays random."""
        missing = [x for x in self.model.named_parameters() if x[0] in self._missing]
        if len(missing) == len(list(self.model.parameters())):
            raise ConfigError(
                f"MODEL.WEIGHTS {path!r}: none of its weights is one of this model's. "
                f"`{tool_command('convert_weights')}` turns torchvision's files into "
                "detectron2's; MODEL.WEIGHTS '' starts from random weights"
            )
        frozen = [name for name, parameter in missing if not parameter.requires_grad]
        inherits = self._cfg is not None and self._cfg.MODEL.CROSSKD.INHERIT
        if frozen and not inherits:  # afterwards
            self.logger.warning(
                f"MODEL.WEIGHTS {path!r} lacks {len(frozen)} frozen parameters, which keep their "
                f"initial values: {', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''}; "
                "give others, or lower MODEL.BACKBONE.FREEZE_AT"
            )

    def _go_on_from(self, file: str, content: Dict[str, Any]) -> None:
        """Load all of a checkpoint that :meth:`_read` has found good."""
        changed = []
        if self._cfg is not None and "config" in content:
            check_class_order(content, self._cfg, file)
            changed = changed_settings(content["config"], self._cfg)
            self._check_processes(file, content["config"])
        elif self._cfg is not None:
            self.logger.warning(f"{file} doesn't say its config: no setting can be compared")
        table = f" What has changed:\n{as_table(changed)}" if changed else ""
        was_distilled = bool(changed) and is_distilled(content["config"])
        if changed and was_distilled != is_distilled(describe_run(self._cfg)):
            then = "was" if was_distilled else "wasn't"
            raise CheckpointError(
                f"{file} is of a run that {then} distilled (MODEL.CROSSKD.TEACHER, TEACHERS or "
                "ENABLED), so this one needs an OUTPUT_DIR of its own. To start from those "
                "weights, name the file in MODEL.WEIGHTS; to end a distillation early, set "
                f"MODEL.CROSSKD.SCHEDULE.STOP_ITER.{table}"
            )
        try:
            misfit = self._load_model({"model": content["model"]})
            # An evaluation builds the student without what only its training has.
            problem = describe_misfit(misfit, with_adapters=bool(self.checkpointables))
            if problem:
                raise ValueError(f"its weights don't fit this config's model: {problem}")
            for key, x in self.checkpointables.items():
                x.load_state_dict(content[key])
        except ConfigError:
            raise
        except Exception as error:  # torch and detectron2 raise what they like on a foreign state
            what = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
            raise CheckpointError(f"this run can't go on from {file}: {what}.{table}") from error
        if changed:
            self.logger.warning(f"This run goes on with other settings:\n{as_table(changed)}")
        self.resumed_from = file

    def _check_processes(self, file: str, kept: Mapping[str, Any]) -> None:
        then, now = kept["processes"], comm.get_world_size()
        if self._cfg.SOLVER.REFERENCE_WORLD_SIZE and then != now:
            raise CheckpointError(
                f"{file} is of {then} processes, and this run has {now}: with "
                "SOLVER.REFERENCE_WORLD_SIZE a step is not worth the same in both, so the steps "
                f"that are done can't be counted. Go on with {then} processes, or set it to 0, "
                "with a batch, a learning rate and a schedule for this number"
            )

    def last_good(self) -> str:
        """The best checkpoint in the folder that can be read, or ""."""
        return self._choose()[0]

    def _choose(self) -> Tuple[str, Mapping[str, Any], List[str]]:
        """The best checkpoint that can be read, its content, and what is wrong with others: the one
        that ``last_checkpoint`` names, or else the one of the most iterations."""
        tagged = self.get_checkpoint_file()
        others = [file for file in find_checkpoints(self.save_dir) if file != tagged]
        best, content, problems = "", {}, []
        for file in [tagged, *others] if tagged else others:
            if best and (best == tagged or number_of(file) <= content["iteration"]):
                break
            found, fault = self._read(file)
            if fault:
                problems.append(fault)
            elif not best or found["iteration"] > content["iteration"]:
                best, content = file, found
        return best, content, problems

    def _read(self, file: str) -> Tuple[Mapping[str, Any], str]:
        """What a checkpoint holds, and why no run can go on from it, or ""."""
        try:
            content = load_weights(file)
        except (OSError, ValueError) as error:
            return {}, str(error)
        if not is_state_dict(content.get("model")) or not content["model"]:
            return {}, f"{file}: there are no weights in it"
        lacking = [k for k in ("iteration", *self.checkpointables) if k not in content]
        if lacking or not isinstance(content["iteration"], int):
            what = ", ".join(map(repr, lacking)) or "a number of 'iteration'"
            return {}, f"{file}: weights without the state of a training: it lacks {what}"
        return content, ""

    def _not_shared(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"OUTPUT_DIR {os.path.abspath(self.save_dir)} must be one folder, which all machines "
            f"share: {what}"
        )


def _free(folder: str) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free >> 20} MiB are free there)"
    except OSError:  # the folder is gone
        return ""
