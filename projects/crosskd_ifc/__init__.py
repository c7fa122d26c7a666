"""CrossKD-IFC for Detectron2: distil a big detector into a small one through the teacher's own
head.

Importing this package registers its architectures, proposal generator, ROI heads, fusions and
built-in data sets.
"""

from . import top_blocks  # noqa: F401  registers backbones
from .config import ConfigError, add_crosskd_ifc_config
from .fcos import FCOS, CrossKDFCOS
from .fusion import FEATURE_FUSION_REGISTRY, standardize_like
from .losses import (
    confident_giou,
    confident_iou,
    confident_l1,
    kl_divergence,
    pkd,
    quality_focal,
)
from .rcnn import CrossKDRCNN
from .retinanet import CrossKDRetinaNet
from .roi_heads import CrossKDROIHeads
from .rpn import CrossKDRPN
from .shapes import register_coarse_shapes, register_shapes
from .teacher import Teacher, attach_teacher
from .trainer import CrossKDTrainer

__version__ = "0.1.0"

register_shapes()
register_coarse_shapes()

__all__ = [
    "FCOS",
    "FEATURE_FUSION_REGISTRY",
    "ConfigError",
    "CrossKDFCOS",
    "CrossKDRCNN",
    "CrossKDRPN",
    "CrossKDROIHeads",
    "CrossKDRetinaNet",
    "CrossKDTrainer",
    "Teacher",
    "add_crosskd_ifc_config",
    "attach_teacher",
    "confident_giou",
    "confident_iou",
    "confident_l1",
    "kl_divergence",
    "pkd",
    "quality_focal",
    "standardize_like",
]
