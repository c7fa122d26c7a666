"""The trainer, under the path that docs promise; see :mod:`crosskd_ifc.training.trainer`."""

from .training.trainer import CrossKDTrainer, scale_schedule, set_fusion_weight_decay

__all__ = ["CrossKDTrainer", "scale_schedule", "set_fusion_weight_decay"]
