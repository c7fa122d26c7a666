"""Focal and global knowledge distillation (FGD).

Shape shorthand: N images, C channels, (H, W) size of a level, M boxes of an image.
"""

from typing import List, Tuple

import torch
from torch import nn

from ..losses import at_least_float32
from .feature import FEATURE_LOSS_REGISTRY


@FEATURE_LOSS_REGISTRY.register(name="fgd")
class FocalGlobalLoss(nn.Module):
    """``L_foreground + background L_background + attention L_attention + context L_context``, each
    a sum over a level, divided by N.

    With s and t the features of student and teacher, A^S = H W softmax(mean_c |x| / T) over the
    pixels and A^C = C softmax(mean_hw |x| / T) over the channels of x:

    - focal: ``sum m A^S(t) A^C(t) (s - t)^2``; for the foreground m = 1 / (h w) inside of a box of
      h x w cells, of the smallest one where several meet, else 0; for the background m = 1 /
      (number of pixels outside of all boxes) there, else 0.
    - attention: ``|A^S(s) - A^S(t)|_1 + |A^C(s) - A^C(t)|_1``.
    - context: ``sum (R_s(s) - R_t(t))^2`` with learned blocks R, :class:`GlobalContext`.

    Focal and global knowledge distillation (Yang et al., 2022), whose weights are alpha for
    ``LOSS.FEATURE_WEIGHT`` and, relative to it, beta, gamma, lambda here. A huge temperature and 0
    for the three weights leave plain mimicking inside of the ground truth. The authors' code
    fills (h + 1)(w + 1) cells of a box and divides by that.
    """

    def __init__(
        self,
        channels: int,
        *,
        temperature: float = 0.5,
        background: float = 0.5,
        attention: float = 1.0,
        context: float = 0.01,
    ):
        """
        Args:
            channels: C, at least 2.
            temperature: T > 0 of both attentions.
            background, attention, context: weights, relative to the foreground's. The paper's are
                0.5, 1 and 0.01 for two-stage detectors, 0.5, 0.5 and 0.005 for RetinaNet.
        """
        super().__init__()
        if temperature <= 0 or min(background, attention, context) < 0:
            raise ValueError("temperature must be greater than 0 and no weight less than 0")
        self.temperature, self.background = temperature, background
        self.attention, self.context = attention, context
        self.student_context, self.teacher_context = (GlobalContext(channels) for _ in range(2))

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, boxes: List[torch.Tensor]
    ) -> torch.Tensor:
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        (pixels, channels), (wanted_pixels, wanted_channels) = (
            self._attentions(x) for x in (student, teacher)
        )
        size = teacher.shape[-2:]
        foreground, background = zip(*(box_masks(x.to(teacher), *size) for x in boxes))
        mask = torch.stack(foreground) + self.background * torch.stack(background)  # NxHxW
        difference = (student - teacher).square() * wanted_channels
        loss = (difference.sum(dim=1) * wanted_pixels.squeeze(1) * mask).sum()
        distance = (pixels - wanted_pixels).abs().sum() + (channels - wanted_channels).abs().sum()
        contexts = at_least_float32(self.student_context(student) - self.teacher_context(teacher))
        loss = loss + self.attention * distance + self.context * contexts.square().sum()
        return loss / len(student)

    def _attentions(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """A^S (N, 1, H, W) and A^C (N, C, 1, 1)."""
        magnitude = x.abs()
        by_pixel, by_channel = magnitude.mean(dim=1), magnitude.mean(dim=(2, 3))
        pixels = (by_pixel.flatten(1) / self.temperature).softmax(dim=1) * by_pixel[0].numel()
        channels = (by_channel / self.temperature).softmax(dim=1) * x.shape[1]
        return pixels.view_as(by_pixel).unsqueeze(1), channels[:, :, None, None]


class GlobalContext(nn.Module):
    """``x + W_2 ReLU(LayerNorm(W_1 sum_p softmax_p(w . x_p) x_p))``, p over the pixels: the global
    context block (Cao et al., 2019), which starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        middle = max(channels // 2, 1)
        # No bias: the softmax would take it out again.
        self.weigh = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        self.transform = nn.Sequential(
            nn.Linear(channels, middle),
            nn.LayerNorm(middle),
            nn.ReLU(),
            nn.Linear(middle, channels),
        )
        nn.init.kaiming_normal_(self.weigh.weight)
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.weigh(x).flatten(1).softmax(dim=1)  # NxHW
        context = torch.einsum("ncp,np->nc", x.flatten(2), weights.to(x.dtype))
        return x + self.transform(context)[:, :, None, None]


def box_masks(boxes: torch.Tensor, height: int, width: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The masks m of foreground and background, each (H, W), see :class:`FocalGlobalLoss`.

    Args:
        boxes: (M, 4) xyxy in cells; a box covers each cell that it touches.
    """
    x = torch.arange(width, device=boxes.device)
    y = torch.arange(height, device=boxes.device)
    low, high = boxes[:, :2].floor(), torch.maximum(boxes[:, 2:].ceil(), boxes[:, :2].floor() + 1)
    columns = (x >= low[:, :1]) & (x < high[:, :1])  # MxW
    rows = (y >= low[:, 1:]) & (y < high[:, 1:])  # MxH
    covered = (rows.sum(dim=1) * columns.sum(dim=1)).clamp(min=1)
    inside = rows.unsqueeze(2) & columns.unsqueeze(1)  # MxHxW
    shares = inside / covered.view(-1, 1, 1)
    foreground = torch.cat([shares.new_zeros(1, height, width), shares]).amax(dim=0)
    outside = (foreground == 0).to(foreground.dtype)
    return foreground, outside / outside.sum().clamp(min=1)
