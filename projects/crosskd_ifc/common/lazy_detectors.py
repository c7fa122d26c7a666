"""What the keys of a yacs config would say of a detector that was built without one."""

from typing import Any, Mapping, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..config import META_ARCHITECTURES, ConfigError, head_section
from .config_files import default_config


def config_of(model: nn.Module, *, input_format: str, datasets: Sequence[str] = ()) -> CfgNode:
    """A config with the keys that the distillation reads of a detector.

    Args:
        model: the detector.
        input_format: channel order of its images.
        datasets: what it is trained on, for the names of its classes.
    """
    heads = getattr(model, "roi_heads", None)
    cfg = _config_of_kind(
        type(model),
        classes=getattr(heads or model, "num_classes", None),
        masks=bool(getattr(heads, "mask_on", False)),
        keypoints=bool(getattr(heads, "keypoint_on", False)),
    )
    cfg.INPUT.FORMAT = input_format
    cfg.DATASETS.TRAIN = tuple(datasets)
    return cfg


def config_of_node(config: DictConfig) -> CfgNode:
    """:func:`config_of` of the ``model`` of a LazyConfig, without building it.

    Without INPUT.FORMAT; MODEL.META_ARCHITECTURE is the one that distils where the model is one.
    """
    node = config.model
    kind, heads = node.get("_target_"), node.get("roi_heads")
    kind = locate(kind) if isinstance(kind, str) else kind
    classes = select(node if heads is None else heads, "num_classes")
    cfg = _config_of_kind(
        kind if isinstance(kind, type) else nn.Module,  # a function may build it
        classes=classes if isinstance(classes, int) else None,
        masks=heads is not None and heads.get("mask_in_features") is not None,
        keypoints=heads is not None and heads.get("keypoint_in_features") is not None,
    )
    names = [x.__name__ for x in getattr(kind, "__mro__", ()) if x.__name__ in META_ARCHITECTURES]
    cfg.MODEL.META_ARCHITECTURE = names[0] if names else cfg.MODEL.META_ARCHITECTURE
    cfg.DATASETS.TRAIN = tuple(dataset_names(config, "train"))
    return cfg


def _config_of_kind(kind: type, *, classes: Optional[int], masks: bool, keypoints: bool) -> CfgNode:
    cfg = default_config()
    kinds = {RetinaNet: "RetinaNet", FCOS: "FCOS"}
    stock = [name for stock, name in kinds.items() if issubclass(kind, stock)]
    cfg.MODEL.META_ARCHITECTURE = stock[0] if stock else "GeneralizedRCNN"
    if classes is not None:
        cfg.MODEL[head_section(cfg)].NUM_CLASSES = classes
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = masks, keypoints
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
    input_format = getattr(model, "input_format", None)
    if not input_format:
        raise ConfigError(
            f"{type(model).__name__}: the student has no input_format; build it with the channel "
            "order that its data loader reads, such as 'BGR'"
        )
    cfg = config_of(model, input_format=input_format)
    merge_settings(cfg, settings)
    return cfg


def merge_settings(cfg: CfgNode, settings: Mapping[str, Any]) -> None:
    """Take the settings of the distillation, as of :func:`student_config`, into a config.

    Raises:
        ConfigError: for an unknown key or a value of another type.
    """
    cfg.INPUT.MAX_SIZE_TRAIN = 0  # not known: the teacher looks at each batch
    try:
        if OmegaConf.is_config(settings):
            settings = OmegaConf.to_container(settings, resolve=True)
        cfg.MODEL.CROSSKD.merge_from_other_cfg(CfgNode(dict(settings)))
        if cfg.MODEL.CROSSKD.IMPORTS:
            raise ValueError("IMPORTS is for YAML configs; import your code where these are set")
    except (AttributeError, KeyError, OmegaConfBaseException, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise ConfigError(f"the settings of the distillation: {reason}") from error


def input_format_of(own: Optional[str], cfg: DictConfig, *, what: str) -> Optional[str]:
    """The channel order of the images of a LazyConfig's detector; None if nothing tells.

    ``model.input_format`` is only for pictures in training, and detectron2's FCOS has none: what
    the weights have seen is what the data loader reads.

    Args:
        own: its ``input_format``, None if it has none.
        cfg: its LazyConfig.
        what: for the error.

    Raises:
        ConfigError: if both say something else.
    """
    read = select(cfg, "dataloader.train.mapper.image_format")
    if own and read and own != read:
        raise ConfigError(
            f"{what}: model.input_format is {own!r} and dataloader.train.mapper.image_format "
            f"{read!r}; make them what the weights were trained with"
        )
    return own or read


def unknown_input_format(what: str) -> ConfigError:
    """The error where :func:`input_format_of` tells nothing, but has to; argument as there."""
    return ConfigError(
        f"{what}: neither model.input_format nor dataloader.train.mapper.image_format says the "
        "channel order of the images; set one, such as 'BGR'"
    )


def dataset_names(cfg: DictConfig, split: str) -> Sequence[str]:
    """The names of the data sets of ``dataloader.train`` or ``.test``; () if they aren't known."""
    names = select(cfg, f"dataloader.{split}.dataset.names")
    if isinstance(names, str):
        return (names,)
    known = isinstance(names, (list, tuple, ListConfig)) and all(isinstance(n, str) for n in names)
    return tuple(names) if known else ()


def select(cfg: DictConfig, key: str) -> Any:
    """What is at this path, None if there is nothing."""
    try:
        return OmegaConf.select(cfg, key, default=None)
    except Exception:  # below another kind of value, or an interpolation that leads nowhere
        return None
