"""Losses between one level of the student's pyramid and the teacher's.

Shape shorthand: N images, C channels, (H, W) size of the level, M boxes of an image.
"""

from typing import List

import torch
import torch.nn.functional as F
from torch import nn

from ...common.registry import NamedRegistry
from ..losses import at_least_float32, pkd

FEATURE_LOSS_REGISTRY = NamedRegistry("FEATURE_LOSS")
"""
``MODEL.CROSSKD.LOSS.FEATURE_TYPE`` -> a module that compares features.

Made as ``cls(channels)`` for each level, with the teacher's number of channels; keyword-only
arguments with a default are set by ``LOSS.FEATURE_OPTS``. Raise ValueError for values that can't
work. Its ``forward(student, teacher, boxes)`` takes two (N, C, H, W) features, the first of which
learns, and for each image the ground truth's boxes, (M, 4) xyxy in units of the level's cells; it
returns a scalar, and must use each of its parameters in every step.
"""


def channel_wise(
    student: torch.Tensor, teacher: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """``T^2 / (N C) * sum_nc KL(softmax(teacher_nc / T) || softmax(student_nc / T))``, the softmax
    over the H W pixels of a channel.

    Channel-wise distillation, CWD (Shu et al., 2021).

    Args:
        student: (N, C, H, W) feature or logits that learn.
        teacher: (N, C, H, W) target.
        temperature: T > 0.

    Returns:
        Scalar loss.
    """
    student = at_least_float32(student)
    if student.numel() == 0:
        return student.sum() * 0
    found, wanted = (
        F.log_softmax(x.flatten(2) / temperature, dim=2)
        for x in (student, at_least_float32(teacher.detach()))
    )
    divergence = F.kl_div(found, wanted, reduction="sum", log_target=True)
    return divergence * temperature**2 / found.shape[:2].numel()


@FEATURE_LOSS_REGISTRY.register(name="pkd")
class PearsonLoss(nn.Module):
    """PKD, see :func:`pkd`."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, boxes: List[torch.Tensor]
    ) -> torch.Tensor:
        return pkd(student, teacher)


@FEATURE_LOSS_REGISTRY.register(name="cwd")
class ChannelWiseLoss(nn.Module):
    """CWD, see :func:`channel_wise`."""

    def __init__(self, channels: int, *, temperature: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be greater than 0, not {temperature}")
        self.temperature = temperature

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, boxes: List[torch.Tensor]
    ) -> torch.Tensor:
        return channel_wise(student, teacher, temperature=self.temperature)
