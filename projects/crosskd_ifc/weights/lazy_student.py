"""The student of a LazyConfig, as a model of detectron2's stock classes."""

import copy
import os
import tempfile
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..common.config_files import find_config, flat
from ..common.lazy_config import calls, instantiate_model, is_saved_lazy, load_lazy_config
from ..common.lazy_detectors import (
    config_of_node,
    dataset_names,
    input_format_of,
    select,
    unknown_input_format,
)
from ..common.safe_yaml import check_yaml
from ..config import ConfigError, head_section
from .metadata import read_metadata
from .stock import STOCK_CLASSES, is_ours

_AUGMENTATIONS = "dataloader.test.mapper.augmentations"
_OF_IMAGES = (
    _AUGMENTATIONS,
    *(f"dataloader.{x}.mapper.image_format" for x in ("train", "test")),
)


class LazyStudent(NamedTuple):
    """A student of a LazyConfig.

    Attributes:
        cfg: what the keys of a yacs config would say of it: classes, thresholds, pixel mean,
            data sets, and the size and channel order of its images.
        path: the file.
        config: what it defines.
        node: the LazyConfig node of ``model``, of stock classes, without interpolations.
        model: that, in evaluation mode, on the CPU, with random weights.
    """

    cfg: CfgNode
    path: str
    config: DictConfig
    node: DictConfig
    model: nn.Module


def build_lazy_student(path: str, overrides: Sequence[str] = ()) -> LazyStudent:
    """Run a LazyConfig file and build its student of stock classes.

    Args:
        path: a file that the user has named: it is code.
        overrides: in LazyConfig's syntax.

    Raises:
        ConfigError: if that fails, or how the images are to be read isn't told.
    """
    path, _ = find_config(path, key="--config-file")
    written = load_lazy_config(path, overrides, key="--config-file")
    config = copy.deepcopy(written)
    cfg = config_of_node(config)
    for parent in calls(config.model):
        _make_stock(parent)
    try:
        OmegaConf.resolve(config.model)
    except Exception as error:  # of a file's own resolvers
        raise ConfigError(f"{path}: its `model` can't be resolved: {error}") from error
    model = instantiate_model(config, what=f"{path} `model`").eval()
    _fill_in(cfg, written, model, path)
    return LazyStudent(cfg, path, written, config.model, model)


def check_is_of_run(student: LazyStudent, checkpoint: str, *, but: Sequence[str] = ()) -> None:
    """Refuse a LazyConfig that describes another model than that of the run, whose config.yaml
    lies beside the checkpoint, or other test images: weights may fit all the same. What lies beside
    an exported student is no run's.

    Args:
        but: paths, such as "model.roi_heads", below which a difference is meant.

    Raises:
        ConfigError: naming the first path that differs.
    """
    folder = os.path.dirname(checkpoint)
    beside = os.path.join(folder, "config.yaml")
    then = None if "://" in folder else written_config(beside)
    if then is None or read_metadata(folder):
        return
    with tempfile.TemporaryDirectory() as folder:
        again = os.path.join(folder, "config.yaml")
        LazyConfig.save(student.config, again)  # as the run has
        now = written_config(again) or {}
    for key, ours, theirs in _differences(_compared(now), _compared(then)):
        if any(f"{key}.".startswith(f"{x}.") for x in but):
            continue
        raise ConfigError(
            f"--config-file {student.path}: {key} is {ours}, but the run had {theirs} "
            f"({beside}); repeat the run's overrides in --overrides. If the difference is meant, "
            "take a copy of the checkpoint in another folder"
        )


def _make_stock(node: DictConfig) -> None:
    kind = _located(node)
    stock = STOCK_CLASSES.get(getattr(kind, "__name__", ""))
    # A user's class of the same name, or below one of these, stays what it is.
    if stock is None or not is_ours(kind):
        return
    node._target_ = stock
    if stock is FCOS:
        node.pop("input_format", None)  # detectron2's has none


