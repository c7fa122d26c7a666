"""The fusions, under the path that docs promise; see :mod:`crosskd_ifc.distillation.fusion`."""

from .distillation.fusion import *  # noqa: F401,F403
