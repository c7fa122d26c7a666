"""Distillation of the box branch.

Shape shorthand: N images, R RoIs over all images, K the teacher's foreground classes (background is
column K), D width of a fully connected layer, C channels, (P, P) pooler resolution.
"""

import dataclasses
from typing import Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from ..config import ConfigError
from . import losses as L
from .compatibility.class_map import ClassMap
from .compatibility.two_stage import build_fusion
from .fusion import FeatureFusion
from .head_layers import BoxHeadLayers
from .loss_types.classification import ClsLoss
from .teacher import Teacher, TeacherPass
from .traces import HeadTrace, StepTrace, put_scalars


@dataclasses.dataclass
class BoxPredictions:
    """Class logits (R, K + 1) and box deltas (R, 4K) or (R, 4)."""

    logits: torch.Tensor
    deltas: torch.Tensor


@dataclasses.dataclass
class Term(BoxPredictions):
    """Predictions that are compared with the teacher's; of a cross-head also the feature that they
    come from, shaped as the teacher's at the entry layer.

    Attributes:
        name: "combined" or a tap; "" for the student's own.
        weight: of its losses.
    """

    name: str = ""
    weight: float = 1.0
    feature: Optional[torch.Tensor] = None


class CrossHead:
    """Cross-head predictions: the student's combined taps, or taps by themselves, through the
    teacher's remaining layers and predictor.

    The gradient flows through the frozen layers into the taps and adapters. All predictions are in
    the teacher's classes.
    """

    def __init__(self, teacher: Teacher, fusion: FeatureFusion):
        pooler = teacher.model.roi_heads.box_pooler
        self.fusion = fusion
        self._layers = BoxHeadLayers(teacher.box_head, pooler.output_size)
        self._predictor = teacher.box_predictor
        self.transform = teacher.box_predictor.box2box_transform

    def predict(self, trace: HeadTrace, teacher: Mapping[str, torch.Tensor]) -> BoxPredictions:
        """From the combined feature.

        Args:
            trace: of the student's heads.
            teacher: layer name -> output of the teacher's box head on the same RoIs.
        """
        entry = self.fusion.entry
        fused = self.fusion(trace.layers, teacher[entry], self._layers.run)
        return BoxPredictions(*self._predictor(self._layers.run(fused, after=entry)))

    def terms(self, trace: HeadTrace, teacher: Mapping[str, torch.Tensor]) -> List[Term]:
        """What is compared with the teacher; arguments as of :meth:`predict`.

        All go through the teacher's remaining layers as one batch of rows.
        """
        entry, weights = self.fusion.entry, self.fusion.terms
        features = self.fusion.features(trace.layers, teacher[entry], self._layers.run)
        rows = torch.cat(features) if len(features) > 1 else features[0]
        predictions = self._predictor(self._layers.run(rows, after=entry))
        parts = (x.split(len(features[0])) if len(features) > 1 else [x] for x in predictions)
        return [
            Term(logits, deltas, name, weights[name], feature)
            for name, feature, logits, deltas in zip(weights, features, *parts)
        ]

    def targets(self, predictions: BoxPredictions) -> BoxPredictions:
        """What the predictions are compared with: the teacher's own."""
        return predictions


class StudentHead:
    """The student's own predictions, compared class by class (prediction mimicking)."""

    fusion = None

    def __init__(self, student: GeneralizedRCNN, class_map: ClassMap):
        self._class_map = class_map
        self.transform = student.roi_heads.box_predictor.box2box_transform

    def terms(self, trace: HeadTrace, teacher: Mapping[str, torch.Tensor]) -> List[Term]:
        """The student's predictions for the classes that have a teacher class."""
        m = self._class_map
        return [Term(m.student_logits(trace.logits), m.student_deltas(trace.deltas))]

    def targets(self, predictions: BoxPredictions) -> BoxPredictions:
        """The teacher's predictions in these classes."""
        m = self._class_map
        return BoxPredictions(
            m.teacher_logits(predictions.logits), m.teacher_deltas(predictions.deltas)
        )


