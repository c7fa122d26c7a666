"""One level of the student's pyramid beside the teacher's: what is compared, and by which loss.

Shape shorthand: N images, C channels, (Hl, Wl) size of level l, M boxes of an image.
"""

from typing import Dict, List, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from ...common.registry import read_options
from ...config import ConfigError
from ..losses import at_least_float32
from .feature import FEATURE_LOSS_REGISTRY


class LevelLoss(nn.Module):
    """The loss of one level: a learned 1x1 convolution where the channels differ, then the type's
    loss."""

    def __init__(self, loss: nn.Module, source: int, target: int, stride: int):
        """
        Args:
            loss: of :data:`FEATURE_LOSS_REGISTRY`, made for ``target`` channels.
            source, target: channels of student and teacher.
            stride: pixels of the image for one cell of the level.
        """
        super().__init__()
        self.adapter = nn.Identity() if source == target else nn.Conv2d(source, target, 1)
        self.loss, self._stride = loss, stride

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, boxes: List[torch.Tensor]
    ) -> torch.Tensor:
        """
        Args:
            boxes: for each image the ground truth's, (M, 4) xyxy in the image's pixels.
        """
        return self.loss(self.adapter(student), teacher, [x / self._stride for x in boxes])


def build_level_loss(loss: CfgNode, source: int, target: int, stride: int) -> LevelLoss:
    """The loss that a config asks for.

    Args:
        loss: the node MODEL.CROSSKD.LOSS.
        source, target, stride: as of :class:`LevelLoss`.

    Raises:
        ConfigError: for options that the type doesn't have or that can't work.
    """
    kind = FEATURE_LOSS_REGISTRY.get(loss.FEATURE_TYPE)
    key = f"MODEL.CROSSKD.LOSS.FEATURE_OPTS (of FEATURE_TYPE {loss.FEATURE_TYPE!r})"
    options = read_options(key, loss.FEATURE_OPTS, kind)
    try:
        return LevelLoss(kind(target, **options), source, target, stride)
    except ValueError as error:
        raise ConfigError(f"{key} is {tuple(loss.FEATURE_OPTS)}: {error}") from None


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
    total = None
    for name in sources or (level,):
        x = at_least_float32(features[name])
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        total = x if total is None else total + x
    return total
