"""Two-stage distillation: the student's box-head features through the teacher's box head.

Shape shorthand: N images, R RoIs over all images, K the teacher's foreground classes (background is
column K), D width of a fully connected layer, C channels, (P, P) pooler resolution.
"""

import dataclasses
import functools
import time
from typing import Dict, List, Mapping, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from . import losses as L
from .config import TEACHER_CLASSES, ConfigError
from .cross_head import BoxHeadLayers
from .fusion import FeatureFusion
from .roi_heads import BoxHeadTrace, CrossKDROIHeads
from .teacher import Teacher

# Statistics are read from the device only this often, in the steps that detectron2's writers log.
LOG_PERIOD = 20


@dataclasses.dataclass
class BoxPredictions:
    """Class logits (R, K + 1) and box deltas (R, 4K) or (R, 4) of the teacher's predictor."""

    logits: torch.Tensor
    deltas: torch.Tensor


class BoxDistiller:
    """Cross-head distillation of the box branch."""

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        fusion: FeatureFusion,
        cls_weight: float,
        temperature: float,
        box_weight: float,
        box_type: str,
    ):
        """
        Args:
            teacher: a :class:`GeneralizedRCNN` whose box head has known layers.
            fusion: from the student's layers to the teacher's entry layer.
            cls_weight, temperature: of the classification loss.
            box_weight, box_type: of the box loss, "l1" or "giou".
        """
        self.teacher = teacher
        self.fusion = fusion
        self.cls_weight, self.temperature = cls_weight, temperature
        self.box_weight = box_weight
        self._box_loss = {"l1": self._box_l1, "giou": self._box_giou}[box_type]
        heads = teacher.model.roi_heads
        self._layers = BoxHeadLayers(heads.box_head, heads.box_pooler.output_size)

    @classmethod
    def from_config(cls, cfg: CfgNode, student: GeneralizedRCNN, teacher: Teacher):
        kd = cfg.MODEL.CROSSKD
        _check_student(student)
        _check_teacher(teacher)
        _check_classes(student, teacher, kd.TEACHER)
        return {
            "teacher": teacher,
            "fusion": _build_fusion(kd.FUSION, student, teacher),
            "cls_weight": kd.LOSS.CLS_WEIGHT,
            "temperature": kd.LOSS.TEMPERATURE,
            "box_weight": kd.LOSS.BOX_WEIGHT,
            "box_type": kd.LOSS.BOX_TYPE or "l1",
        }

    def losses(
        self,
        batched_inputs: List[Dict[str, torch.Tensor]],
        trace: BoxHeadTrace,
        factor: float = 1.0,
    ) -> Dict[str, torch.Tensor]:
        """The weighted distillation losses of one step.

        Args:
            batched_inputs: the student's raw images.
            trace: of the student's box head on these images.
            factor: multiplies both losses; with 0 the teacher isn't run.

        Returns:
            ``loss_cls_kd`` and ``loss_box_reg_kd``, scalars.
        """
        log = _is_logging_step()
        if factor == 0:
            zero = self.fusion.connected_zero()
            zero = trace.logits.new_zeros(()) if zero is None else zero
            if log:
                get_event_storage().put_scalar("crosskd/factor", 0.0, smoothing_hint=False)
            return {"loss_cls_kd": zero, "loss_box_reg_kd": zero}

        start = self._clock(log)
        targets, layers = self.predict(batched_inputs, trace.boxes)
        seconds = self._clock(log) - start
        cross = self.cross_head(trace.layers, layers)
        loss_cls = L.kl_divergence(
            cross.logits,
            targets.logits,
            temperature=self.temperature,
            normalizer=max(len(targets.logits), 1),
        )
        loss_box = self._box_loss(cross, targets, trace.boxes)
        if log:
            self._log(cross, targets, trace, seconds, factor)
        return {
            "loss_cls_kd": loss_cls * (self.cls_weight * factor),
            "loss_box_reg_kd": loss_box * (self.box_weight * factor),
        }

    def predict(
        self, batched_inputs: List[Dict[str, torch.Tensor]], boxes: List[Boxes]
    ) -> Tuple[BoxPredictions, Dict[str, torch.Tensor]]:
        """The teacher's own predictions and box-head layers for the given boxes; no gradient.

        Args:
            batched_inputs: N raw images of the student.
            boxes: per image, absolute pixels of the student's input.
        """
        heads = self.teacher.model.roi_heads
        features = self.teacher.features(batched_inputs)
        with self.teacher.autocast():
            pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
            layers = self._layers.trace(pooled)
            return BoxPredictions(*heads.box_predictor(layers[self._layers.last])), layers

    def cross_head(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]
    ) -> BoxPredictions:
        """Cross-head predictions: the student's fused taps through the teacher's remaining layers
        and predictor.

        The gradient flows through the frozen layers into the taps and adapters.

        Args:
            student, teacher: layer name -> output of the student's and the teacher's box head on
                the same RoIs.
        """
        fused = self.fusion(student, teacher[self.fusion.entry], self._layers.run)
        features = self._layers.run(fused, after=self.fusion.entry)
        return BoxPredictions(*self.teacher.model.roi_heads.box_predictor(features))

    def detect(
        self, batched_inputs: List[Dict[str, torch.Tensor]], trace: BoxHeadTrace
    ) -> List[Instances]:
        """The cross-head's detections per image, in the network's pixels."""
        _, layers = self.predict(batched_inputs, trace.boxes)
        cross = self.cross_head(trace.layers, layers)
        predictor = self.teacher.model.roi_heads.box_predictor
        return predictor.inference((cross.logits, cross.deltas), trace.proposals)[0]

    def _box_l1(self, cross: BoxPredictions, targets: BoxPredictions, boxes: List[Boxes]):
        return L.confident_l1(cross.deltas, targets.deltas, targets.logits)

    def _box_giou(self, cross: BoxPredictions, targets: BoxPredictions, boxes: List[Boxes]):
        confidence, classes = L.teacher_confidence(targets.logits)
        decode = functools.partial(
            self.teacher.model.roi_heads.box_predictor.box2box_transform.apply_deltas,
            boxes=Boxes.cat(boxes).tensor,
        )
        return L.confident_giou(
            decode(L.at_least_float32(L.select_class_boxes(cross.deltas, classes))),
            decode(L.at_least_float32(L.select_class_boxes(targets.deltas, classes))),
            confidence,
            normalizer=confidence.sum() + L.EPS,
        )

    def _clock(self, log: bool) -> float:
        if log and self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
        return time.perf_counter()

    @torch.no_grad()
    def _log(self, cross, targets: BoxPredictions, trace: BoxHeadTrace, seconds, factor) -> None:
        """Statistics of this step to the EventStorage."""
        storage = get_event_storage()
        scalars = {"num_rois": len(targets.logits), "teacher_seconds": seconds, "factor": factor}
        if len(targets.logits):
            answer = targets.logits.argmax(dim=1)
            confidence, _ = L.teacher_confidence(targets.logits)
            scalars["teacher_confidence"] = confidence.mean().item()
            scalars["agreement_cross_head"] = _share(cross.logits.argmax(dim=1) == answer)
            if trace.logits.shape == targets.logits.shape:
                scalars["agreement_student"] = _share(trace.logits.argmax(dim=1) == answer)
        for name, value in scalars.items():
            storage.put_scalar(f"crosskd/{name}", value, smoothing_hint=False)


