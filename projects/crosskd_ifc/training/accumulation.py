"""Gradient accumulation: the images of a step run in parts, one after the other, for less memory.

A step stays a step: schedules, checkpoints and the place in the training data count as without it.
"""

import contextlib
from typing import Any, Dict, Iterator, List

import torch
from detectron2.engine import SimpleTrainer

from ..config import ConfigError


@contextlib.contextmanager
def accumulating(trainer: SimpleTrainer, parts: int) -> Iterator[None]:
    """Within this context, ``trainer.run_step`` runs its batch in equal parts; losses and gradient
    are the mean of theirs.

    That is the whole batch's gradient where each image has its share in a loss, whatever the others
    hold; ``docs/training.md`` says which losses are so.

    Args:
        trainer: detectron2's; an ``AMPTrainer``, too.
        parts: their number; divides that of the images. 1 changes nothing.
    """
    if parts == 1:
        yield
        return
    model = trainer.model
    # The gradients of the first parts must outlive the last one's forward.
    trainer.model, trainer.zero_grad_before_forward = _InParts(trainer, parts), True
    try:
        yield
    finally:
        trainer.model = model


class _InParts:
    """A model that runs a training batch in parts, with a backward pass for each but the last; the
    trainer's own completes the gradient."""

    training = True

    def __init__(self, trainer: SimpleTrainer, parts: int):
        self._model, self._parts = trainer.model, parts
        self._scaler = getattr(trainer, "grad_scaler", None)

    def __call__(self, batch: List[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
        size, rest = divmod(len(batch), self._parts)
        if rest:
            raise ConfigError(
                f"SOLVER.ACCUMULATE is {self._parts}, which doesn't divide the {len(batch)} images "
                "that the loader gives a process in a step"
            )
        *first, last = (batch[i : i + size] for i in range(0, len(batch), size))
        done: Dict[str, torch.Tensor] = {}
        for part in first:
            # DDP adds up the gradients of all processes once, in the trainer's backward.
            with getattr(self._model, "no_sync", contextlib.nullcontext)():
                losses = self._losses(part)
                self._backward(sum(losses.values()))
            done = {k: v.detach() + done.get(k, 0.0) for k, v in losses.items()}
        return {k: v + done.get(k, 0.0) for k, v in self._losses(last).items()}

    def _losses(self, part: List[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
        return {k: v / self._parts for k, v in self._model(part).items()}

    def _backward(self, loss: torch.Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        torch.clear_autocast_cache()  # its casts of the weights belong to the graph that is gone
