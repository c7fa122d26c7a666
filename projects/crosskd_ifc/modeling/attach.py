"""Building, loading and checking a teacher, and giving it to a student."""

import functools
import logging
from typing import Dict, Optional, Tuple

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..common.config_files import find_config, merge_from_file, merge_from_list
from ..common.random_state import same_random_state
from ..config import ConfigError, add_crosskd_ifc_config
from ..distillation.compatibility.settings import check_crosskd_config
from ..distillation.teacher import Teacher
from ..weights.reading import MisfitError, StrictReader
from ..weights.state_dicts import is_missing
from .building import explained

logger = logging.getLogger(__name__)


def attach_teacher(
    model: nn.Module, cfg: CfgNode, *, teacher: Optional[nn.Module] = None
) -> Teacher:
    """Build, load, check and freeze the teacher and let ``model`` distil from it.

    From then on ``model(batched_inputs)`` in training mode returns the distillation losses too,
    which is all that a training loop needs. Call it before the optimizer and DDP are made: learned
    adapters, if the two heads need any, become parameters of ``model`` (``fusion.*``). The global
    random state is left as it was.

    Args:
        model: a student of a CrossKD meta-architecture, such as :class:`CrossKDRCNN`.
        cfg: the student's config, with ``MODEL.CROSSKD``.
        teacher: an already built detector with weights, instead of
            ``MODEL.CROSSKD.TEACHER.CONFIG_FILE``; it is put into eval mode and frozen in place.

    Returns:
        The attached teacher.

    Raises:
        ConfigError: if a setting can't work or student and teacher don't fit each other.
    """
    check_crosskd_config(cfg)
    if isinstance(model, DistributedDataParallel):
        raise ConfigError("attach the teacher to the model before it is wrapped in DDP")
    if not hasattr(model, "set_teacher"):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {type(model).__name__} can't distil; use CrossKDRCNN, "
            "CrossKDRetinaNet or CrossKDFCOS"
        )
    kd = cfg.MODEL.CROSSKD
    with same_random_state(model.device):
        options = {"student_format": cfg.INPUT.FORMAT, "precision": kd.TEACHER.PRECISION}
        if teacher is None:
            built, weights = _build_teacher(cfg, model.device, options)
            load = functools.partial(_load_strictly, built.model, weights)
        else:
            built, load = Teacher(teacher.to(model.device), **options), None
        model.set_teacher(built, cfg, load=load)
    logger.info(f"Teacher: {built.description}")
    return built


def _build_teacher(
    cfg: CfgNode, device: torch.device, options: Dict[str, str]
) -> Tuple[Teacher, str]:
    """The teacher, still with random weights, and the file or URL of those that it needs."""
    kd = cfg.MODEL.CROSSKD.TEACHER
    if not kd.CONFIG_FILE:
        raise ConfigError(
            "MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty; give a config file or a model-zoo name"
        )
    teacher_cfg, weights = load_teacher_config(cfg)
    teacher_cfg.MODEL.DEVICE = str(device)
    try:
        with explained(teacher_cfg):
            model = build_model(teacher_cfg)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CONFIG_FILE {kd.CONFIG_FILE!r} with TEACHER.OPTS "
            f"{tuple(kd.OPTS)} builds no model: {type(error).__name__} {error}"
        ) from error
    description = f"{type(model).__name__} from {kd.CONFIG_FILE} with weights {weights}"
    return Teacher(model, cfg=teacher_cfg, description=description, **options), weights


def load_teacher_config(cfg: CfgNode) -> Tuple[CfgNode, str]:
    """The teacher's full config, and the file or URL of its weights.

    Args:
        cfg: the student's config.

    Raises:
        ConfigError: if the config can't be found or read, or no weights are named.
    """
    kd = cfg.MODEL.CROSSKD.TEACHER
    path, zoo_name = find_config(kd.CONFIG_FILE, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")
    teacher_cfg = get_cfg()
    add_crosskd_ifc_config(teacher_cfg)
    merge_from_file(teacher_cfg, path, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")
    merge_from_list(teacher_cfg, kd.OPTS, key=f"MODEL.CROSSKD.TEACHER.OPTS {tuple(kd.OPTS)}")
    if kd.WEIGHTS:
        return teacher_cfg, kd.WEIGHTS
    try:
        return teacher_cfg, model_zoo.get_checkpoint_url(zoo_name)
    except (RuntimeError, ValueError):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS is empty, and {kd.CONFIG_FILE!r} is no model-zoo name "
            "with a trained checkpoint; give the file or URL of the teacher's trained weights "
            "(the MODEL.WEIGHTS in its config is only where its own training started)"
        ) from None


def check_teacher_weights(weights: str) -> None:
    """Refuse a local path without a file.

    Raises:
        ConfigError: naming the key.
    """
    if is_missing(weights):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS: there is no file {weights!r}; train the teacher "
            "first, or give the file of its trained weights"
        )


def _load_strictly(model: nn.Module, weights: str) -> None:
    """Load a file or URL into ``model``; whatever is wrong with it is a :class:`ConfigError`."""
    check_teacher_weights(weights)
    try:
        StrictReader(model).load(weights)
    except MisfitError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS {weights!r} does not fit the model of "
            f"TEACHER.CONFIG_FILE (with TEACHER.OPTS). Weights {error}"
        ) from None
    except (
        Exception
    ) as error:  # on foreign bytes and failed downloads, readers raise what they like
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.WEIGHTS {weights!r} can't be read as weights: "
            f"{type(error).__name__} {reason}"
        ) from error