class BoxDistiller:
    """The losses ``loss_cls_kd`` and ``loss_box_reg_kd``."""

    keys = ("loss_cls_kd", "loss_box_reg_kd")

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        mimic,
        class_map: Optional[ClassMap],
        student_has_softmax: bool,
        cls_weight: float,
        cls_loss: ClsLoss,
        box_weight: float,
        box_type: str,
    ):
        """
        Args:
            teacher: a :class:`GeneralizedRCNN` whose box head has known layers.
            mimic: a :class:`CrossHead` or :class:`StudentHead`.
            class_map: for statistics; None if the teacher has other classes.
            student_has_softmax: its best class can be read from its logits; for statistics.
            cls_weight, cls_loss: of the classification loss.
            box_weight, box_type: of the box loss, "l1" or "giou".
        """
        self.teacher = teacher
        self.mimic = mimic
        self.fusion: Optional[FeatureFusion] = mimic.fusion
        self.cls_weight, self._cls_loss = cls_weight, cls_loss
        self.box_weight = box_weight
        self._box_loss = {"l1": self._box_l1, "giou": self._box_giou}[box_type]
        self._class_map, self._student_has_softmax = class_map, student_has_softmax
        pooler = teacher.model.roi_heads.box_pooler
        self._layers = BoxHeadLayers(teacher.box_head, pooler.output_size)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student: GeneralizedRCNN,
        teacher: Teacher,
        class_map: Optional[ClassMap],
        *,
        own_predictions: bool,
    ):
        kd = cfg.MODEL.CROSSKD
        box_type = kd.LOSS.BOX_TYPE or "l1"
        if box_type == "iou":
            raise ConfigError(
                "MODEL.CROSSKD.LOSS.BOX_TYPE 'iou' is for dense detectors; possible values here: "
                "'l1', 'giou'"
            )
        if own_predictions:
            if box_type == "l1" and kd.LOSS.BOX_WEIGHT > 0:
                _check_same_deltas(student, teacher)
            mimic = StudentHead(student, class_map)
        else:
            mimic = CrossHead(teacher, build_fusion(kd, student, teacher))
        return {
            "teacher": teacher,
            "mimic": mimic,
            "class_map": class_map,
            "student_has_softmax": not student.roi_heads.box_predictor.use_sigmoid_ce,
            "cls_weight": kd.LOSS.CLS_WEIGHT,
            "cls_loss": ClsLoss(kd.LOSS),
            "box_weight": kd.LOSS.BOX_WEIGHT,
            "box_type": box_type,
        }

    @property
    def is_active(self) -> bool:
        """Whether a loss has a weight."""
        return self.cls_weight > 0 or self.box_weight > 0

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted losses of one step, scalars; with both weights 0 nothing is computed."""
        trace = step.heads
        if not self.is_active:
            return {key: self.zero(trace) for key in self.keys}
        targets, layers = step.teacher.once("box", lambda: self.predict(step.teacher, trace.boxes))
        terms, wanted = self.mimic.terms(trace, layers), self.mimic.targets(targets)
        loss_cls = sum(
            x.weight * self._cls_loss(x.logits, wanted.logits, lambda: self._truth(trace))
            for x in terms
        )
        loss_box = sum(x.weight * self._box_loss(x, wanted, trace.boxes) for x in terms)
        if self.fusion is not None and not self.fusion.reaches_all:
            loss_cls = loss_cls + self.zero(trace)
        if step.log:
            self._log(terms, targets, trace, layers)
        return {
            "loss_cls_kd": loss_cls * self.cls_weight,
            "loss_box_reg_kd": loss_box * self.box_weight,
        }

    def zero(self, trace: HeadTrace) -> torch.Tensor:
        """0, connected to every learned parameter of the fusion."""
        zero = None if self.fusion is None else self.fusion.connected_zero()
        return trace.logits.new_zeros(()) if zero is None else zero

    def predict(
        self, teacher: TeacherPass, boxes: List[Boxes]
    ) -> Tuple[BoxPredictions, Dict[str, torch.Tensor]]:
        """The teacher's own predictions and box-head layers for the given boxes; no gradient.

        Args:
            teacher: on the batch.
            boxes: per image, absolute pixels of the student's input.
        """
        heads, features = self.teacher.model.roi_heads, teacher.features
        with teacher.running():
            pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
            layers = self._layers.trace(pooled)
            return BoxPredictions(*self.teacher.box_predictor(layers[self._layers.last])), layers

    def detect(self, teacher: TeacherPass, trace: HeadTrace) -> List[Instances]:
        """The detections per image of the predictions that learn, in the network's pixels."""
        _, layers = self.predict(teacher, trace.boxes)
        found = self.mimic.predict(trace, layers)
        predictor = self.teacher.box_predictor
        return predictor.inference((found.logits, found.deltas), trace.proposals)[0]

    def _truth(self, trace: HeadTrace) -> torch.Tensor:
        """The ground truth of the RoIs (R,), as columns of the logits that are compared."""
        classes = torch.cat([p.gt_classes for p in trace.proposals])
        if self.fusion is None:
            return self._class_map.to_column(classes)
        # MASKED, -1, becomes background.
        return self._class_map.to_teacher(classes) % (self._class_map.num_teacher_classes + 1)

    def _box_l1(self, found: BoxPredictions, wanted: BoxPredictions, boxes: List[Boxes]):
        return L.confident_l1(found.deltas, wanted.deltas, wanted.logits)

    def _box_giou(self, found: BoxPredictions, wanted: BoxPredictions, boxes: List[Boxes]):
        confidence, classes = L.teacher_confidence(wanted.logits)
        anchors = Boxes.cat(boxes).tensor
        theirs = self.teacher.box_predictor.box2box_transform
        decoded = (
            transform.apply_deltas(L.at_least_float32(L.select_class_boxes(x, classes)), anchors)
            for x, transform in ((found.deltas, self.mimic.transform), (wanted.deltas, theirs))
        )
        return L.confident_giou(*decoded, confidence, normalizer=confidence.sum() + L.EPS)

    @torch.no_grad()
    def _log(
        self,
        terms: List[Term],
        targets: BoxPredictions,
        trace: HeadTrace,
        teacher: Mapping[str, torch.Tensor],
    ) -> None:
        """Statistics of this step to the EventStorage."""
        scalars = {"num_rois": float(len(targets.logits))}
        if len(targets.logits):
            answer = targets.logits.argmax(dim=1)
            scalars["teacher_confidence"] = L.teacher_confidence(targets.logits)[0].mean().item()
            for term in terms if self.fusion is not None else ():
                agreement = _share(term.logits.argmax(dim=1), answer)
                if term.name == "combined":
                    scalars["agreement_cross_head"] = agreement
                    scalars.update(_compare(term.feature, teacher[self.fusion.entry]))
                else:
                    scalars[f"agreement_{term.name}"] = agreement
            if self._class_map is not None:
                answer = self._class_map.to_student(answer)
                if self._student_has_softmax:
                    scalars["agreement_student"] = _share(answer, trace.logits.argmax(dim=1))
                truth = torch.cat([p.gt_classes for p in trace.proposals])
                scalars["disagreement_truth"] = 1 - _share(answer, truth)
                positive = truth < self._class_map.num_classes
                if positive.any():
                    wrong = 1 - _share(answer[positive], truth[positive])
                    scalars["disagreement_truth_foreground"] = wrong
        put_scalars(scalars)


def _compare(fused: torch.Tensor, teacher: torch.Tensor) -> Dict[str, float]:
    """How long the combined features are beside the teacher's own, and how alike their direction,
    over the R > 0 RoIs."""
    ours, theirs = (x.flatten(1).float() for x in (fused, teacher))
    length = ours.norm(dim=1).mean() / theirs.norm(dim=1).mean().clamp(min=L.EPS)
    cosine = F.cosine_similarity(ours, theirs, dim=1).mean()
    return {"fused_length": length.item(), "fused_cosine": cosine.item()}


def _share(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of equal elements."""
    return (a == b).float().mean().item()


def _check_same_deltas(student: GeneralizedRCNN, teacher: Teacher) -> None:
    ours, theirs = (
        tuple(m.box_predictor.box2box_transform.weights) for m in (student.roi_heads, teacher)
    )
    if ours != theirs:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.BOX_TYPE 'l1' compares raw deltas, but MODEL.ROI_BOX_HEAD."
            f"BBOX_REG_WEIGHTS is {ours} for the student and {theirs} for the teacher "
            f"({teacher.description}); use 'giou'"
        )
