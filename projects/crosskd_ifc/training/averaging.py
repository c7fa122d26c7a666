"""An exponential moving average of a model's weights, evaluated and saved beside them."""

import contextlib
import logging
import os
from typing import Any, Callable, Dict

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..modeling.student import Student, adapter_prefixes, unwrap

logger = logging.getLogger(__name__)


class WeightAverage(HookBase):
    """Averages parameters and buffers after each step; checkpoints hold the average, and
    ``model_final_ema.pth`` beside ``model_final.pth`` is the averaged detector alone.

    Put it before the hook that writes checkpoints, in every process.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: the detector, or a DDP wrapper around it.
            decay: a <- decay * a + (1 - decay) * w after each step; a is w after the first one.
        """
        model = unwrap(model)
        alone = model.without_teacher() if isinstance(model, Student) else contextlib.nullcontext()
        with alone:
            self._average = AveragedModel(
                model, multi_avg_fn=_moving_average(decay), use_buffers=True
            )
        self._average.requires_grad_(False).eval()

    def after_step(self) -> None:
        self._average.update_parameters(unwrap(self.trainer.model))

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            iteration = self.trainer.max_iter - 1
            self.trainer.checkpointer.save_weights(
                "model_final_ema", self.weights(), iteration=iteration
            )

    def weights(self) -> Dict[str, torch.Tensor]:
        """The averaged detector's, with detectron2's keys, without adapters."""
        model = self._average.module
        more = adapter_prefixes(model)
        return {k: v for k, v in model.state_dict().items() if not k.startswith(more)}

    def evaluate(self) -> Dict[str, Any]:
        """The trainer's evaluation of the average, below "ema"; call it in every process."""
        logger.info("Evaluating the average of the weights (SOLVER.EMA_DECAY)")
        cfg = self.trainer.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
        results = self.trainer.test(cfg, self._average.module)
        return {"ema": results} if results else {}

    def state_dict(self) -> Dict[str, torch.Tensor]:
        return self._average.state_dict()

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        """
        Raises:
            ValueError: if it is another model's.
        """
        try:
            self._average.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"its average of the weights doesn't fit: {error}") from error


def _moving_average(decay: float) -> Callable[..., None]:
    """torch's, which rounds the means of whole numbers down; these are taken as they are now."""
    average = get_ema_multi_avg_fn(decay)

    def update(averages, values, count):  # lists of tensors of one type
        if averages[0].is_floating_point():
            average(averages, values, count)
        else:
            for mean, value in zip(averages, values):
                mean.copy_(value)

    return update
