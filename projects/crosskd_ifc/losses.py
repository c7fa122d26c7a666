"""The losses, under the path that docs promise; see :mod:`crosskd_ifc.distillation.losses`."""

from .distillation.losses import *  # noqa: F401,F403