def _share(matches: torch.Tensor) -> float:
    return matches.float().mean().item()


def _is_logging_step() -> bool:
    return (get_event_storage().iter + 1) % LOG_PERIOD == 0


def _check_student(student: nn.Module) -> None:
    heads = student.roi_heads
    if not isinstance(heads, CrossKDROIHeads):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME: the student's ROI heads are {type(heads).__name__}, which "
            "don't hand out their layers; use CrossKDROIHeads"
        )


def _check_teacher(teacher: Teacher) -> None:
    def refuse(reason: str) -> None:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CONFIG_FILE: the teacher ({teacher.description}) {reason}"
        )

    if not isinstance(teacher.model, GeneralizedRCNN):
        refuse(f"is a {type(teacher.model).__name__}; a two-stage student needs a GeneralizedRCNN")
    heads = teacher.model.roi_heads
    if not isinstance(heads, StandardROIHeads) or isinstance(heads, CascadeROIHeads):
        refuse(f"has {type(heads).__name__}; its ROI heads must be StandardROIHeads (one box head)")
    predictor = heads.box_predictor
    if not isinstance(predictor, FastRCNNOutputLayers):
        refuse(f"has a {type(predictor).__name__}; its box predictor must be FastRCNNOutputLayers")
    if predictor.use_sigmoid_ce:
        refuse(
            "classifies with sigmoids (USE_SIGMOID_CE); the losses compare softmax probabilities"
        )
    if type(predictor.box2box_transform) is not Box2BoxTransform:
        kind = type(predictor.box2box_transform).__name__
        refuse(f"encodes boxes by {kind}; Box2BoxTransform (axis-aligned deltas) is needed")


