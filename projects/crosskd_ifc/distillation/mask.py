"""Distillation of the mask branch (Mask R-CNN).

Shape shorthand: R sampled RoIs over all images, P of them positive, K classes of the mask head (1
if class-agnostic), C channels, (H, W) mask resolution.
"""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from torch import nn

from ..config import ConfigError
from . import losses as L
from .compatibility.class_map import ClassMap
from .fusion import build_adapter
from .teacher import Teacher
from .traces import StepTrace

# How an ROIPooler assigns boxes to levels; its RoIAlign layers show the rest in their repr.
_POOLER_SETTINGS = (
    "output_size",
    "min_level",
    "max_level",
    "canonical_level",
    "canonical_box_size",
)


class MaskDistiller:
    """The loss ``loss_mask_kd``: quality focal loss between mask logits on the positive RoIs of the
    student's mask branch.

    Cross-head: the student's pyramid through the teacher's mask pooler, a learned 1x1 convolution
    where it has other channels, and the teacher's whole mask head; student-head: the student's own
    mask predictions.
    """

    keys = ("loss_mask_kd",)
    adapters_name = "mask"

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        class_map: Optional[ClassMap],
        own_predictions: bool,
        same_pooler: bool,
        adapters: nn.Module,
        weight: float,
        reduction: str,
        channels: str,
    ):
        """
        Args:
            teacher: a Mask R-CNN.
            class_map: needed for ``own_predictions`` and the ground truth's channel.
            own_predictions: compare the student's own masks, not the cross-head's.
            same_pooler: both networks pool alike, so that the student's pooled map can be used.
            adapters: from the student's pooled map to the teacher's channels.
            weight: of the loss.
            reduction: "published" divides the sum by R, "mean" by the number of its terms.
            channels: "all", or "ground_truth": the channel of each RoI's class only.
        """
        self.teacher = teacher
        self.weight, self.adapters = weight, adapters
        self._class_map, self._own, self._same_pooler = class_map, own_predictions, same_pooler
        self._is_mean, self._truth_only = reduction == "mean", channels == "ground_truth"

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
        kd, own = cfg.MODEL.CROSSKD, own_predictions
        _check_heads(student, teacher)
        if own:
            _check_same_masks(student, teacher, kd.LOSS.MASK_CHANNELS)
            same_pooler, adapters = False, nn.Identity()
        else:
            same_pooler, adapters = _check_pyramids(student, teacher)
        return {
            "teacher": teacher,
            "class_map": class_map,
            "own_predictions": own,
            "same_pooler": same_pooler,
            "adapters": adapters,
            "weight": kd.LOSS.MASK_WEIGHT,
            "reduction": kd.LOSS.MASK_REDUCTION,
            "channels": kd.LOSS.MASK_CHANNELS,
        }

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted loss of one step, a scalar; without positive RoIs a connected 0."""
        trace = step.heads.mask
        if not sum(len(x) for x in trace.instances):
            zero = sum(x.sum() for x in (*step.features.values(), *self.adapters.parameters())) * 0
            return {"loss_mask_kd": zero}
        wanted = step.teacher.once("mask", lambda: self._teacher_logits(step))
        found = trace.logits if self._own else self._cross_logits(step)
        weights = None
        if self._truth_only:
            found, wanted, weights = self._truth_channels(step, found, wanted)
        elif self._own:
            found = self._class_map.student_channels(found)
            wanted = self._class_map.teacher_channels(wanted)
        rois, _, height, width = found.shape
        if weights is not None:
            weights = weights.view(-1, 1).expand(rois, height * width).reshape(-1)
        normalizer = max(len(step.heads.logits), 1)
        if self._is_mean:
            normalizer = found.numel()
            if weights is not None:
                normalizer = weights.sum().clamp(min=1)
        loss = L.quality_focal(
            _rows(found), _rows(wanted), beta=1.0, weights=weights, normalizer=normalizer
        )
        return {"loss_mask_kd": loss * self.weight}

    def _teacher_logits(self, step: StepTrace) -> torch.Tensor:
        heads, features = self.teacher.model.roi_heads, step.teacher.features
        with step.teacher.running():
            pooled = heads.mask_pooler(
                [features[f] for f in heads.mask_in_features], step.heads.mask.boxes
            )
            return heads.mask_head.layers(pooled)  # PxKxHxW

    def _cross_logits(self, step: StepTrace) -> torch.Tensor:
        heads, trace = self.teacher.model.roi_heads, step.heads.mask
        pooled = trace.pooled
        if not self._same_pooler:
            features = [step.features[f] for f in heads.mask_in_features]
            pooled = heads.mask_pooler(features, trace.boxes)
        return heads.mask_head.layers(self.adapters(pooled))  # PxKxHxW

    def _truth_channels(
        self, step: StepTrace, found: torch.Tensor, wanted: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each RoI's channel of both, (P, 1, H, W), and a weight of 0 for classes without one."""
        ours = cat([x.gt_classes for x in step.heads.mask.instances])  # P
        theirs = self._class_map.to_teacher(ours)
        weights = (theirs >= 0).to(torch.float32)
        theirs = theirs.clamp(min=0)
        found = _channel(found, ours if self._own else theirs)
        return found, _channel(wanted, theirs), weights


