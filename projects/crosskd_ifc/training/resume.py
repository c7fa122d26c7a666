"""What a checkpoint needs, beyond detectron2's, for a run to go on as if it had never stopped."""

import hashlib
import logging
from typing import Any, Dict, Iterator, List, Mapping, Optional

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..common.random_state import get_random_state, set_random_state
from ..config import ConfigError
from ..modeling.student import unwrap

logger = logging.getLogger(__name__)

# A dense detector's moving average of positives, which detectron2 keeps outside the state dict.
_NORMALIZER = "loss_normalizer"
# Digest of a teacher: what it is of, in an error.
_DIGESTS = {
    "teacher": "weights",
    "teacher_inputs": "INPUT.FORMAT, PIXEL_MEAN, PIXEL_STD or anchors",
}


class ResumeState(HookBase):
    """Keeps in each checkpoint the random state of every process, the place in the training data, a
    dense detector's normalizer and digests of the teacher; goes on from them.

    Put it directly before the hook that writes checkpoints, in every process.
    """

    def __init__(self, *periods: int):
        """
        Args:
            periods: the states of all processes are gathered every so many iterations, for each
                number above 0, and in the last one.
        """
        self._periods = [p for p in periods if p > 0]
        self._found: Optional[Dict[str, Any]] = None  # in the checkpoint that was loaded
        self._gathered: Dict[str, Any] = {}
        self._first_batch = 0  # of the stream, at start_iter
        self._digests: Dict[str, str] = {}

    def before_train(self) -> None:
        self._teacher_digests()  # before a forward fills buffers that are caches

    def before_step(self) -> None:
        if self._found is None:
            return
        found, self._found = self._found, None
        states = found["random"]
        if len(states) == comm.get_world_size() and states[comm.get_rank()] is not None:
            state = states[comm.get_rank()]
            set_random_state(state, self._device)
            self._set_normalizer(state.get(_NORMALIZER))
        else:
            logger.warning(
                f"The checkpoint holds random states of other processes (of {len(states)}, now "
                f"{comm.get_world_size()}): this run goes on with other random numbers than one "
                "that was never interrupted"
            )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(done % p == 0 for p in self._periods):
            self.gather()

    def gather(self) -> None:
        """Collect the state of all processes, for a checkpoint after this iteration; call it in
        every process."""
        states = comm.gather(_plain(self._process_state()))
        self._gathered = {"iteration": self.trainer.iter, "random": states}

    def set_random_state(self, iteration: int, state: Dict[str, Any]) -> None:
        """What this process had after ``iteration``, for a checkpoint out of turn."""
        states: List[Optional[Dict[str, Any]]] = [None] * comm.get_world_size()
        states[comm.get_rank()] = _plain(state)
        self._gathered = {"iteration": iteration, "random": states}

    def state_dict(self) -> Dict[str, Any]:
        iteration, student = self.trainer.iter, unwrap(self.trainer.model)
        if self._gathered.get("iteration") != iteration:
            self.set_random_state(iteration, self._process_state())
        normalizer = getattr(student, _NORMALIZER, None)
        stream = self._stream()
        return {
            "random": self._gathered["random"],
            "num_batches": self._first_batch + iteration + 1 - self.trainer.start_iter,
            "stream": None if stream is None else stream.state_dict(),
            _NORMALIZER: None if normalizer is None else float(normalizer),
            **self._teacher_digests(),
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: if the teacher isn't the one that the run started with.
        """
        for key, ours in self._teacher_digests().items():
            if ours and state.get(key, "") not in ("", ours):
                raise ConfigError(
                    f"MODEL.CROSSKD.TEACHER: its {_DIGESTS[key]} are not those that this run "
                    "started with; give the same teacher, or start anew without --resume in "
                    "another OUTPUT_DIR"
                )
        self._set_normalizer(state[_NORMALIZER])
        stream = self._stream()
        if stream is None:
            logger.info("The training data starts anew: its loader has no numbered stream")
        elif not state["stream"]:
            logger.warning("The training data starts anew: the checkpoint doesn't say its place")
        elif stream.enter(state["stream"], state["num_batches"]):
            self._first_batch = state["num_batches"]
        else:
            logger.warning(
                "The training data starts anew: the number of images, of processes or of images "
                f"per process has changed, from {state['stream']} to {stream.state_dict()}"
            )
        self._found = state

    def before(self) -> Dict[str, Any]:
        """What a step changes before its losses are known, for :meth:`set_back`: this process's
        random state, the normalizer, statistics of BatchNorm."""
        student = unwrap(self.trainer.model)
        statistics = [x.clone() for x in _batch_statistics(student)]
        return {"process": self._process_state(), "statistics": statistics}

    def set_back(self, iteration: int, before: Dict[str, Any]) -> None:
        """To what :meth:`before` gave after ``iteration``, for a checkpoint out of turn."""
        student = unwrap(self.trainer.model)
        self._set_normalizer(before["process"][_NORMALIZER])
        for buffer, value in zip(_batch_statistics(student), before["statistics"]):
            buffer.copy_(value)
        self.set_random_state(iteration, before["process"])

    def _process_state(self) -> Dict[str, Any]:
        """The random state of this process, and its normalizer: each process has its own."""
        normalizer = getattr(unwrap(self.trainer.model), _NORMALIZER, None)
        return {**get_random_state(self._device), _NORMALIZER: normalizer}

    def _set_normalizer(self, value: Any) -> None:
        if value is not None:
            setattr(unwrap(self.trainer.model), _NORMALIZER, value)

    @property
    def _device(self) -> torch.device:
        return next(unwrap(self.trainer.model).parameters()).device

    def _stream(self):
        return getattr(self.trainer._trainer.data_loader, "stream", None)

    def _teacher_digests(self) -> Dict[str, str]:
        """Of all tensors of each teacher, and of what it makes of its images and isn't among its
        weights; "" without one. They are frozen, so once is enough."""
        if not self._digests:
            teachers = getattr(unwrap(self.trainer.model), "teachers", ())
            weights = [digest(x.model.state_dict()) for x in teachers]
            inputs = [f"{x.input_format} {digest(dict(x.model.named_buffers()))}" for x in teachers]
            self._digests = dict(zip(_DIGESTS, (" ".join(weights), " ".join(inputs))))
        return self._digests


def _plain(state: Dict[str, Any]) -> Dict[str, Any]:
    """A state of a process with a number in place of a tensor, which waits for the GPU."""
    value = state[_NORMALIZER]
    return {**state, _NORMALIZER: None if value is None else float(value)}


def _batch_statistics(model: nn.Module) -> Iterator[torch.Tensor]:
    """Buffers of BatchNorm layers that a training forward changes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            yield from module.buffers(recurse=False)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A SHA-256 of names and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
