"""The trainer, under the path that docs promise; see :mod:`crosskd_ifc.training.trainer`."""

from .training.optimizer import set_fusion_weight_decay
from .training.schedule import scale_schedule
from .training.trainer import CrossKDTrainer

__all__ = ["CrossKDTrainer", "scale_schedule", "set_fusion_weight_decay"]
