"""The weights that were best by a metric of the evaluations in between."""

import os
from typing import Callable, Mapping

import torch
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils.file_io import PathManager

from ..weights.reading import load_weights
from .checkpointer import SafeCheckpointer

_NAME = "model_best"


class BestWeights(BestCheckpointer):
    """Keeps the weights with the largest value of a metric in ``model_best.pth``.

    detectron2's hook forgets the best value when a run is resumed, and lets the run be resumed from
    the best checkpoint in place of the last. Here the file holds weights alone, and their value.

    Put it after the evaluations, in the main process.
    """

    def __init__(
        self,
        period: int,
        checkpointer: SafeCheckpointer,
        metric: str,
        weights: Callable[[], Mapping[str, torch.Tensor]],
    ):
        """
        Args:
            period: of the evaluations.
            checkpointer: writes the file.
            metric: name of the metric in the EventStorage.
            weights: gives those that the metric is of.
        """
        super().__init__(period, self, metric, file_prefix=_NAME)
        self._writer, self._metric, self._weights = checkpointer, metric, weights

    def before_train(self) -> None:
        path = os.path.join(self._writer.save_dir, f"{_NAME}.pth")
        if self.trainer.start_iter == 0 or not PathManager.isfile(path):
            return
        kept = load_weights(path).get("best", {})
        if kept.get("metric") == self._metric:
            self._update_best(kept["value"], kept["iteration"])

    def save(self, name: str, iteration: int) -> None:
        """What the parent takes for its checkpointer's."""
        value = self.trainer.storage.latest()[self._metric][0]
        best = {"metric": self._metric, "value": float(value), "iteration": iteration}
        last = min(iteration, self.trainer.max_iter - 1)  # the final evaluation counts one more
        self._writer.save_weights(name, self._weights(), iteration=last, best=best)
