"""Losses between the decoded boxes of dense detectors.

Shape shorthand: R positions over all levels and images, K foreground classes.
"""

import inspect

import torch

from ...common.registry import NamedRegistry
from ..losses import Normalizer, at_least_float32, confident_giou, confident_iou

BOX_LOSS_REGISTRY = NamedRegistry("BOX_LOSS")
"""
``MODEL.CROSSKD.LOSS.BOX_TYPE`` of a dense detector -> a function that compares boxes.

Called as ``loss(cross_boxes, teacher_boxes, weights, normalizer=...)`` with (R, 4) absolute xyxy
boxes, the first of which learn, and (R,) weights in [0, 1], 0 for positions that don't count;
returns a scalar. If the third argument is called ``gap``, the weights are :func:`score_gap`, else
the teacher's largest class probability.
"""


def score_gap(cross_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """``max over k of |sigmoid(teacher_k) - sigmoid(cross_k)|``, without gradient.

    Args:
        cross_logits: (..., K) with independent scores of the classes.
        teacher_logits: the same of the teacher.

    Returns:
        (...), in [0, 1].
    """
    with torch.no_grad():
        cross, teacher = (at_least_float32(x).sigmoid() for x in (cross_logits, teacher_logits))
        return (teacher - cross).abs_().amax(dim=-1)


def gap_giou(
    cross_boxes: torch.Tensor,
    teacher_boxes: torch.Tensor,
    gap: torch.Tensor,
    *,
    normalizer: Normalizer,
) -> torch.Tensor:
    """``sum_r gap_r * (1 - GIoU(cross_r, teacher_r)) / normalizer``, gap as of :func:`score_gap`.

    The localization loss of BCKD, "Bridging cross-task protocol inconsistency" (Yang et al., 2023):
    boxes count where the classifications still differ. The paper writes IoU, its published code
    takes GIoU, as here. BCKD's classification loss, ``sum |p - q| BCE(p, q)``, is
    :func:`.losses.quality_focal` with beta 1, which dense detectors have anyway.

    Args:
        cross_boxes: (R, 4) absolute xyxy boxes that learn.
        teacher_boxes: (R, 4) absolute xyxy targets.
        gap: (R,) weights.
        normalizer: the divisor of the sum.

    Returns:
        Scalar loss.
    """
    return confident_giou(cross_boxes, teacher_boxes, gap, normalizer=normalizer)


BOX_LOSS_REGISTRY.register(confident_giou, name="giou")
BOX_LOSS_REGISTRY.register(confident_iou, name="iou")
BOX_LOSS_REGISTRY.register(gap_giou, name="bckd")


def needs_gap(name: str) -> bool:
    """Whether a loss of the registry is weighted by the difference of the scores."""
    return "gap" in inspect.signature(BOX_LOSS_REGISTRY.get(name)).parameters
