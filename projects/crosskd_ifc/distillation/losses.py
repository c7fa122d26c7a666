"""Distillation losses: pure functions, computed in at least float32, that apply no loss weight.

Shape shorthand used here:

    R: number of sampled RoIs (or dense positions) over all images
    K: number of foreground classes; background is the last column, index K
    N, C, H, W: images, channels, height, width

The teacher's tensors are targets: no gradient flows into them. Normalizers are used as given, so
callers clamp counts to at least 1. Empty input gives a zero that is still connected to the graph.
"""

from typing import Iterable, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Keeps a sum of confidences away from 0; the resolution of float32.
EPS = torch.finfo(torch.float32).eps

Normalizer = Union[float, int, torch.Tensor]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if it is float32 or float64, else ``x`` as float32 (mixed precision)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def connected_zero(zero: torch.Tensor, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """``zero``, a scalar 0, with a graph to all ``parameters``: DDP wants a gradient for each."""
    return sum((p.sum() * 0 for p in parameters), zero)


def kl_divergence(
    cross_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float,
    normalizer: Normalizer,
) -> torch.Tensor:
    """``T^2 * sum_r KL(softmax(teacher_r / T) || softmax(cross_r / T)) / normalizer``.

    The knowledge distillation loss of Hinton et al. (2015), as CrossKD's two-stage heads use it.

    Args:
        cross_logits: (R, K + 1) logits that learn.
        teacher_logits: (R, K + 1) target logits.
        temperature: T > 0.
        normalizer: the divisor of the sum over rows and columns.

    Returns:
        Scalar loss.
    """
    cross = at_least_float32(cross_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()) / temperature
    divergence = F.kl_div(
        F.log_softmax(cross, dim=1), F.log_softmax(teacher, dim=1), reduction="sum", log_target=True
    )
    return divergence * (temperature**2) / normalizer


def teacher_confidence(
    teacher_logits: torch.Tensor, *, sigmoid: bool = False
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The teacher's best foreground class of each row and its probability.

    Args:
        teacher_logits: (R, K + 1) logits, background last.
        sigmoid: each class has a probability of its own, and background none
            (``USE_SIGMOID_CE``).

    Returns:
        (R,) probabilities (softmax over all K + 1 columns, temperature 1, or sigmoid) and (R,)
        class indices in [0, K).
    """
    logits = at_least_float32(teacher_logits.detach())
    probabilities = logits.sigmoid() if sigmoid else F.softmax(logits, dim=1)
    return probabilities[:, :-1].max(dim=1)


def select_class_boxes(boxes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Row r's four numbers for class ``classes[r]``; a class-agnostic head has only one box.

    Args:
        boxes: (R, 4K) or (R, 4) deltas or coordinates.
        classes: (R,) class indices in [0, K).

    Returns:
        (R, 4) tensor.
    """
    if boxes.shape[1] == 4:
        return boxes
    boxes = boxes.view(boxes.shape[0], boxes.shape[1] // 4, 4)  # RxKx4
    return boxes.gather(1, classes.view(-1, 1, 1).expand(-1, 1, 4)).squeeze(1)


def confident_l1(
    cross_deltas: torch.Tensor,
    teacher_deltas: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    sigmoid: bool = False,
) -> torch.Tensor:
    """``sum_r p_r * |cross_r - teacher_r|_1 / (4 * sum_r p_r + eps)`` on raw box deltas.

    p_r is the probability of the teacher's best foreground class, whose four deltas are compared.
    CrossKD's box loss for two-stage heads.

    Args:
        cross_deltas: (R, 4K) or, class-agnostic, (R, 4) deltas that learn.
        teacher_deltas: the same shape, targets.
        teacher_logits: (R, K + 1).
        sigmoid: as of :func:`teacher_confidence`.

    Returns:
        Scalar loss.
    """
    confidence, classes = teacher_confidence(teacher_logits, sigmoid=sigmoid)
    cross = select_class_boxes(at_least_float32(cross_deltas), classes)
    teacher = select_class_boxes(at_least_float32(teacher_deltas.detach()), classes)
    distance = (cross - teacher).abs().sum(dim=1)  # R
    return (confidence * distance).sum() / (4 * confidence.sum() + EPS)


def confident_giou(
    cross_boxes: torch.Tensor,
    teacher_boxes: torch.Tensor,
    confidence: torch.Tensor,
    *,
    normalizer: Normalizer,
) -> torch.Tensor:
    """``sum_r confidence_r * (1 - GIoU(cross_r, teacher_r)) / normalizer``.

    Args:
        cross_boxes: (R, 4) absolute xyxy boxes that learn.
        teacher_boxes: (R, 4) absolute xyxy targets.
        confidence: (R,) weights in [0, 1].
        normalizer: the divisor of the sum.

    Returns:
        Scalar loss.
    """
    cross, teacher = at_least_float32(cross_boxes), at_least_float32(teacher_boxes.detach())
    intersection, union = _overlap(cross, teacher)
    hull = _product(
        torch.max(cross[:, 2:], teacher[:, 2:]) - torch.min(cross[:, :2], teacher[:, :2])
    )
    loss = 1 - intersection / (union + EPS) + (hull - union) / (hull + EPS)
    return (at_least_float32(confidence.detach()) * loss).sum() / normalizer


def confident_iou(
    cross_boxes: torch.Tensor,
    teacher_boxes: torch.Tensor,
    confidence: torch.Tensor,
    *,
    normalizer: Normalizer,
) -> torch.Tensor:
    """``sum_r confidence_r * -log(max(IoU(cross_r, teacher_r), 1e-6)) / normalizer``.

    The IoU loss of UnitBox (Yu et al., 2016). Arguments as in ``confident_giou``.
    """
    cross, teacher = at_least_float32(cross_boxes), at_least_float32(teacher_boxes.detach())
    intersection, union = _overlap(cross, teacher)
    # Two empty boxes have no IoU: their union of 0 would divide to NaN.
    iou = intersection / union.clamp(min=EPS)
    loss = -iou.clamp(min=1e-6).log()
    return (at_least_float32(confidence.detach()) * loss).sum() / normalizer


def _overlap(a: torch.Tensor, b: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Areas of intersection and union of (R, 4) boxes, row by row.

    Without masks, which make a GPU wait (torchvision's and fvcore's GIoU losses have them).
    """
    corners = torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])
    intersection = _product(corners.clamp(min=0))
    areas = (_product(x[:, 2:] - x[:, :2]) for x in (a, b))
    return intersection, sum(areas) - intersection


def _product(sides: torch.Tensor) -> torch.Tensor:
    """Of two columns; the backward of ``prod`` makes a GPU wait."""
    return sides[:, 0] * sides[:, 1]


def quality_focal(
    cross_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    weights: Optional[torch.Tensor] = None,
    normalizer: Normalizer,
) -> torch.Tensor:
    """``sum w * |p - q|^beta * BCE(p, q) / normalizer`` with p = sigmoid(cross), q =
    sigmoid(teacher).

    Quality focal loss (Li et al., 2020, eq. 3) with the teacher's probability as the quality. The
    factor |p - q|^beta is not detached. It can be differentiated once.

    Args:
        cross_logits: (R, K) logits that learn; R may be several dimensions, and strides are free.
        teacher_logits: (R, K) target logits.
        beta: exponent of the modulating factor, at least 1.
        weights: (R,) weight of each row; 1 if not given.
        normalizer: the divisor of the sum over rows and columns.

    Returns:
        Scalar loss.
    """
    cross, teacher = at_least_float32(cross_logits), at_least_float32(teacher_logits.detach())
    weights = None if weights is None else at_least_float32(weights.detach())
    return _QualityFocal.apply(cross, teacher, weights, beta) / normalizer


class _QualityFocal(torch.autograd.Function):
    """The sum of :func:`quality_focal`, whose gradient is computed along with it.

    Dense detectors have millions of terms: a graph of all operations on them would cost several
    times the memory and half as much time again.
    """

    @staticmethod
    def forward(ctx, cross, teacher, weights, beta):
        q = teacher.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(cross, q, reduction="none")
        p = cross.sigmoid()
        distance = torch.sub(p, q, out=q)
        factor = distance.abs() if beta == 1 else distance.abs().pow_(beta)
        rows = (factor * entropy).sum(dim=-1)
        if weights is not None:
            rows = rows * weights
        if ctx.needs_input_grad[0]:
            # d|p - q|^b / dx = b |p - q|^(b - 1) sign(p - q) p (1 - p); dBCE / dx = p - q
            if beta == 1:
                factor = distance.sign()
            else:
                factor = distance.abs().pow_(beta - 1).mul_(distance.sign())
            gradient = p.mul_(1 - p).mul_(entropy).mul_(beta).addcmul_(distance, distance)
            gradient = gradient.mul_(factor)
            if weights is not None:
                gradient.mul_(weights.unsqueeze(-1))
            ctx.save_for_backward(gradient)
        return rows.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def channel_statistics(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, unbiased standard deviation and ``x - mean`` of each channel (dim 1) over all other
    dims.

    With one element per channel the deviation is 0; ``torch.std`` would give NaN there. A channel
    without deviation has a gradient of 0 through it.

    Args:
        x: (N, C, ...) with at least one element per channel.

    Returns:
        Mean and deviation shaped (1, C, 1, ...), to broadcast against ``x``, and a tensor shaped as
        ``x``, the only one of its size that the graph keeps.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dim=dims, keepdim=True)
    centered = x - mean
    count = x.numel() // x.shape[1]
    if count == 1:
        return mean, torch.zeros_like(mean), centered
    norm = torch.linalg.vector_norm(centered, dim=dims, keepdim=True)
    return mean, norm / (count - 1) ** 0.5, centered


def pkd(student_feature: torch.Tensor, teacher_feature: torch.Tensor) -> torch.Tensor:
    """``mean((norm(student) - norm(teacher))^2) / 2`` with each channel normalised over (N, H, W).

    PKD, distillation by the Pearson correlation coefficient (Cao et al., 2022).

    Args:
        student_feature: (N, C, H, W) feature that learns.
        teacher_feature: (N, C, H, W) target.

    Returns:
        Scalar loss.
    """
    student = at_least_float32(student_feature)
    if student.numel() == 0:
        return student.sum() * 0
    teacher = at_least_float32(teacher_feature.detach())
    return F.mse_loss(_normalize(student), _normalize(teacher)) / 2


def _normalize(x: torch.Tensor) -> torch.Tensor:
    _, std, centered = channel_statistics(x)
    return centered / (std + 1e-6)
