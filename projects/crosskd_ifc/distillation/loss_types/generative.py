"""Masked generative distillation (MGD).

Shape shorthand: N images, C channels, (H, W) size of a level.
"""

from typing import List

import torch
from torch import nn

from ...common.random_state import StepGenerators
from ..losses import at_least_float32
from .feature import FEATURE_LOSS_REGISTRY


@FEATURE_LOSS_REGISTRY.register(name="mgd")
class MaskedGenerativeLoss(nn.Module):
    """``sum (G(student * m) - teacher)^2 / N``: a learned generator restores the teacher's feature
    from the student's, of which a random part of the pixels is missing.

    G is a 3x3 convolution, ReLU, a 3x3 convolution; m is 0 with probability ``mask_ratio`` and 1
    otherwise, for each pixel, the same for all channels. Masked generative distillation (Yang et
    al., 2022). The masks depend on seed, iteration and process alone: a resumed run draws the same.
    """

    def __init__(self, channels: int, *, mask_ratio: float = 0.65):
        """
        Args:
            channels: C.
            mask_ratio: share of the pixels that are masked, in [0, 1): 0.65 is the paper's for
                dense detectors, 0.45 for two-stage ones.
        """
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and less than 1, not {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )
        self._generators = StepGenerators()

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, boxes: List[torch.Tensor]
    ) -> torch.Tensor:
        images, _, *size = student.shape
        # The levels of a pyramid differ in size, and so in their masks.
        random = torch.rand((images, 1, *size), generator=self._generators.next(*size))
        kept = (random >= self.mask_ratio).to(student.device, student.dtype)
        found = at_least_float32(self.generator(student * kept))
        return (found - at_least_float32(teacher.detach())).square().sum() / max(images, 1)
