"""What ``LOSS.FEATURE_TYPE`` and ``LOSS.CLS_TYPE`` may name: the losses of other methods beside
CrossKD's own.

``classification`` compares logits of RoIs, ``feature`` levels of the pyramid; ``generative`` (MGD)
and ``focal_global`` (FGD) are feature losses with learned parameters.

Imports ``losses`` and ``common``.
"""

from .classification import CLS_LOSS_REGISTRY, decoupled_kl, dist
from .feature import FEATURE_LOSS_REGISTRY, channel_wise
from .focal_global import FocalGlobalLoss
from .generative import MaskedGenerativeLoss

__all__ = [
    "CLS_LOSS_REGISTRY",
    "FEATURE_LOSS_REGISTRY",
    "FocalGlobalLoss",
    "MaskedGenerativeLoss",
    "channel_wise",
    "decoupled_kl",
    "dist",
]
