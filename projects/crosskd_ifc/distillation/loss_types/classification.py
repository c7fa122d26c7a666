"""Losses between the class logits of RoIs.

Shape shorthand: R RoIs, K foreground classes; background is column K.
"""

import functools
import inspect
from typing import Callable

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from ...common.registry import NamedRegistry, read_options
from ...config import ConfigError
from ..losses import Normalizer, at_least_float32, kl_divergence, quality_focal

CLS_LOSS_REGISTRY = NamedRegistry("CLS_LOSS")
"""
``MODEL.CROSSKD.LOSS.CLS_TYPE`` -> a function that compares logits, without learned parameters.

Called as ``loss(cross_logits, teacher_logits, temperature=LOSS.TEMPERATURE)`` with (R, K + 1)
logits, the first of which learn; returns a scalar, for R = 0 a zero with a graph. An argument
``targets`` asks for the ground truth, (R,) columns of the logits. Other keyword-only arguments with
a default are set by ``LOSS.CLS_OPTS``.
"""

# The types whose options are all weights.
_WEIGHTED = ("dkd", "dist")

# Keeps the correlation of rows without spread at 0; as published.
_TINY = 1e-8


class ClsLoss:
    """A loss of :data:`CLS_LOSS_REGISTRY` with its settings."""

    def __init__(self, loss: CfgNode):
        """
        Args:
            loss: the node MODEL.CROSSKD.LOSS.

        Raises:
            ConfigError: for options that the type doesn't have, and weights below 0.
        """
        function = CLS_LOSS_REGISTRY.get(loss.CLS_TYPE)
        key = f"MODEL.CROSSKD.LOSS.CLS_OPTS (of CLS_TYPE {loss.CLS_TYPE!r})"
        options = read_options(key, loss.CLS_OPTS, function)
        if loss.CLS_TYPE in _WEIGHTED and min(options.values(), default=0) < 0:
            raise ConfigError(f"{key} is {tuple(loss.CLS_OPTS)}: no weight may be less than 0")
        self._function = functools.partial(function, temperature=loss.TEMPERATURE, **options)
        self._needs_targets = needs_targets(loss.CLS_TYPE)

    def __call__(
        self,
        cross_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        targets: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The loss, a scalar; ``targets()`` is only called if it asks for them."""
        more = {"targets": targets()} if self._needs_targets else {}
        return self._function(cross_logits, teacher_logits, **more)


class SigmoidClsLoss:
    """``sum |p - q| * BCE(p, q) / R`` over the foreground classes, p and q the sigmoids of the
    logits: of classifiers that score each class by itself (``USE_SIGMOID_CE``).

    They never train the column of background, which is left out. The divisor is that of
    detectron2's own loss of such a classifier.
    """

    def __call__(
        self,
        cross_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        targets: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """As :class:`ClsLoss`."""
        pair = (x[:, :-1] for x in (cross_logits, teacher_logits))
        return quality_focal(*pair, beta=1.0, normalizer=max(len(teacher_logits), 1))


def needs_targets(name: str) -> bool:
    """Whether a loss of the registry asks for the ground truth."""
    return "targets" in inspect.signature(CLS_LOSS_REGISTRY.get(name)).parameters


def dist(
    cross_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float,
    inter: float,
    intra: float,
) -> torch.Tensor:
    """``T^2 * (inter * mean_r(1 - rho(p_r, q_r)) + intra * mean_k(1 - rho(p_.k, q_.k)))``.

    p = softmax(cross / T), q = softmax(teacher / T), and rho is Pearson's correlation: of the
    classes of each row, and of the rows of each class. DIST (Huang et al., 2022).

    As in its authors' code, 1e-8 is added to the product of the two norms that rho divides by.
    Classes whose norms are well below 1e-4 (of 512 RoIs: probabilities of about 1e-6) therefore
    count as uncorrelated, also for equal logits. A higher temperature keeps norms up.

    Args:
        cross_logits: (R, K) logits that learn.
        teacher_logits: (R, K) target logits.
        temperature: T > 0.
        inter: weight of the relations within rows.
        intra: weight of those within columns.

    Returns:
        Scalar loss.
    """
    cross = at_least_float32(cross_logits)
    if cross.numel() == 0:
        return cross.sum() * 0
    p = F.softmax(cross / temperature, dim=1)
    q = F.softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=1)
    loss = inter * _uncorrelated(p, q, dim=1) + intra * _uncorrelated(p, q, dim=0)
    return loss * temperature**2


def _uncorrelated(p: torch.Tensor, q: torch.Tensor, dim: int) -> torch.Tensor:
    """1 - the mean correlation of the vectors along ``dim``."""
    p, q = (x - x.mean(dim=dim, keepdim=True) for x in (p, q))
    lengths = torch.linalg.vector_norm(p, dim=dim) * torch.linalg.vector_norm(q, dim=dim)
    return 1 - ((p * q).sum(dim=dim) / (lengths + _TINY)).mean()


def decoupled_kl(
    cross_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    normalizer: Normalizer,
) -> torch.Tensor:
    """``T^2 * sum_r [alpha * KL(b^t_r || b^z_r) + beta * KL(q^t_r || q^z_r)] / normalizer``.

    b is the probability (softmax at temperature T) of the target class and of all others together;
    q are the probabilities of the others among themselves, softmax over all columns but the
    target's. Decoupled knowledge distillation (Zhao et al., 2022); with ``beta`` equal to 1 - the
    teacher's probability of the target it would be :func:`kl_divergence`.

    Args:
        cross_logits: (R, K) logits that learn, K at least 2.
        teacher_logits: (R, K) target logits.
        targets: (R,) column of each row's ground truth.
        temperature: T > 0.
        alpha: weight of the target's part.
        beta: weight of the other classes' part.
        normalizer: the divisor of the sum over rows.

    Returns:
        Scalar loss.
    """
    cross = at_least_float32(cross_logits) / temperature
    teacher = at_least_float32(teacher_logits.detach()) / temperature
    (b, q), (wanted_b, wanted_q) = (_decoupled(x, targets) for x in (cross, teacher))
    target = F.kl_div(b, wanted_b, reduction="sum", log_target=True)
    others = F.kl_div(q, wanted_q, reduction="sum", log_target=True)
    return (alpha * target + beta * others) * temperature**2 / normalizer


def _decoupled(x: torch.Tensor, targets: torch.Tensor):
    """Log probabilities: (R, 2) of target and all others, and (R, K - 1) among the others."""
    columns = x.shape[1]
    # The columns after the target's, around: a mask of the others would make a GPU wait.
    steps = torch.arange(1, columns, device=x.device)
    others = x.gather(1, (targets.view(-1, 1) + steps) % columns)  # Rx(K-1)
    pair = torch.stack([x.gather(1, targets.view(-1, 1)).squeeze(1), others.logsumexp(1)], dim=1)
    return F.log_softmax(pair, dim=1), F.log_softmax(others, dim=1)


@CLS_LOSS_REGISTRY.register(name="kl")
def _kl(cross_logits, teacher_logits, *, temperature):
    rows = max(len(teacher_logits), 1)
    return kl_divergence(cross_logits, teacher_logits, temperature=temperature, normalizer=rows)


@CLS_LOSS_REGISTRY.register(name="dkd")
def _dkd(cross_logits, teacher_logits, *, targets, temperature, alpha=1.0, beta=0.25):
    return decoupled_kl(
        cross_logits,
        teacher_logits,
        targets,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        normalizer=max(len(teacher_logits), 1),
    )


@CLS_LOSS_REGISTRY.register(name="dist")
def _dist(cross_logits, teacher_logits, *, temperature, inter=1.0, intra=1.0):
    return dist(cross_logits, teacher_logits, temperature=temperature, inter=inter, intra=intra)
