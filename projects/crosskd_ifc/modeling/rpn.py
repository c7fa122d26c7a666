"""A region proposal network that can mimic the teacher's."""

import contextlib
import functools
import operator
from typing import Dict, Iterator, List, Tuple

import torch
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes

from ..distillation.traces import StepTrace
from ..distillation.two_stage.rpn import RPNMimic


@PROPOSAL_GENERATOR_REGISTRY.register()
class CrossKDRPN(RPN):
    """``RPN`` whose losses can include mimicking; without that it is its parent, bit for bit."""

    _mimics: Tuple[Tuple[RPNMimic, StepTrace], ...] = ()

    @contextlib.contextmanager
    def mimicking(self, mimic: RPNMimic, step: StepTrace) -> Iterator[None]:
        """Within this context :meth:`losses` adds ``loss_rpn_kd``, the sum where contexts are
        nested."""
        before, self._mimics = self._mimics, (*self._mimics, (mimic, step))
        try:
            yield
        finally:
            self._mimics = before

    @torch.jit.unused
    def losses(
        self,
        anchors: List[Boxes],
        pred_objectness_logits: List[torch.Tensor],
        gt_labels: List[torch.Tensor],
        pred_anchor_deltas: List[torch.Tensor],
        gt_boxes: List[torch.Tensor],
    ) -> Dict[str, torch.Tensor]:
        """The parent's losses and, within :meth:`mimicking`, ``loss_rpn_kd``; arguments as
        there."""
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        if self._mimics:
            found = (pred_objectness_logits, pred_anchor_deltas, gt_labels)
            terms = [m.loss(step, *found, self.batch_size_per_image) for m, step in self._mimics]
            losses["loss_rpn_kd"] = functools.reduce(operator.add, terms)
        return losses
