"""Distillation of dense detectors.

Shape shorthand: N images, A anchors per position, K foreground classes, C channels, (Hi, Wi) size
of level i with Pi = Hi Wi positions, R anchors of an image over all levels.
"""

from typing import Callable, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes
from torch import nn

from .. import losses as L
from ..compatibility.class_map import ClassMap
from ..compatibility.dense import build_fusions
from ..loss_types.boxes import BOX_LOSS_REGISTRY, needs_gap, score_gap
from ..teacher import Teacher, TeacherPass
from ..traces import DensePredictions, DenseTrace, StepTrace, put_scalars
from .box_heads import DenseCrossHead, DenseStudentHead, DenseTeacher, DenseTerm


def by_anchor(levels: List[torch.Tensor]) -> torch.Tensor:
    """For each level (N, Pi, A, ...) -> (N, R, ...), in the order of the anchors."""
    return cat([x.flatten(1, 2) for x in levels], dim=1)


class DenseBoxDistiller:
    """The losses ``loss_cls_kd`` and ``loss_box_reg_kd``, CrossKD's for dense heads (Wang et al.,
    2024)."""

    keys = ("loss_cls_kd", "loss_box_reg_kd")

    @configurable
    def __init__(
        self,
        *,
        teacher: DenseTeacher,
        mimic,
        class_map: Optional[ClassMap],
        normalizer: Callable[[DenseTrace], torch.Tensor],
        cls_weight: float,
        box_weight: float,
        box_type: str,
    ):
        """
        Args:
            teacher: a RetinaNet's or FCOS's.
            mimic: a :class:`DenseCrossHead` or :class:`DenseStudentHead`.
            class_map: for statistics; None if the teacher has other classes.
            normalizer: gives the divisor of both losses, a scalar of at least 1.
            cls_weight: of the quality focal loss.
            box_weight, box_type: of the box loss, one of ``BOX_LOSS_REGISTRY``.
        """
        self.teacher, self.mimic = teacher, mimic
        self.fusion: Optional[nn.Module] = mimic.fusion
        self.cls_weight, self.box_weight = cls_weight, box_weight
        self._box_loss, self._needs_gap = BOX_LOSS_REGISTRY.get(box_type), needs_gap(box_type)
        self._class_map, self._normalizer = class_map, normalizer

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student: DenseDetector,
        teacher: Teacher,
        class_map: Optional[ClassMap],
        *,
        own_predictions: bool,
    ):
        kd = cfg.MODEL.CROSSKD
        theirs = DenseTeacher(teacher)
        if own_predictions:
            mimic = DenseStudentHead(student, class_map)
        else:
            fusions = build_fusions(cfg, student, teacher)
            mimic = DenseCrossHead(theirs, nn.ModuleDict(fusions))
        return {
            "teacher": theirs,
            "mimic": mimic,
            "class_map": class_map,
            "normalizer": student.kd_normalizer,
            "cls_weight": kd.LOSS.CLS_WEIGHT,
            "box_weight": kd.LOSS.BOX_WEIGHT,
            "box_type": kd.LOSS.BOX_TYPE or student.kd_box_type,
        }

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted losses of one step, scalars; with both weights 0 nothing is computed."""
        trace = step.heads
        if self.cls_weight == self.box_weight == 0:
            return {key: self.zero(trace) for key in self.keys}
        entries, predictions = step.teacher.once("dense", lambda: self.run_teacher(step.teacher))
        targets = self.teacher.by_level(predictions)
        terms, wanted = self.mimic.terms(trace, entries), self.mimic.targets(targets)
        valid = trace.valid  # NxR
        loss_cls, loss_box = self._compare(terms, wanted, trace, valid)
        if step.log:
            self._log(terms, targets, trace, valid)
        # The terms may leave out some learned parameters, and DDP wants a gradient for each.
        return {
            "loss_cls_kd": loss_cls * self.cls_weight + self.zero(trace),
            "loss_box_reg_kd": loss_box * self.box_weight,
        }

    def _compare(
        self,
        terms: List[DenseTerm],
        wanted: DensePredictions,
        trace: DenseTrace,
        valid: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Both losses, the weighted sums over the terms."""
        normalizer = self._normalizer(trace)
        sizes = [x.shape[1:3] for x in wanted.logits]
        weights = valid.split([a * b for a, b in sizes], dim=1)
        best = by_anchor([x.amax(dim=3) for x in wanted.logits])  # NxR
        confidence = L.at_least_float32(best).sigmoid().flatten()
        anchors = Boxes.cat(trace.anchors).tensor.repeat(len(valid), 1)  # NRx4

        def decode(x: DensePredictions, transform) -> torch.Tensor:
            deltas = L.at_least_float32(by_anchor(x.deltas)).flatten(0, 1)
            return transform.apply_deltas(deltas, anchors)

        wanted_boxes = decode(wanted, self.teacher.model.box2box_transform)
        # FCOS can answer with an empty box, which has no overlap to learn from.
        counts = valid.flatten() * (Boxes(wanted_boxes).area() > 0)
        loss_cls = loss_box = 0.0
        for found in terms:
            loss_cls = loss_cls + found.weight * sum(
                L.quality_focal(z, t, beta=1.0, weights=w.unflatten(1, size), normalizer=normalizer)
                for z, t, w, size in zip(found.logits, wanted.logits, weights, sizes)
            )
            boxes = decode(found, self.mimic.transform)
            if self._needs_gap:
                gaps = [score_gap(z, t) for z, t in zip(found.logits, wanted.logits)]
                confidence = by_anchor(gaps).flatten()
            loss = self._box_loss(boxes, wanted_boxes, confidence * counts, normalizer=normalizer)
            loss_box = loss_box + found.weight * loss
        return loss_cls, loss_box

    def run_teacher(
        self, teacher: TeacherPass
    ) -> Tuple[Dict[str, List[Optional[torch.Tensor]]], List[List[torch.Tensor]]]:
        """As :meth:`DenseTeacher.run`, keeping the layers that the cross-head enters."""
        return self.teacher.run(teacher, self.mimic.entries)

    def zero(self, trace: DenseTrace) -> torch.Tensor:
        """0, connected to every learned parameter of the fusions."""
        parameters = () if self.fusion is None else self.fusion.parameters()
        return L.connected_zero(trace.anchors[0].tensor.new_zeros(()), parameters)

    @torch.no_grad()
    def _log(
        self,
        terms: List[DenseTerm],
        targets: DensePredictions,
        trace: DenseTrace,
        valid: torch.Tensor,
    ) -> None:
        """Statistics of this step to the EventStorage, over the positions that aren't ignored.

        Agreements are weighted by the teacher's confidence: most positions are plain background.
        """
        confidence, answer = _best_class(targets)
        weight = confidence * valid
        scalars = {"teacher_confidence": _mean(confidence, valid)}
        for term in terms if self.fusion is not None else ():
            p, best = _best_class(term)
            agreement = _mean((best == answer).float(), weight)
            if term.name == "combined":
                scalars["cross_head_confidence"] = _mean(p, valid)
                scalars["agreement_cross_head"] = agreement
            else:
                scalars[f"agreement_{term.name}"] = agreement
        if self._class_map is not None:
            ours = self._class_map.to_student(answer)
            same = (ours == _best_class(trace.own)[1]).float()
            scalars["agreement_student"] = _mean(same, weight)
            positive = (trace.labels >= 0) & (trace.labels < self._class_map.num_classes)
            if positive.any():
                wrong = (ours[positive] != trace.labels[positive]).float().mean()
                scalars["disagreement_truth_foreground"] = wrong.item()
        put_scalars(scalars)


def _best_class(predictions: DensePredictions) -> Tuple[torch.Tensor, torch.Tensor]:
    """The largest class probability (N, R) and its class."""
    logits, classes = zip(*(x.max(dim=3) for x in predictions.logits))
    return by_anchor(logits).float().sigmoid(), by_anchor(classes)


def _mean(x: torch.Tensor, weights: torch.Tensor) -> float:
    return ((x * weights).sum() / weights.sum().clamp(min=L.EPS)).item()
