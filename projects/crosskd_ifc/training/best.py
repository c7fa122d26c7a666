"""The weights that were best by a metric of the evaluations in between."""

import logging
import os
from typing import Any, Callable, Mapping, Sequence

import torch
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils.file_io import PathManager

from ..weights.reading import load_weights
from .checkpointer import SafeCheckpointer

logger = logging.getLogger(__name__)

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
        tested_on: Sequence[Any] = (),
    ):
        """
        Args:
            period: of the evaluations.
            checkpointer: writes the file.
            metric: name of the metric in the EventStorage.
            weights: gives those that the metric is of.
            tested_on: plain values, the test sets and image sizes; a resumed run that has others
                begins to compare anew.
        """
        super().__init__(period, self, metric, file_prefix=_NAME)
        self._writer, self._metric, self._weights = checkpointer, metric, weights
        self._tested_on = list(tested_on)

    def before_train(self) -> None:
        path = os.path.join(self._writer.save_dir, f"{_NAME}.pth")
        if self.trainer.start_iter == 0 or not PathManager.isfile(path):
            return
        kept = load_weights(path).get("best", {})
        if kept.get("tested_on", self._tested_on) != self._tested_on:
            logger.warning(
                f"{path} was best on {kept['tested_on']}, and this run tests on {self._tested_on}: "
                "the next evaluation replaces it"
            )
        elif kept.get("metric") == self._metric:
            self._update_best(kept["value"], kept["iteration"])

    def save(self, name: str, iteration: int) -> None:
        """What the parent takes for its checkpointer's."""
        value = self.trainer.storage.latest()[self._metric][0]
        best = {"metric": self._metric, "value": float(value), "iteration": iteration}
        best["tested_on"] = self._tested_on
        last = min(iteration, self.trainer.max_iter - 1)  # the final evaluation counts one more
        self._writer.save_weights(name, self._weights(), iteration=last, best=best)
