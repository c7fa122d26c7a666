"""The ways to combine tapped features of equal shape into one: ``MODEL.CROSSKD.FUSION.NAME``.

Shape shorthand: R RoIs (or N images), C channels, D width of a fully connected layer. A tap is
either 4-D, (R, C, H, W), or 2-D, (R, D); its *shape* below is that without the first dimension: (C,
H, W) or (D,).
"""

import functools
import operator
from typing import List, Sequence, Tuple

import torch
from torch import nn

from ..common.random_state import StepGenerators
from ..common.registry import NamedRegistry

Shape = Tuple[int, ...]

FEATURE_FUSION_REGISTRY = NamedRegistry("FEATURE_FUSION")
"""
``MODEL.CROSSKD.FUSION.NAME`` -> a module that combines features of equal shape.

Called as ``cls(taps, shape)`` with the names of the taps and the shape they share, (C, H, W) or
(D,); its ``forward`` takes the list of features in that order, each (R, C, H, W) or (R, D), and
returns one tensor of that shape. It must use each of its parameters in every step. Raise ValueError
for taps or shapes that it can't combine.
"""


@FEATURE_FUSION_REGISTRY.register(name="none")
class NoFusion(nn.Module):
    """The first tap, as it is: taps aren't combined, each has a loss of its own."""

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        return features[0]


@FEATURE_FUSION_REGISTRY.register(name="sum")
class SumFusion(nn.Module):
    """The sum of all taps: the published code's operation (there on FPN maps)."""

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        return functools.reduce(operator.add, features)


@FEATURE_FUSION_REGISTRY.register(name="mean")
class MeanFusion(SumFusion):
    """The mean of all taps: a sum that keeps the magnitude of one tap."""

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        return super().forward(features) / len(features)


@FEATURE_FUSION_REGISTRY.register(name="weighted")
class WeightedFusion(nn.Module):
    """A learned convex combination: softmax of one zero-initialised scalar per tap."""

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(len(taps)))

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        weights = self.scores.softmax(dim=0)
        return functools.reduce(operator.add, (w * x for w, x in zip(weights, features)))


@FEATURE_FUSION_REGISTRY.register(name="attention")
class AttentionFusion(nn.Module):
    """A convex combination chosen per RoI: softmax over the taps of ``v_i . mean_HW(x_i) + c_i``.

    Zero-initialised, so that training starts from the mean.
    """

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(len(taps), shape[0]))
        self.biases = nn.Parameter(torch.zeros(len(taps)))

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        pooled = torch.stack([x.flatten(2).mean(2) if x.dim() > 2 else x for x in features], dim=1)
        scores = (pooled * self.vectors).sum(dim=2) + self.biases  # R x taps
        return _weighted_sum(scores.softmax(dim=1), features)


@FEATURE_FUSION_REGISTRY.register(name="concat")
class ConcatFusion(nn.Module):
    """Taps along dim 1, then a learned linear layer or 1x1 convolution, initialised to the mean."""

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()
        width = shape[0]
        layer = nn.Linear if len(shape) == 1 else functools.partial(nn.Conv2d, kernel_size=1)
        self.project = layer(len(taps) * width, width)
        with torch.no_grad():
            mean = torch.eye(width).repeat(1, len(taps)) / len(taps)
            self.project.weight.copy_(mean.view_as(self.project.weight))
            self.project.bias.zero_()

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        return self.project(torch.cat(features, dim=1))


@FEATURE_FUSION_REGISTRY.register(name="dropout")
class DropoutFusion(nn.Module):
    """The mean of a random subset of the taps, never an empty one, drawn for each RoI (or image):
    no tap can count on another. In evaluation the mean of all.

    The subsets depend on seed, iteration, process and place alone, so that a resumed run draws the
    same.
    """

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()
        self._generators = StepGenerators()

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        if not self.training:
            return functools.reduce(operator.add, features) / len(features)
        x = features[0]
        keep = self._subsets(len(x), len(features)).to(x.device, x.dtype)  # R x taps
        return _weighted_sum(keep / keep.sum(dim=1, keepdim=True), features)

    def _subsets(self, rows: int, taps: int) -> torch.Tensor:
        """(rows, taps) of 0 and 1, each of the 2^taps - 1 subsets as likely as the others."""
        subsets = torch.randint(1, 2**taps, (rows, 1), generator=self._generators.next())
        return (subsets >> torch.arange(taps)) & 1


@FEATURE_FUSION_REGISTRY.register(name="residual")
class ResidualFusion(nn.Module):
    """``x_1 + sum over i > 1 of tanh(g_i) * (x_i - x_1)``, one g_i for each channel, from 0: starts
    as the first tap alone."""

    def __init__(self, taps: Sequence[str], shape: Shape):
        super().__init__()
        if len(taps) < 2:
            raise ValueError(f"'residual' needs two taps or more: {tuple(taps)}")
        self.gates = nn.Parameter(torch.zeros(len(taps) - 1, shape[0]))

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        anchor, *others = features
        shape = (1, -1) + (1,) * (anchor.dim() - 2)
        gates = (g.tanh().view(shape) for g in self.gates)
        return functools.reduce(
            operator.add, (g * (x - anchor) for g, x in zip(gates, others)), anchor
        )


def _weighted_sum(weights: torch.Tensor, features: List[torch.Tensor]) -> torch.Tensor:
    """The sum of the features, each row with weights of its own, (R, number of taps)."""
    shape = (-1,) + (1,) * (features[0].dim() - 1)
    columns = weights.unbind(dim=1)
    return functools.reduce(operator.add, (w.view(shape) * x for w, x in zip(columns, features)))
