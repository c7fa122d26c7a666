"""Distillation of the feature pyramid.

Shape shorthand: N images, C channels, (Hl, Wl) size of level l.
"""

from typing import Dict, List, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import nn

from ..config import ConfigError
from .compatibility.anchors import check_same_padding
from .fusion import build_adapter
from .losses import at_least_float32, pkd
from .teacher import Teacher
from .traces import StepTrace


class FeatureDistiller:
    """The loss ``loss_feature_kd``: the sum over the levels l that both networks have of ``pkd(F_l,
    teacher P_l)``.

    Where channels differ, a learned 1x1 convolution leads F_l to the teacher's.
    ``F_l = sum over the student's levels m of resize_bilinear(P_m -> size of P_l)``, the published
    code's combined map made workable; without combining F_l = P_l, which is plain PKD.
    """

    keys = ("loss_feature_kd",)
    adapters_name = "pyramid"

    @configurable
    def __init__(self, *, adapters: nn.ModuleDict, sources: Sequence[str], weight: float):
        """
        Args:
            adapters: feature name -> the map from the student's channels to the teacher's; the
                features to compare.
            sources: the student's levels that are summed for each; none: the level itself.
            weight: of the loss.
        """
        self.adapters, self.sources, self.weight = adapters, list(sources), weight

    @classmethod
    def from_config(cls, cfg: CfgNode, student: nn.Module, teacher: Teacher):
        kd = cfg.MODEL.CROSSKD.LOSS
        shapes = student.backbone.output_shape()
        channels = {name: shape.channels for name, shape in shapes.items()}
        if kd.FEATURE_COMBINE and len(set(channels.values())) > 1:
            raise ConfigError(
                "MODEL.CROSSKD.LOSS.FEATURE_COMBINE adds the student's levels, but their channels "
                f"differ: {channels}; set it to False"
            )
        return {
            "adapters": _shared_levels(student, teacher),
            "sources": list(shapes) if kd.FEATURE_COMBINE else [],
            "weight": kd.FEATURE_WEIGHT,
        }

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted loss of one step, a scalar."""
        wanted = step.teacher.features
        total = sum(
            pkd(adapter(combine_levels(step.features, level, self.sources)), wanted[level])
            for level, adapter in self.adapters.items()
        )
        return {"loss_feature_kd": total * self.weight}


def combine_levels(
    features: Dict[str, torch.Tensor], level: str, sources: Sequence[str]
) -> torch.Tensor:
    """The sum of all ``sources``, each resized bilinearly (align_corners False) to the size of
    ``level``.

    Args:
        features: level name -> (N, C, Hl, Wl), equal N and C.
        level: whose size the result has.
        sources: the levels to sum; empty for ``level`` alone.

    Returns:
        (N, C, H, W) of ``level``, at least float32.
    """
    target = at_least_float32(features[level])
    size = target.shape[-2:]
    maps: List[torch.Tensor] = []
    for name in sources or (level,):
        x = at_least_float32(features[name])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        maps.append(x)
    return torch.stack(maps).sum(dim=0) if len(maps) > 1 else maps[0]


def _shared_levels(student: nn.Module, teacher: Teacher) -> nn.ModuleDict:
    """The levels of equal name and stride, and the adapter of each.

    Raises:
        ConfigError: if there is none, or one differs.
    """
    ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.FEATURE_WEIGHT: the student has the features {', '.join(ours)} "
            f"and the teacher ({teacher.description}) {', '.join(theirs)}, none in common; set it "
            "to 0.0"
        )
    for name in shared:
        found, wanted = (s[name].stride for s in (ours, theirs))
        if found != wanted:
            raise ConfigError(
                f"MODEL.CROSSKD.LOSS.FEATURE_WEIGHT compares features position by position, but "
                f"the stride of {name} is {found} in the student and {wanted} in the teacher "
                f"({teacher.description}); set it to 0.0"
            )
    check_same_padding("LOSS.FEATURE_WEIGHT", student, teacher)
    return nn.ModuleDict(
        {n: build_adapter(*((s[n].channels, 0, 0) for s in (ours, theirs))) for n in shared}
    )
