"""The data stream, under the path that docs promise; see :mod:`crosskd_ifc.training.stream`."""

from .training.records import usable_records
from .training.stream import TrainingStream

__all__ = ["TrainingStream", "usable_records"]
