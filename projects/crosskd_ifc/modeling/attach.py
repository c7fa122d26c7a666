"""Building, loading and checking a teacher, and giving it to a student."""

import functools
import logging
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from ..common.building import build_detector
from ..common.config_files import (
    default_config,
    find_config,
    merge_from_file,
    merge_from_list,
)
from ..common.lazy_config import instantiate_model, is_lazy, load_lazy_config
from ..common.lazy_detectors import (
    config_of,
    dataset_names,
    input_format_of,
    student_config,
    unknown_input_format,
)
from ..common.paths import tried
from ..common.random_state import same_random_state
from ..config import ConfigError, error_prefix, teacher_configs
from ..data.class_names import fill_in_class_count
from ..distillation.compatibility.settings import check_crosskd_config
from ..distillation.teacher import Teacher, padded_square
from ..weights.held_config import check_class_order, differing_keys
from ..weights.state_dicts import is_missing
from ..weights.strict import load_strictly
from .student import TeacherCandidate

logger = logging.getLogger(__name__)


def attach_teacher(
    model: nn.Module,
    cfg: Union[CfgNode, Mapping[str, Any]],
    *,
    teacher: Optional[nn.Module] = None,
) -> Teacher:
    """Build, load, check and freeze the teacher and let ``model`` distil from it.

    From then on ``model(batched_inputs)`` in training mode returns the distillation losses too,
    which is all that a training loop needs. Call it before the optimizer and DDP are made: learned
    adapters, if the two heads need any, become parameters of ``model`` (``fusion.*``). The global
    random state is left as it was.

    Args:
        model: a student of a CrossKD meta-architecture, such as ``CrossKDRCNN``.
        cfg: the student's config, with ``MODEL.CROSSKD``; of a student that was built without one
            (LazyConfig) only these settings, a mapping such as
            ``{"TEACHER": {"CONFIG_FILE": ..., "WEIGHTS": ...}}``.
        teacher: an already built detector with weights, instead of
            ``MODEL.CROSSKD.TEACHER.CONFIG_FILE`` and of all TEACHERS; it is put into eval mode and
            frozen in place.

    Returns:
        The attached teacher; of several the first, all are ``model.teachers``.

    Raises:
        ConfigError: if a setting can't work or student and teacher don't fit each other.
    """
    if isinstance(model, DistributedDataParallel):
        raise ConfigError("attach the teacher to the model before it is wrapped in DDP")
    if not isinstance(cfg, CfgNode):
        return _attach_by_settings(model, cfg, teacher)
    check_crosskd_config(cfg)
    if not hasattr(model, "set_teachers"):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {type(model).__name__} can't distil; use CrossKDRCNN, "
            "CrossKDRetinaNet or CrossKDFCOS"
        )
    with same_random_state(model.device):
        candidates = []
        for name, one in teacher_configs(cfg) if teacher is None else [("", cfg)]:
            with error_prefix(name):
                candidates.append(_candidate(model, one, teacher, name))
        model.set_teachers(candidates, loss=cfg.MODEL.CROSSKD.TEACHERS_LOSS)
    for candidate in candidates:
        logger.info(f"Teacher: {candidate.teacher.description}")
    return candidates[0].teacher


def _candidate(
    model: nn.Module, cfg: CfgNode, teacher: Optional[nn.Module], name: str
) -> TeacherCandidate:
    """One teacher, built where none is given; see :class:`.student.TeacherCandidate`."""
    precision, load = cfg.MODEL.CROSSKD.TEACHER.PRECISION, None
    options = {"student_format": cfg.INPUT.FORMAT, "precision": precision}
    if teacher is None:
        built, weights = _build_teacher(cfg, model.device, options)
        is_code = is_lazy(cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE)
        load = functools.partial(_load, built.model, weights, None if is_code else built.cfg)
    else:
        ours = {id(p) for p in model.parameters() if p.requires_grad}
        if any(id(parameter) in ours for parameter in teacher.parameters()):
            raise ConfigError(
                "the given teacher shares parameters with the student that the student trains, "
                "and a teacher is frozen; give a copy (copy.deepcopy)"
            )
        norms = {x for x in model.modules() if isinstance(x, _NormBase)}
        if not norms.isdisjoint(teacher.modules()):
            raise ConfigError(
                "the given teacher shares BatchNorm layers with the student, whose training would "
                "change the teacher; give a copy (copy.deepcopy)"
            )
        built = Teacher(teacher.to(model.device), **options)
    _check_square(cfg, built)
    return TeacherCandidate(built, cfg, load, name)