def _check_classes(student: GeneralizedRCNN, teacher: Teacher, kd: CfgNode) -> None:
    """Args: kd: the node MODEL.CROSSKD.TEACHER."""
    ours, theirs = student.roi_heads.num_classes, teacher.model.roi_heads.num_classes
    if ours != theirs and kd.EVAL_AT_START:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.EVAL_AT_START True needs a teacher of the student's {ours} "
            f"classes, this one ({teacher.description}) has {theirs}; set it to False"
        )
    if ours != theirs and tuple(kd.CLASS_MAP) != TEACHER_CLASSES:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES: the student has {ours} classes and the teacher "
            f"({teacher.description}) {theirs}. If that is meant, set "
            f"MODEL.CROSSKD.TEACHER.CLASS_MAP {TEACHER_CLASSES}: cross-head predictions are in "
            "the teacher's classes"
        )


def _build_fusion(kd: CfgNode, student: GeneralizedRCNN, teacher: Teacher) -> FeatureFusion:
    """Check taps, entry and route against both heads and build the fusion.

    Args:
        kd: the node MODEL.CROSSKD.FUSION.
    """
    heads = teacher.model.roi_heads
    try:
        ours = student.roi_heads.box_head_layers()
    except TypeError as error:
        raise ConfigError(f"MODEL.ROI_BOX_HEAD.NAME: the student's {error}") from None
    try:
        theirs = BoxHeadLayers(heads.box_head, heads.box_pooler.output_size)
    except TypeError as error:
        raise ConfigError(f"MODEL.CROSSKD.TEACHER.CONFIG_FILE: the teacher's {error}") from None
    taps = tuple(kd.IN_FEATURES) or ("fc1", "fc2")
    entry = kd.ENTRY or theirs.last
    _check_layers("IN_FEATURES", taps, ours, "student")
    _check_layers("ENTRY", (entry,), theirs, "teacher")
    if kd.ROUTE == "through":
        _check_layers("IN_FEATURES", taps, theirs, "teacher (route 'through')")
        deeper = [tap for tap in taps if theirs.depth(tap) > theirs.depth(entry)]
        if deeper:
            raise ConfigError(
                f"MODEL.CROSSKD.FUSION.IN_FEATURES: {deeper} lie deeper than ENTRY '{entry}', so "
                "route 'through' has no teacher layers to run; take taps from "
                f"{theirs.names[: theirs.depth(entry) + 1]}, or ROUTE direct"
            )
    try:
        return FeatureFusion(
            name=kd.NAME,
            taps=taps,
            entry=entry,
            route=kd.ROUTE,
            align=kd.ALIGN or "none",
            student_shapes=ours.shapes,
            teacher_shapes=theirs.shapes,
        )
    except ValueError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION (NAME '{kd.NAME}', IN_FEATURES {taps}, ENTRY '{entry}'): {error}"
        ) from None


def _check_layers(key: str, names: Tuple[str, ...], layers: BoxHeadLayers, whose: str) -> None:
    for name in names:
        if name not in layers.names:
            raise ConfigError(
                f"MODEL.CROSSKD.FUSION.{key}: the {whose} box head has no layer {name!r}; it has "
                f"{', '.join(layers.names)}"
            )
