"""The data stream, under the path that docs promise; see :mod:`crosskd_ifc.training.stream`."""

from .training.stream import TrainingStream

__all__ = ["TrainingStream"]
