"""Make what the teacher's head can read of tapped features of the student: each, or one of all.

Shape shorthand: R RoIs (or N images), C channels, D width of a fully connected layer. A tap is
either 4-D, (R, C, H, W), or 2-D, (R, D); its *shape* below is that without the first dimension: (C,
H, W) or (D,).
"""

from typing import Callable, Dict, List, Mapping, Sequence

import torch
from torch import nn

from .fusion_types import FEATURE_FUSION_REGISTRY, Shape, SumFusion
from .losses import at_least_float32, channel_statistics

__all__ = [
    "FEATURE_FUSION_REGISTRY",
    "FeatureFusion",
    "SumFusion",
    "build_adapter",
    "standardize_like",
]

ROUTES = ("direct", "through")
ALIGNMENTS = ("none", "standardize", "standardize_taps")


def are_separate(fusion: str, taps: Sequence[str]) -> bool:
    """Whether taps have a loss each, in place of one for their combination; () stands for those
    that are taken by default, which are several."""
    return fusion == "none" and len(taps) != 1


class SpatialMean(nn.Module):
    """(R, C, H, W) -> (R, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def build_adapter(source: Shape, target: Shape) -> nn.Module:
    """The map A_i from a student tap's shape to the shape that the teacher has (method:
    "Combination").

    Equal shapes: identity, no parameter. 4-D to 4-D of equal height and width: a learned 1x1
    convolution. 4-D to 2-D: spatial mean, then a learned linear layer. 2-D to 2-D: a learned linear
    layer.

    Args:
        source: the student's (C, H, W) or (D,).
        target: the teacher's (C, H, W) or (D,).

    Raises:
        ValueError: if none of these maps fits.
    """
    if source == target:
        return nn.Identity()
    if len(source) == 3 and len(target) == 3 and source[1:] == target[1:]:
        return nn.Conv2d(source[0], target[0], kernel_size=1)
    if len(target) == 1:
        linear = nn.Linear(source[0], target[0])
        return linear if len(source) == 1 else nn.Sequential(SpatialMean(), linear)
    raise ValueError(f"no adapter maps a feature of shape {source} to {target}")


def standardize_like(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``(s - mean(s)) / (std(s) + 1e-6) * std(t) + mean(t)`` per channel (dim 1) over all other
    dims.

    CrossKD's alignment of dense features (Wang et al., 2024). Unbiased std; the gradient flows
    through the student's statistics too, none into the teacher. Computed in at least float32; empty
    input is returned as it is.

    Args:
        student: (R, C, H, W) or (R, D).
        teacher: the same number of channels; its statistics are taken over.

    Returns:
        A tensor shaped as ``student``.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if student.numel() == 0:
        return student
    _, std_s, centered = channel_statistics(student)
    mean_t, std_t, _ = channel_statistics(teacher)
    return torch.addcmul(mean_t, centered, std_t / (std_s + 1e-6))


class FeatureFusion(nn.Module):
    """Adapters, route, combination and alignment: the student's taps -> features at the teacher's
    entry layer, one for each term of the losses.

    All learned parameters of the distillation live here, so that a checkpoint holds them under
    ``fusion.*``; with equal shapes and a fusion without weights there are none.
    """

    def __init__(
        self,
        *,
        name: str,
        taps: Sequence[str],
        entry: str,
        route: str,
        align: str,
        student_shapes: Mapping[str, Shape],
        teacher_shapes: Mapping[str, Shape],
        fused_weight: float = 1.0,
        tap_weights: Sequence[float] = (),
        detach: Sequence[str] = (),
    ):
        """
        Args:
            name: a key of :data:`FEATURE_FUSION_REGISTRY`.
            taps: names of the student's layers; see ``tap_weights`` for what their order does.
            entry: the teacher's layer whose output the combined feature replaces.
            route: "direct" maps each tap to the teacher's shape at ``entry``; "through" maps it to
                the teacher's shape at the tap itself and runs the teacher's layers up to ``entry``
                on it.
            align: "none", or "standardize" the combined feature against the teacher's own feature
                at ``entry``, followed by ReLU unless the entry is ``pool`` (whose features are not
                rectified); "standardize_taps" does so with each tap before they are combined.
            student_shapes, teacher_shapes: layer name -> (C, H, W) or (D,).
            fused_weight: of the loss on the combined feature; unused with "none" and several taps.
            tap_weights: of the losses on each tap by itself, in the order of ``taps``. (): no such
                losses; with "none" and several taps 1 for the first and 0.5 for the others.
            detach: taps that enter the combined feature without gradient to the student; their
                adapters learn.

        Raises:
            ValueError: if a tap's shape can't be mapped, or the fusion refuses the taps.
        """
        super().__init__()
        self.taps, self.entry, self.route = tuple(taps), entry, route
        self.align, self.detach = align, frozenset(detach)
        self.rectify = align != "none" and entry != "pool"
        if are_separate(name, self.taps):
            fused_weight = 0.0
            tap_weights = tap_weights or (1.0, *[0.5] * (len(self.taps) - 1))
        self._fused_weight = fused_weight
        self._tap_weights = {t: w for t, w in zip(self.taps, tap_weights) if w > 0}
        self.adapters = nn.ModuleDict()
        for tap in self.taps:
            target = entry if route == "direct" else tap
            try:
                adapter = build_adapter(student_shapes[tap], teacher_shapes[target])
            except ValueError as error:
                raise ValueError(
                    f"the student's '{tap}' {student_shapes[tap]} can't enter the teacher's "
                    f"'{target}' {teacher_shapes[target]}: {error}"
                ) from None
            self.adapters[tap] = adapter
        self.combine = FEATURE_FUSION_REGISTRY.get(name)(self.taps, teacher_shapes[entry])

    @property
    def terms(self) -> Dict[str, float]:
        """What the losses are computed on -> its weight, above 0: "combined" (the feature of
        :meth:`forward`), then taps by themselves."""
        combined = {"combined": self._fused_weight} if self._fused_weight > 0 else {}
        return {**combined, **self._tap_weights}

    def forward(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: torch.Tensor,
        run_teacher: Callable[[torch.Tensor, str, str], torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            student: tap name -> the student's feature.
            teacher: the teacher's own feature at the entry layer.
            run_teacher: ``run_teacher(x, after, until)`` applies the teacher's layers after
                ``after`` up to and including ``until``.

        Returns:
            The combined feature, or if it has no loss the first tap that has one, shaped as the
            teacher's at the entry layer.
        """
        if self._fused_weight == 0:  # what no loss reaches says nothing
            return self.features(student, teacher, run_teacher)[0]
        taps = self._at_entry({tap: student[tap] for tap in self.taps}, run_teacher)
        return self._combined(taps, student, teacher, run_teacher)

    def features(
        self,
        student: Mapping[str, torch.Tensor],
        teacher: torch.Tensor,
        run_teacher: Callable[[torch.Tensor, str, str], torch.Tensor],
    ) -> List[torch.Tensor]:
        """The feature of each of the :attr:`terms`; arguments and shapes as of :meth:`forward`."""
        taps = self._at_entry({tap: student[tap] for tap in self.taps}, run_teacher)
        found = []
        if self._fused_weight > 0:
            found.append(self._combined(taps, student, teacher, run_teacher))
        return found + [self._aligned(taps[tap], teacher) for tap in self._tap_weights]

    def _at_entry(self, student: Mapping[str, torch.Tensor], run_teacher):
        """Each of these taps, adapted and routed to the entry."""
        found = {tap: self.adapters[tap](x) for tap, x in student.items()}
        if self.route == "through":
            found = {tap: run_teacher(x, tap, self.entry) for tap, x in found.items()}
        return found

    def _combined(self, taps: Dict[str, torch.Tensor], student, teacher, run_teacher):
        # An adapter starts at random, so it has to learn behind a detached tap, too.
        detached = [tap for tap in self.taps if tap in self.detach]
        learn = [tap for tap in detached if any(True for _ in self.adapters[tap].parameters())]
        again = self._at_entry({tap: student[tap].detach() for tap in learn}, run_teacher)
        cut = {tap: again.get(tap, taps[tap].detach()) for tap in detached}
        features = list({**taps, **cut}.values())
        if self.align == "standardize_taps":
            return self.combine([self._aligned(x, teacher) for x in features])
        fused = self.combine(features)
        return self._aligned(fused, teacher)

    def _aligned(self, x: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.align != "none":
            x = standardize_like(x, teacher)
        return x.relu() if self.rectify else x
