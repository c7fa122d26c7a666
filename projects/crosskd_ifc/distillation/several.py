"""Distillation from several teachers at once, or in turn by chance."""

import contextlib
from typing import ContextManager, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from .distiller import Distiller, add_losses, recorded
from .traces import StepTrace


class SeveralTeachers:
    """A :class:`Distiller` made of one for each teacher, all on one forward of the student.

    ``mean``: the sum of their losses, each with an n-th of the schedule's factor. ``one``: the
    losses of a single teacher, drawn from seed and iteration alone: a resumed run and all
    processes draw the same. The others aren't run; what is learned for them gets gradients of 0.

    What looks at one teacher and its cross-head finds the first one's. Statistics of teacher i > 1
    are called ``teacher_i/crosskd/...``.
    """

    def __init__(self, distillers: Sequence[Distiller], *, loss: str, seed: int = 0):
        """
        Args:
            distillers: two or more.
            loss: "mean" or "one".
            seed: of the draws, the same in all processes.
        """
        self.distillers, self._loss, self._seed = list(distillers), loss, seed
        first = self.distillers[0]
        self.teacher, self.box, self.has_cross_head = first.teacher, first.box, first.has_cross_head
        self.fusion, self.detect = first.fusion, first.detect

    @property
    def learned(self) -> Optional[nn.Module]:
        """The module with all learned parameters, those for teacher i under ``teacher_i``."""
        found = {f"teacher_{i}": d.learned for i, d in enumerate(self.distillers, 1)}
        found = {name: module for name, module in found.items() if module is not None}
        return nn.ModuleDict(found) if found else None

    @contextlib.contextmanager
    def recording(
        self, student: nn.Module, batched_inputs: List[Dict[str, torch.Tensor]], factor: float
    ) -> Iterator[List[StepTrace]]:
        """As of :class:`Distiller`; yields a step for each teacher."""
        factors = self._factors(factor)
        steps = [d.start(batched_inputs, x) for d, x in zip(self.distillers, factors)]
        with recorded(student, steps), contextlib.ExitStack() as stack:
            for distiller, step in zip(self.distillers, steps):
                stack.enter_context(distiller.joining(student, step))
            yield steps

    def losses(self, steps: List[StepTrace]) -> Dict[str, torch.Tensor]:
        """As of :class:`Distiller`, of all teachers together."""
        found = []
        for i, (distiller, step) in enumerate(zip(self.distillers, steps), 1):
            with _named(i):
                found.append(distiller.losses(step))
        return add_losses(found)

    def _factors(self, factor: float) -> List[float]:
        n = len(self.distillers)
        if self._loss == "mean":
            return [factor / n] * n
        drawn = np.random.default_rng((self._seed, get_event_storage().iter)).integers(n)
        return [factor if i == drawn else 0.0 for i in range(n)]


def _named(i: int) -> ContextManager[None]:
    """Statistics of teacher i under its name; the first's have none."""
    return get_event_storage().name_scope(f"teacher_{i}") if i > 1 else contextlib.nullcontext()
