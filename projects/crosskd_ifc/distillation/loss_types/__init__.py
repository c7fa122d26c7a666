"""What ``LOSS.FEATURE_TYPE``, ``LOSS.CLS_TYPE`` and ``LOSS.BOX_TYPE`` may name: the losses of other
methods beside CrossKD's own.

``classification`` compares logits of RoIs, ``boxes`` those of dense detectors (CrossKD's, BCKD),
``feature`` levels of the pyramid; ``generative`` (MGD)
and ``focal_global`` (FGD) are feature losses with learned parameters.

Imports ``losses`` and ``common``.
"""

from .boxes import BOX_LOSS_REGISTRY, gap_giou, score_gap
from .classification import CLS_LOSS_REGISTRY, decoupled_kl, dist
from .feature import FEATURE_LOSS_REGISTRY, channel_wise
from .focal_global import FocalGlobalLoss
from .generative import MaskedGenerativeLoss

__all__ = [
    "BOX_LOSS_REGISTRY",
    "CLS_LOSS_REGISTRY",
    "FEATURE_LOSS_REGISTRY",
    "FocalGlobalLoss",
    "MaskedGenerativeLoss",
    "channel_wise",
    "decoupled_kl",
    "dist",
    "gap_giou",
    "score_gap",
]
