"""Distillation of the feature pyramid.

Shape shorthand: N images, C channels, (Hl, Wl) size of level l.
"""

from typing import Dict, List, Sequence

import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from ..config import ConfigError
from .compatibility.anchors import check_same_padding
from .loss_types.levels import build_level_loss, combine_levels
from .teacher import Teacher
from .traces import StepTrace


class FeatureDistiller:
    """The loss ``loss_feature_kd``: the sum over the levels l that both networks have (or those
    that LOSS.FEATURE_LEVELS names) of ``loss(A_l(F_l), teacher P_l)``, the loss one of
    ``FEATURE_LOSS_REGISTRY``.

    ``F_l = sum over the student's levels m of resize_bilinear(P_m -> size of P_l)``, the published
    code's combined map made workable; without combining F_l = P_l. A_l is the identity, or a
    learned 1x1 convolution where the channels differ.

    Attributes:
        adapters: level -> :class:`LevelLoss`; all that it learns.
    """

    keys = ("loss_feature_kd",)
    adapters_name = "feature"

    @configurable
    def __init__(self, *, levels: nn.ModuleDict, sources: Sequence[str], weight: float):
        """
        Args:
            levels: feature name -> :class:`LevelLoss`.
            sources: the student's levels that are summed for each; none: the level itself.
            weight: of the loss.
        """
        self.adapters, self.sources, self.weight = levels, list(sources), weight

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: Teacher):
        kd = cfg.MODEL.CROSSKD.LOSS
        ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
        channels = {name: shape.channels for name, shape in ours.items()}
        if kd.FEATURE_COMBINE and len(set(channels.values())) > 1:
            raise ConfigError(
                "MODEL.CROSSKD.LOSS.FEATURE_COMBINE adds the student's levels, but their channels "
                f"differ: {channels}; set it to False"
            )
        levels = {
            name: build_level_loss(kd, channels[name], theirs[name].channels, ours[name].stride)
            for name in _shared_levels(student, teacher, kd.FEATURE_LEVELS)
        }
        return {
            "levels": nn.ModuleDict(levels).to(student.device),
            "sources": list(ours) if kd.FEATURE_COMBINE else [],
            "weight": kd.FEATURE_WEIGHT,
        }

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted loss of one step, a scalar."""
        wanted = step.teacher.features
        device = next(iter(step.features.values())).device
        boxes = [x["instances"].gt_boxes.tensor.to(device, non_blocking=True) for x in step.inputs]
        total = sum(
            loss(combine_levels(step.features, level, self.sources), wanted[level], boxes)
            for level, loss in self.adapters.items()
        )
        return {"loss_feature_kd": total * self.weight}


def _shared_levels(student: nn.Module, teacher: Teacher, wanted: Sequence[str]) -> List[str]:
    """The levels of equal name and stride, of ``wanted`` if that names any.

    Raises:
        ConfigError: if there is none, one differs, or a wanted one is missing.
    """
    ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
    shared = [name for name in ours if name in theirs]
    missing = [name for name in wanted if name not in shared]
    if missing:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.FEATURE_LEVELS names {missing[0]!r}; student and teacher "
            f"({teacher.description}) have {', '.join(shared) or 'no level'} in common"
        )
    shared = [name for name in shared if name in wanted] if wanted else shared
    if not shared:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.FEATURE_WEIGHT: the student has the features {', '.join(ours)} "
            f"and the teacher ({teacher.description}) {', '.join(theirs)}, none in common; set it "
            "to 0.0"
        )
    for name in shared:
        strides = [s[name].stride for s in (ours, theirs)]
        if strides[0] != strides[1]:
            raise ConfigError(
                f"MODEL.CROSSKD.LOSS.FEATURE_WEIGHT compares maps of equal size, but {name} "
                f"has the stride {strides[0]} in the student and {strides[1]} in the teacher "
                f"({teacher.description}); set it to 0.0, or name other FEATURE_LEVELS"
            )
    check_same_padding("LOSS.FEATURE_WEIGHT", student, teacher)
    return shared
