"""CrossKD-IFC for Detectron2: distil a big detector into a small one through the teacher's own
head.

Importing this package registers its architectures, proposal generator, ROI heads, fusions, types
of losses and built-in data sets.
"""

import importlib.util
import os

from .common import known_warnings  # noqa: F401  first: the imports below give them

if importlib.util.find_spec("detectron2") is None:  # no package index has it
    raise ImportError(
        "detectron2 is not installed; this does it, every file verified: python "
        + os.path.join(os.path.dirname(os.path.realpath(__file__)), "tools/install_detectron2.py")
    )

# isort: split
from .config import ConfigError, add_crosskd_ifc_config
from .data.shapes import AT_256, FEW, LARGE, register_coarse_shapes, register_shapes
from .distillation.fusion import FEATURE_FUSION_REGISTRY, standardize_like
from .distillation.loss_types import (
    BOX_LOSS_REGISTRY,
    CLS_LOSS_REGISTRY,
    FEATURE_LOSS_REGISTRY,
    channel_wise,
    decoupled_kl,
    dist,
    gap_giou,
    score_gap,
)
from .distillation.losses import (
    confident_giou,
    confident_iou,
    confident_l1,
    kl_divergence,
    pkd,
    quality_focal,
)
from .distillation.teacher import Teacher
from .modeling import backbones, timm_backbones  # noqa: F401  register backbones
from .modeling.attach import attach_teacher
from .modeling.fcos import FCOS, CrossKDFCOS
from .modeling.rcnn import CrossKDRCNN
from .modeling.retinanet import CrossKDRetinaNet
from .modeling.roi_heads import CrossKDCascadeROIHeads, CrossKDROIHeads
from .modeling.rpn import CrossKDRPN
from .training.trainer import CrossKDTrainer
from .version import __version__

register_shapes()
register_coarse_shapes()
register_shapes("crosskd_shapes_large", **LARGE)
register_shapes("crosskd_shapes_256", **AT_256)
register_shapes("crosskd_shapes_few", **FEW)

__all__ = [
    "__version__",
    "BOX_LOSS_REGISTRY",
    "CLS_LOSS_REGISTRY",
    "FCOS",
    "FEATURE_FUSION_REGISTRY",
    "FEATURE_LOSS_REGISTRY",
    "ConfigError",
    "CrossKDCascadeROIHeads",
    "CrossKDFCOS",
    "CrossKDRCNN",
    "CrossKDRPN",
    "CrossKDROIHeads",
    "CrossKDRetinaNet",
    "CrossKDTrainer",
    "Teacher",
    "add_crosskd_ifc_config",
    "attach_teacher",
    "channel_wise",
    "confident_giou",
    "confident_iou",
    "confident_l1",
    "decoupled_kl",
    "dist",
    "gap_giou",
    "kl_divergence",
    "pkd",
    "quality_focal",
    "score_gap",
    "standardize_like",
]
