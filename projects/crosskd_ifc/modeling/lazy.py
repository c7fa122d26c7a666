"""What the keys of a yacs config would say of a detector that was built without one."""

from typing import Any, Mapping, Optional, Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import ConfigError, add_crosskd_ifc_config, head_section


def config_of(model: nn.Module, *, input_format: str, datasets: Sequence[str] = ()) -> CfgNode:
    """A config with the keys that the distillation reads of a detector.

    Args:
        model: the detector.
        input_format: channel order of its images.
        datasets: what it is trained on, for the names of its classes.
    """
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    heads = getattr(model, "roi_heads", None)
    kinds = {RetinaNet: "RetinaNet", FCOS: "FCOS"}
    stock = [name for kind, name in kinds.items() if isinstance(model, kind)]
    cfg.MODEL.META_ARCHITECTURE = stock[0] if stock else "GeneralizedRCNN"
    classes = getattr(heads or model, "num_classes", None)
    if classes is not None:
        cfg.MODEL[head_section(cfg)].NUM_CLASSES = classes
    cfg.MODEL.MASK_ON = bool(getattr(heads, "mask_on", False))
    cfg.MODEL.KEYPOINT_ON = bool(getattr(heads, "keypoint_on", False))
    cfg.INPUT.FORMAT = input_format
    cfg.DATASETS.TRAIN = tuple(datasets)
    return cfg


def student_config(model: nn.Module, settings: Mapping[str, Any]) -> CfgNode:
    """The config of a student that was built without one.

    Args:
        model: the student; its ``input_format`` is what its data loader reads.
        settings: what ``MODEL.CROSSKD`` would hold, with the keys of its sections as mappings:
            ``{"TEACHER": {"CONFIG_FILE": ..., "WEIGHTS": ...}, "FUSION": {"NAME": "mean"}}``.

    Raises:
        ConfigError: for an unknown key or a value of another type.
    """
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings, resolve=True)
    input_format = getattr(model, "input_format", None)
    if not input_format:
        raise ConfigError(
            f"{type(model).__name__}: the student has no input_format; build it with the channel "
            "order that its data loader reads, such as 'BGR'"
        )
    cfg = config_of(model, input_format=input_format)
    cfg.INPUT.MAX_SIZE_TRAIN = 0  # not known: the teacher looks at each batch
    try:
        cfg.MODEL.CROSSKD.merge_from_other_cfg(CfgNode(dict(settings)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise ConfigError(f"the settings of the distillation: {reason}") from error
    return cfg


def input_format_of(model: nn.Module, cfg: DictConfig, *, what: str) -> Optional[str]:
    """The channel order of the images of a LazyConfig's detector; None if nothing tells.

    ``model.input_format`` is only for pictures in training, and detectron2's FCOS has none: what
    the weights have seen is what the data loader reads.

    Args:
        model: the detector.
        cfg: its LazyConfig.
        what: for the error.

    Raises:
        ConfigError: if both say something else.
    """
    own = getattr(model, "input_format", None)
    read = _select(cfg, "dataloader.train.mapper.image_format")
    if own and read and own != read:
        raise ConfigError(
            f"{what}: model.input_format is {own!r} and dataloader.train.mapper.image_format "
            f"{read!r}; make them what the weights were trained with"
        )
    return own or read


def datasets_of(cfg: DictConfig) -> Sequence[str]:
    """The names of the training data sets of a LazyConfig, () where they aren't known."""
    names = _select(cfg, "dataloader.train.dataset.names")
    if isinstance(names, str):
        return (names,)
    known = isinstance(names, (list, tuple, ListConfig)) and all(isinstance(n, str) for n in names)
    return tuple(names) if known else ()


def _select(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key, default=None)
    except Exception:  # below another kind of value, or an interpolation that leads nowhere
        return None
