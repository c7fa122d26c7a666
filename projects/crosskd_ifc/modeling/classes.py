"""The classes of student and teacher: their names, and how they correspond."""

import logging
from typing import Optional

from detectron2.config import CfgNode
from torch import nn

from ..config import ConfigError, class_count
from ..data.class_names import class_names
from ..distillation.compatibility import class_map
from ..distillation.compatibility.class_map import ClassMap
from ..distillation.loss_types.classification import needs_targets
from ..distillation.teacher import Teacher

logger = logging.getLogger(__name__)


def needs_class_map(cfg: CfgNode) -> str:
    """What compares predictions class by class under this config, "" if nothing does."""
    kd = cfg.MODEL.CROSSKD
    if kd.MIMIC != "cross_head":
        return f"MODEL.CROSSKD.MIMIC {kd.MIMIC!r}"
    has_masks = cfg.MODEL.MASK_ON and kd.LOSS.MASK_WEIGHT > 0
    if has_masks and kd.LOSS.MASK_CHANNELS == "ground_truth":
        return "MODEL.CROSSKD.LOSS.MASK_CHANNELS 'ground_truth'"
    if kd.LOSS.CLS_WEIGHT > 0 and needs_targets(kd.LOSS.CLS_TYPE):
        return f"MODEL.CROSSKD.LOSS.CLS_TYPE {kd.LOSS.CLS_TYPE!r}"
    return ""


def build_class_map(
    cfg: CfgNode, student: nn.Module, teacher: Teacher, needed_by: str = ""
) -> Optional[ClassMap]:
    """The map that ``TEACHER.CLASS_MAP`` means; None for a teacher of other classes.

    Args:
        cfg: the student's config.
        needed_by: what compares predictions class by class, "" if nothing does.

    Raises:
        ConfigError: if no map can be made of it.
    """
    ours, theirs = num_classes(student), num_classes(teacher.model)
    kd = cfg.MODEL.CROSSKD.TEACHER
    is_index = class_map.parse(kd.CLASS_MAP)[0] == "index"
    if kd.EVAL_AT_START and is_index:
        needed_by = needed_by or "MODEL.CROSSKD.TEACHER.EVAL_AT_START"
    # Of other classes nothing is compared; else statistics are, if no loss.
    wants_names = is_index or bool(needed_by) or class_map.reads_names(kd.CLASS_MAP)
    names = tuple(class_names(c, cards=wants_names) for c in (cfg, teacher.cfg))
    try:
        found = class_map.resolve(
            kd.CLASS_MAP, num_classes=(ours, theirs), names=names, needed_by=needed_by
        )
    except ValueError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CLASS_MAP: {error} (student: {class_count(cfg)[0]} "
            f"{ours}; teacher: {teacher.description})"
        ) from None
    if is_index and needed_by and None in names:
        whose = " and ".join(w for w, n in zip(("the student's", "the teacher's"), names) if not n)
        logger.warning(
            f"MODEL.CROSSKD.TEACHER.CLASS_MAP (): the names of {whose} classes aren't known, so "
            f"they couldn't be compared; {needed_by} takes both to have the same order"
        )
    if kd.EVAL_AT_START and (found is None or not found.is_identity):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.EVAL_AT_START True needs a teacher of the student's {ours} "
            f"classes in the same order, this one ({teacher.description}) has {theirs} of its own; "
            "set it to False"
        )
    return found


def num_classes(model: nn.Module) -> int:
    """Foreground classes of a two-stage or dense detector."""
    return getattr(model, "roi_heads", model).num_classes
