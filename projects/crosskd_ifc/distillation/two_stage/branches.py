"""Distillation of the mask and keypoint branches (Mask R-CNN, Keypoint R-CNN).

Shape shorthand: R sampled RoIs over all images, P of them positive, K classes of the mask head (1
if class-agnostic) or keypoints, C channels, (H, W) resolution of masks or heatmaps.
"""

from typing import Dict, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.modeling import GeneralizedRCNN
from torch import nn

from ...config import ConfigError
from .. import losses as L
from ..compatibility.branches import (
    check_heads,
    check_pyramids,
    check_same_masks,
    check_same_points,
)
from ..compatibility.class_map import ClassMap
from ..teacher import Teacher
from ..traces import StepTrace


class BranchDistiller:
    """One loss between what a branch's heads give for the positive RoIs of the student's branch.

    Cross-head: the student's pyramid through the teacher's pooler, a learned 1x1 convolution where
    it has other channels, and the teacher's whole head; student-head: the student's own.

    A subclass names its branch, checks the student's own predictions, and compares.

    Attributes:
        adapters: from the student's pooled map to the teacher's channels.
    """

    branch: str

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        own_predictions: bool,
        same_pooler: bool,
        adapters: nn.Module,
        weight: float,
    ):
        """
        Args:
            teacher: with this branch.
            own_predictions: compare the student's own predictions, not the cross-head's.
            same_pooler: both networks pool alike, so that the student's pooled map can be used.
            adapters: from the student's pooled map to the teacher's channels.
            weight: of the loss.
        """
        self.teacher, self.weight, self.adapters = teacher, weight, adapters
        self._own, self._same_pooler = own_predictions, same_pooler
        heads = teacher.model.roi_heads
        names = ("pooler", "in_features", "head")
        self._pooler, self._levels, self._head = (
            getattr(heads, f"{self.branch}_{name}") for name in names
        )

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
        check_heads(cls.branch, student, teacher)
        if own_predictions:
            cls.check_own(cfg.MODEL.CROSSKD.LOSS, student, teacher)
            same_pooler, adapters = False, nn.Identity()
        else:
            same_pooler, adapters = check_pyramids(cls.branch, student, teacher)
        return {
            "teacher": teacher,
            "own_predictions": own_predictions,
            "same_pooler": same_pooler,
            "adapters": adapters,
            "weight": cfg.MODEL.CROSSKD.LOSS[f"{cls.branch.upper()}_WEIGHT"],
        }

    @staticmethod
    def check_own(loss: CfgNode, student: GeneralizedRCNN, teacher: Teacher) -> None:
        """Refuse own predictions that can't be compared.

        Args:
            loss: the node MODEL.CROSSKD.LOSS.

        Raises:
            ConfigError: with the reason.
        """
        raise NotImplementedError

    @property
    def keys(self) -> Tuple[str]:
        return (f"loss_{self.branch}_kd",)

    @property
    def adapters_name(self) -> str:
        return self.branch

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted loss of one step, a scalar; without positive RoIs a connected 0."""
        trace = getattr(step.heads, self.branch)
        if not trace.instances:  # with no positive RoI there is an empty item for each image
            raise ConfigError(
                "MODEL.ROI_HEADS.NAME: the student's ROI heads don't call their "
                f"{self.branch}_head(features, instances), so its {self.branch} features aren't "
                f"known; set MODEL.CROSSKD.LOSS.{self.branch.upper()}_WEIGHT to 0"
            )
        if not sum(len(x) for x in trace.instances):
            connected = (*step.features.values(), *self.adapters.parameters())
            return {self.keys[0]: sum(x.sum() for x in connected) * 0}
        wanted = step.teacher.once(self.branch, lambda: self._teacher_logits(step))
        found = trace.logits if self._own else self._cross_logits(step)
        return {self.keys[0]: self.compare(step, found, wanted) * self.weight}

    def compare(self, step: StepTrace, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The unweighted loss of P > 0 RoIs.

        Args:
            step: the current one.
            found, wanted: logits (P, K, H, W) that learn, and the teacher's.
        """
        raise NotImplementedError

    def _teacher_logits(self, step: StepTrace) -> torch.Tensor:
        boxes = getattr(step.heads, self.branch).boxes
        pooled = step.teacher.pooled(self._pooler, self._levels, boxes)
        with step.teacher.running():
            return self._head.layers(pooled)  # PxKxHxW

    def _cross_logits(self, step: StepTrace) -> torch.Tensor:
        trace = getattr(step.heads, self.branch)
        pooled = trace.pooled
        if not self._same_pooler:
            levels = [L.at_least_float32(step.features[f]) for f in self._levels]
            pooled = self._pooler(levels, trace.boxes)  # which takes boxes in the maps' precision
        return self._head.layers(self.adapters(pooled))  # PxKxHxW