def _located(node: Optional[DictConfig]) -> Any:
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def _fill_in(cfg: CfgNode, config: DictConfig, model: nn.Module, path: str) -> None:
    """What is known only of the built model, and of the data loaders."""
    read = input_format_of(select(config, "model.input_format"), config, what=path)
    read = read or select(config, "dataloader.test.mapper.image_format")
    if read is None:
        raise unknown_input_format(path)
    cfg.INPUT.FORMAT = read
    cfg.MODEL.DEVICE = str(select(config, "train.device") or cfg.MODEL.DEVICE)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = _test_size(config, path)
    cfg.MODEL.PIXEL_MEAN = model.pixel_mean.flatten().tolist()
    cfg.DATASETS.TEST = tuple(dataset_names(config, "test"))
    sigmas = select(config, "dataloader.evaluator.kpt_oks_sigmas")
    cfg.TEST.KEYPOINT_OKS_SIGMAS = list(sigmas or [])
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", model)
    predictor = predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor
    if not hasattr(predictor, "test_score_thresh") or not hasattr(predictor, "test_nms_thresh"):
        raise ConfigError(
            f"{path}: {type(predictor).__name__} has no test_score_thresh and test_nms_thresh, as "
            "detectron2's box predictors and dense detectors have"
        )
    head = cfg.MODEL[head_section(cfg)]
    heads = getattr(model, "roi_heads", model)
    head.NUM_CLASSES = getattr(heads, "num_classes", head.NUM_CLASSES)
    head.SCORE_THRESH_TEST = float(predictor.test_score_thresh)
    head.NMS_THRESH_TEST = float(predictor.test_nms_thresh)


def _test_size(config: DictConfig, path: str) -> Tuple[int, int]:
    """Shortest edge, 0 to keep an image as it is, and the longest one that may come of it."""
    nodes = select(config, _AUGMENTATIONS)
    if isinstance(nodes, (list, ListConfig)) and not len(nodes):
        return 0, 0
    if isinstance(nodes, (list, ListConfig)) and len(nodes) == 1:
        (node,) = nodes
        if _located(node) is ResizeShortestEdge:
            short = node.short_edge_length
            sizes = {short} if isinstance(short, int) else set(short)
            if len(sizes) == 1:
                return sizes.pop(), int(node.get("max_size", 0)) or 2**31 - 1
    raise ConfigError(
        f"{path}: {_AUGMENTATIONS} is not one ResizeShortestEdge of one size, nor an empty list: "
        "what is exported couldn't say how an image is to be resized"
    )


def written_config(path: str) -> Optional[Dict[str, Any]]:
    """What is in a file of :meth:`LazyConfig.save`, values as written: nothing that the file names
    is made.

    Returns:
        None if it is no such file.
    """
    if not PathManager.isfile(path):
        return None
    try:
        with PathManager.open(path) as f:
            text = f.read()
        check_yaml(text)
        content = _plain(yaml.compose(text, yaml.SafeLoader))
    except (RecursionError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) and is_saved_lazy(content) else None


def _compared(config: Dict[str, Any]) -> Dict[str, Any]:
    """What decides what a model makes of an image."""
    values = dict(flat(config))
    parts = {key: values[key] for key in _OF_IMAGES if values.get(key) is not None}
    return {"model": config.get("model"), **parts}


def _plain(node: Optional[yaml.Node]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(key)): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(x) for x in node.value]
    return None if node is None else node.value


def _differences(a: Any, b: Any, key: str = "") -> Iterator[Tuple[str, str, str]]:
    """(path, value, value) where two trees differ."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = (dict(enumerate(x)) for x in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        for k in {**a, **b}:
            path = f"{key}.{k}" if key else str(k)
            yield from _differences(a.get(k, "not there"), b.get(k, "not there"), path)
    elif a != b:
        yield key, str(a), str(b)