def _channel(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(P, K, H, W) -> (P, 1, H, W), the channel of each RoI; class-agnostic masks have only one."""
    if x.shape[1] == 1:
        return x
    return x.gather(1, index.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:]))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(P, K, H, W) -> (P H W, K)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _refuse(reason: str) -> None:
    raise ConfigError(f"MODEL.CROSSKD.LOSS.MASK_WEIGHT: {reason}; set it to 0.0")


def _check_heads(student: GeneralizedRCNN, teacher: Teacher) -> None:
    ours, theirs = student.roi_heads, teacher.model.roi_heads
    if not theirs.mask_on:
        _refuse(f"the teacher ({teacher.description}) has no mask head (MODEL.MASK_ON False)")
    for whose, heads in (("student", ours), ("teacher", theirs)):
        kind = type(heads.mask_head)
        is_known = getattr(kind, "forward", None) is BaseMaskRCNNHead.forward
        if not is_known or heads.mask_pooler is None:
            _refuse(
                f"the {whose}'s {kind.__name__} predicts masks in its own way; mask heads must be "
                "BaseMaskRCNNHead, such as MaskRCNNConvUpsampleHead"
            )


def _check_same_masks(student: GeneralizedRCNN, teacher: Teacher, channels: str) -> None:
    """For the student's own masks: the same size, and channels that correspond."""
    heads: List[nn.Module] = [student.roi_heads, teacher.model.roi_heads]
    for name, h in zip(("student", "teacher"), heads):
        if not isinstance(h.mask_head, MaskRCNNConvUpsampleHead):
            _refuse(f"MIMIC 'student_head' needs a MaskRCNNConvUpsampleHead in the {name}")
    sizes = [h.mask_pooler.output_size for h in heads]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION: the student's masks are made from "
            f"{sizes[0]} and the teacher's ({teacher.description}) from {sizes[1]}; MIMIC "
            "'student_head' needs equal sizes"
        )
    counts = [h.mask_head.predictor.out_channels for h in heads]
    agnostic = [count == 1 < h.num_classes for count, h in zip(counts, heads)]
    if agnostic[0] != agnostic[1] and channels == "all" and counts != [1, 1]:
        raise ConfigError(
            "MODEL.CROSSKD.LOSS.MASK_CHANNELS 'all' can't compare masks per class with "
            "class-agnostic ones (MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK); use 'ground_truth'"
        )


def _check_pyramids(student: GeneralizedRCNN, teacher: Teacher) -> Tuple[bool, nn.Module]:
    """For the cross-head: levels of the same names and strides.

    Returns:
        Whether both mask poolers do the same, and the map from the student's channels to the
        teacher's.
    """
    names = teacher.model.roi_heads.mask_in_features
    ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
    for name in names:
        found = ours[name].stride if name in ours else None
        wanted = theirs[name].stride
        if found != wanted:
            _refuse(
                f"the teacher's mask head ({teacher.description}) reads {name} with stride "
                f"{wanted}, the student has {found or 'no such feature'}"
            )
    counts = [{s[n].channels for n in names} for s in (ours, theirs)]
    if any(len(c) > 1 for c in counts):
        _refuse(f"the levels {', '.join(names)} have unlike channels, {counts[0] | counts[1]}")
    poolers = [m.roi_heads.mask_pooler for m in (student, teacher.model)]
    size = tuple(poolers[1].output_size)
    adapter = build_adapter(*((c.pop(), *size) for c in counts))
    same = (
        student.roi_heads.mask_in_features == names
        and all(getattr(poolers[0], a) == getattr(poolers[1], a) for a in _POOLER_SETTINGS)
        and repr(poolers[0]) == repr(poolers[1])
    )
    return same, adapter