class MaskDistiller(BranchDistiller):
    """The loss ``loss_mask_kd``: quality focal loss between mask logits."""

    branch = "mask"

    @configurable
    def __init__(self, *, class_map: Optional[ClassMap], reduction: str, channels: str, **kwargs):
        """
        Args:
            class_map: needed for ``own_predictions`` and the ground truth's channel.
            reduction: "published" divides the sum by R, "mean" by the number of its terms.
            channels: "all", or "ground_truth": the channel of each RoI's class only.
            kwargs: of :class:`BranchDistiller`.
        """
        super().__init__(**kwargs)
        self._class_map = class_map
        self._is_mean, self._truth_only = reduction == "mean", channels == "ground_truth"

    @classmethod
    def from_config(cls, cfg, student, teacher, class_map, *, own_predictions: bool):
        kd, own = cfg.MODEL.CROSSKD.LOSS, own_predictions
        settings = super().from_config(cfg, student, teacher, class_map, own_predictions=own)
        more = {"reduction": kd.MASK_REDUCTION, "channels": kd.MASK_CHANNELS}
        return {**settings, **more, "class_map": class_map}

    @staticmethod
    def check_own(loss: CfgNode, student: GeneralizedRCNN, teacher: Teacher) -> None:
        check_same_masks(student, teacher, loss.MASK_CHANNELS)

    def compare(self, step: StepTrace, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        weights = None
        if self._truth_only:
            found, wanted, weights = self._truth_channels(step, found, wanted)
        elif self._own:
            found = self._class_map.student_channels(found)
            wanted = self._class_map.teacher_channels(wanted)
        rois, _, height, width = found.shape
        if weights is not None:
            weights = weights.view(-1, 1).expand(rois, height * width).reshape(-1)
        normalizer = max(len(step.heads.stages[0].logits), 1)
        if self._is_mean:
            normalizer = found.numel()
            if weights is not None:
                normalizer = weights.sum().clamp(min=1)
        return L.quality_focal(
            _rows(found), _rows(wanted), beta=1.0, weights=weights, normalizer=normalizer
        )

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


class KeypointDistiller(BranchDistiller):
    """The loss ``loss_keypoint_kd``: the mean over RoIs and keypoints of ``KL(softmax(t) ||
    softmax(z))`` over the pixels of a heatmap, t the teacher's logits.

    detectron2's own loss of a heatmap is the cross entropy of the same softmax with one pixel. The
    teacher answers for invisible keypoints, too.
    """

    branch = "keypoint"

    @staticmethod
    def check_own(loss: CfgNode, student: GeneralizedRCNN, teacher: Teacher) -> None:
        check_same_points(student, teacher)

    def compare(self, step: StepTrace, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        found, wanted = (x.flatten(2).flatten(0, 1) for x in (found, wanted))  # (P K)x(H W)
        return L.kl_divergence(found, wanted, temperature=1.0, normalizer=len(found))


def _channel(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(P, K, H, W) -> (P, 1, H, W), the channel of each RoI; class-agnostic masks have only one."""
    if x.shape[1] == 1:
        return x
    return x.gather(1, index.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:]))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(P, K, H, W) -> (P H W, K)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
