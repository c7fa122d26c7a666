"""Distillation of dense detectors.

Shape shorthand: N images, K the teacher's foreground classes, R anchors of an image over all
levels.
"""

from typing import Callable, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn

from ..modeling.diagnostics import GradientDiagnostics, pyramid_outputs
from . import losses as L
from .compatibility.class_map import ClassMap
from .compatibility.dense import build_fusions, check_pair, check_settings, towers_of
from .compatibility.two_stage import build_class_map
from .dense_heads import (
    DenseCrossHead,
    DensePredictions,
    DenseStudentHead,
    DenseTeacher,
    DenseTrace,
    by_anchor,
    record_towers,
)
from .distiller import Distiller
from .feature import FeatureDistiller
from .teacher import Teacher
from .traces import Step, TeacherPass, put_scalars


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
            box_weight, box_type: of the box loss, "giou" or "iou".
        """
        self.teacher, self.mimic = teacher, mimic
        self.fusion: Optional[nn.Module] = mimic.fusion
        self.cls_weight, self.box_weight = cls_weight, box_weight
        self._box_loss = {"giou": L.confident_giou, "iou": L.confident_iou}[box_type]
        self._class_map, self._normalizer = class_map, normalizer

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student: DenseDetector,
        teacher: Teacher,
        class_map: Optional[ClassMap],
    ):
        kd = cfg.MODEL.CROSSKD
        theirs = DenseTeacher(teacher)
        if kd.MIMIC == "student_head":
            mimic = DenseStudentHead(student, class_map)
        else:
            fusions = build_fusions(kd.FUSION, student, teacher)
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

    @property
    def is_active(self) -> bool:
        """Whether a loss has a weight."""
        return self.cls_weight > 0 or self.box_weight > 0

    def losses(self, step: Step) -> Dict[str, torch.Tensor]:
        """The weighted losses of one step, scalars; with both weights 0 nothing is computed."""
        trace = step.heads
        if not self.is_active:
            return {key: self.zero(trace) for key in self.keys}
        entries, predictions = self.run_teacher(step.teacher)
        targets = self.teacher.by_level(predictions)
        found, wanted = self.mimic.predict(trace, entries), self.mimic.targets(targets)
        valid = (trace.labels >= 0).to(torch.float32)  # NxR
        normalizer = self._normalizer(trace)
        sizes = [x.shape[1:3] for x in wanted.logits]
        weights = valid.split([a * b for a, b in sizes], dim=1)
        loss_cls = sum(
            L.quality_focal(z, t, beta=1.0, weights=w.unflatten(1, size), normalizer=normalizer)
            for z, t, w, size in zip(found.logits, wanted.logits, weights, sizes)
        )
        best = by_anchor([x.amax(dim=3) for x in wanted.logits])  # NxR
        confidence = L.at_least_float32(best).sigmoid() * valid
        anchors = Boxes.cat(trace.anchors).tensor.repeat(len(valid), 1)  # NRx4
        theirs = self.teacher.model.box2box_transform
        found_boxes, wanted_boxes = (
            transform.apply_deltas(L.at_least_float32(by_anchor(x.deltas)).flatten(0, 1), anchors)
            for x, transform in ((found, self.mimic.transform), (wanted, theirs))
        )
        # FCOS can answer with an empty box, which has no overlap to learn from.
        confidence = confidence.flatten() * (Boxes(wanted_boxes).area() > 0)
        loss_box = self._box_loss(found_boxes, wanted_boxes, confidence, normalizer=normalizer)
        if step.log:
            self._log(found, targets, trace, valid)
        return {
            "loss_cls_kd": loss_cls * self.cls_weight,
            "loss_box_reg_kd": loss_box * self.box_weight,
        }

    def run_teacher(
        self, teacher: TeacherPass
    ) -> Tuple[Dict[str, List[Optional[torch.Tensor]]], List[List[torch.Tensor]]]:
        """As :meth:`DenseTeacher.run`, keeping the layers that the cross-head enters."""
        return self.teacher.run(teacher, self.mimic.entries)

    def zero(self, trace: DenseTrace) -> torch.Tensor:
        """0, connected to every learned parameter of the fusions."""
        return self.mimic.connected_zero(trace)

    @torch.no_grad()
    def _log(
        self,
        found: DensePredictions,
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
        if self.fusion is not None:
            p, best = _best_class(found)
            scalars["cross_head_confidence"] = _mean(p, valid)
            scalars["agreement_cross_head"] = _mean((best == answer).float(), weight)
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


class DenseDistiller(Distiller):
    """The distillation of a RetinaNet or FCOS."""

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: of :class:`Distiller`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DenseDetector, teacher: Teacher):
        kd = cfg.MODEL.CROSSKD
        check_settings(cfg)
        check_pair(student, teacher)
        needed_by = "MODEL.CROSSKD.MIMIC 'student_head'" if kd.MIMIC == "student_head" else ""
        class_map = build_class_map(cfg, student, teacher, needed_by)
        box = DenseBoxDistiller(cfg, student, teacher, class_map)
        has_features = kd.LOSS.FEATURE_WEIGHT > 0
        predictors = student.head.cls_score, student.head.bbox_pred
        return {
            "teacher": teacher,
            "box": box,
            "others": [FeatureDistiller(cfg, student, teacher)] if has_features else [],
            "diagnostics": GradientDiagnostics.build(
                cfg, _shared_parameters(student, box), *predictors
            ),
        }

    def detect(
        self, student: DenseDetector, batched_inputs: List[Dict[str, torch.Tensor]]
    ) -> List[Instances]:
        """What the cross-head detects, per image, in the network's pixels; in evaluation mode."""
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        levels = [features[name] for name in student.head_in_features]
        with record_towers(student.head) as layers:
            student.head(levels)
        theirs, _ = self.box.run_teacher(TeacherPass(self.teacher, batched_inputs))
        found = self.box.mimic.maps(layers, theirs)
        return self.teacher.model.forward_inference(images, levels, found)


def _shared_parameters(student: DenseDetector, box: DenseBoxDistiller) -> List[nn.Parameter]:
    """Of the last layer of each tower that detection and distillation both reach."""
    if not box.is_active:
        return pyramid_outputs(student)
    parameters = []
    for tower, layers in towers_of(student.head).items():
        fusion = None if box.fusion is None else box.fusion[tower]
        deepest = layers.last if fusion is None else max(fusion.taps, key=layers.depth)
        parameters += layers.parameters(deepest)
    return parameters
