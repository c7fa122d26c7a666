"""The losses, under the path that docs promise; see :mod:`crosskd_ifc.distillation.losses`."""

from .distillation.loss_types import channel_wise, decoupled_kl, dist  # noqa: F401
from .distillation.losses import *  # noqa: F401,F403
