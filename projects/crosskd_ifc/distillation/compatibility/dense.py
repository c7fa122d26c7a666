"""Whether a dense student and teacher fit each other."""

from typing import Dict

from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from ...config import ConfigError, fusion_name, fusion_route
from ..fusion import FeatureFusion
from ..head_layers import TOWERS, towers_of
from ..loss_types import BOX_LOSS_REGISTRY
from ..teacher import Teacher
from .anchors import check_same_padding, differing_anchors
from .fusions import make_fusion
from .settings import check_unused
from .two_stage import refuse_teacher


def check_settings(cfg: CfgNode) -> None:
    """Refuse settings of two-stage detectors."""
    kd = cfg.MODEL.CROSSKD
    reason = f"{cfg.MODEL.META_ARCHITECTURE} is a dense detector"
    check_unused(kd, ("LOSS.TEMPERATURE", "LOSS.RPN_WEIGHT", "TEACHER.STAGE"), reason)
    types = f"{reason}, whose classification loss is always quality focal"
    check_unused(kd, ("LOSS.CLS_TYPE", "LOSS.CLS_OPTS"), types)
    if kd.FUSION.ALIGN not in ("", "standardize", "standardize_taps"):
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.ALIGN is {kd.FUSION.ALIGN!r}, but {reason}, whose features are "
            "always standardized; possible values: '', 'standardize', 'standardize_taps'"
        )
    names = BOX_LOSS_REGISTRY.names()
    if kd.LOSS.BOX_TYPE not in ("", *names):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.BOX_TYPE is {kd.LOSS.BOX_TYPE!r}, but {reason}; possible values: "
            f"{', '.join(map(repr, names))}"
        )


def check_pair(student: DenseDetector, teacher: Teacher) -> None:
    """Refuse a teacher of another kind, other anchors or padding, and heads of unknown layers.

    Raises:
        ConfigError: with the reason.
    """
    model, stock = teacher.model, student.stock_class
    if not isinstance(model, stock):
        refuse_teacher(
            teacher, f"is a {type(model).__name__}; this student needs a {stock.__name__}"
        )
    try:
        towers_of(student.head)
    except TypeError as error:
        raise ConfigError(f"MODEL.META_ARCHITECTURE: the student's {error}") from None
    try:
        towers_of(model.head)
    except TypeError as error:
        refuse_teacher(teacher, f"can't be entered: {error}")
    check_same_padding("TEACHER.CONFIG_FILE", student, teacher, "they must be the same")
    differs = differing_anchors(
        student.anchor_generator, model.anchor_generator, "the strides of IN_FEATURES"
    )
    if differs:
        refuse_teacher(teacher, f"has other anchors than the student: {differs} differ")


def build_fusions(
    cfg: CfgNode, student: DenseDetector, teacher: Teacher
) -> Dict[str, FeatureFusion]:
    """One fusion for each tower.

    Args:
        cfg: the student's config.
    """
    kd = cfg.MODEL.CROSSKD.FUSION
    ours, theirs = (towers_of(model.head) for model in (student, teacher.model))
    usual = tuple(f"conv{i + 1}" for i in range(student.kd_depth))
    taps = tuple(kd.IN_FEATURES) or (usual[::-1] if fusion_name(cfg) == "none" else usual)
    align = kd.ALIGN or "standardize"
    fusions = {
        tower: make_fusion(
            *(cfg, taps, kd.ENTRY, align, ours[tower], theirs[tower]),
            head=f"{tower} tower",
        )
        for tower in TOWERS
    }
    if fusion_route(cfg) == "through":
        _check_norms(teacher)
    return fusions


def _check_norms(teacher: Teacher) -> None:
    if any(isinstance(m, CycleBatchNormList) for m in teacher.model.head.modules()):
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.ROUTE 'through': the teacher's towers ({teacher.description}) "
            "have a BatchNorm for each level, which counts its calls; use 'direct', or a teacher "
            "with another MODEL.RETINANET.NORM"
        )