def _attach_by_settings(
    model: nn.Module, settings: Mapping[str, Any], teacher: Optional[nn.Module]
) -> Teacher:
    try:
        return attach_teacher(model, student_config(model, settings), teacher=teacher)
    except ConfigError as error:  # which names keys of a yacs config
        raise ConfigError(str(error).replace("MODEL.CROSSKD.", "")) from error


def _check_square(cfg: CfgNode, teacher: Teacher) -> None:
    square, largest = padded_square(teacher.model), cfg.INPUT.MAX_SIZE_TRAIN
    if square and largest > square:
        raise ConfigError(
            f"INPUT.MAX_SIZE_TRAIN is {largest}, but the teacher ({teacher.description}) pads all "
            f"images to {square} x {square}; lower it to {square}, or raise the teacher's "
            "square_pad (TEACHER.OPTS model.backbone.square_pad=...)"
        )


def _build_teacher(
    cfg: CfgNode, device: torch.device, options: Dict[str, str]
) -> Tuple[Teacher, str]:
    """The teacher, still with random weights, and the file or URL of those that it needs."""
    kd = cfg.MODEL.CROSSKD.TEACHER
    if not kd.CONFIG_FILE:
        raise ConfigError(
            "MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty; give a config file or a model-zoo name"
        )
    config, weights = load_teacher_config(cfg)
    what = (
        f"MODEL.CROSSKD.TEACHER.CONFIG_FILE {kd.CONFIG_FILE!r} with TEACHER.OPTS {tuple(kd.OPTS)}"
    )
    if isinstance(config, CfgNode):
        teacher_cfg = config
        teacher_cfg.MODEL.DEVICE = str(device)
        model = build_detector(teacher_cfg, what=what)
        # An architecture may not keep it.
        input_format = getattr(model, "input_format", None) or teacher_cfg.INPUT.FORMAT
    else:
        model = instantiate_model(config, what=what).to(device)
        own_format = getattr(model, "input_format", None)
        input_format = input_format_of(own_format, config, what=what)
        is_detector = hasattr(model, "pixel_mean")  # of what is none another error tells
        if input_format is None and is_detector:
            raise unknown_input_format(what)
        datasets = dataset_names(config, "train")
        teacher_cfg = config_of(model, input_format=input_format, datasets=datasets)
        teacher_cfg.INPUT = cfg.INPUT.clone()  # that of LazyConfigs is code
    description = f"{type(model).__name__} from {kd.CONFIG_FILE} with weights {weights}"
    options = {"cfg": teacher_cfg, "input_format": input_format, **options}
    return Teacher(model, description=description, **options), weights


def load_teacher_config(
    cfg: CfgNode, *, without_data: bool = False
) -> Tuple[Union[CfgNode, DictConfig], str]:
    """The teacher's full config, and the file or URL of its weights.

    Args:
        cfg: the student's config; of several teachers the first is meant.
        without_data: as for :func:`fill_in_class_count`.

    Returns:
        A yacs config or, where TEACHER.CONFIG_FILE is a ``.py`` file, what that defines.

    Raises:
        ConfigError: if the config can't be found or read, or no weights are named.
    """
    kd = teacher_configs(cfg)[0][1].MODEL.CROSSKD.TEACHER
    path, zoo_name = find_config(kd.CONFIG_FILE, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")
    if is_lazy(path):
        key = "MODEL.CROSSKD.TEACHER.CONFIG_FILE (with TEACHER.OPTS)"
        teacher_cfg = load_lazy_config(path, kd.OPTS, key=key)
    else:
        teacher_cfg = default_config()
        merge_from_file(teacher_cfg, path, key="MODEL.CROSSKD.TEACHER.CONFIG_FILE")
        merge_from_list(teacher_cfg, kd.OPTS, key=f"MODEL.CROSSKD.TEACHER.OPTS {tuple(kd.OPTS)}")
        fill_in_class_count(teacher_cfg, without_data=without_data)
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
            "first, or give the file of its trained weights. Tried: " + ", ".join(tried(weights))
        )


def _load(model: nn.Module, weights: str, cfg: Optional[CfgNode]) -> None:
    check_teacher_weights(weights)
    source, key = "TEACHER.CONFIG_FILE (with TEACHER.OPTS)", "MODEL.CROSSKD.TEACHER.WEIGHTS"
    held = load_strictly(model, weights, key=key, source=source)
    if cfg is None:
        return
    check_class_order(held, cfg, f"{key} {weights!r}")
    keys = differing_keys(held, cfg, evaluation=False)
    if keys:
        logger.warning(
            f"{key} {weights!r}: the weights were trained with other values of {', '.join(keys)} "
            f"than {source} has, so this teacher may answer wrongly; set them in TEACHER.OPTS"
        )
