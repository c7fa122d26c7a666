"""Reading checkpoints of OpenMMLab's mmdet, and the training config that most of them hold."""

import ast
import re
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode as CN

from .reading import load_weights
from .state_dicts import is_state_dict

StateDict = Dict[str, torch.Tensor]
# Key of a training config, such as "model.backbone.style" -> its possible values.
Settings = Dict[str, Tuple[Any, ...]]

_RESAVE = """\
Where mmengine is installed, save what is needed to a plain file, and convert that. This runs code \
from IN: only for a file that you trust.
  python -c "import torch; c = torch.load('IN', map_location='cpu', weights_only=False); \
torch.save({k: c[k] for k in ('meta', 'state_dict')}, 'plain.pth')"
Should plain.pth be refused too, leave out 'meta'."""


class Checkpoint(NamedTuple):
    """What a file of mmdet's holds.

    Attributes:
        backbone: the ResNet, by torchvision's names.
        rest: neck and heads, by mmdet's names.
        training: the config it was trained with, see :func:`read_python_config`; {} if unknown.
        classes: their names, () if unknown.
    """

    backbone: StateDict
    rest: StateDict
    training: Dict[str, Any]
    classes: Tuple[str, ...]


def load_source(path: str) -> Any:
    """:func:`load_weights` with an error that tells what to do about mmengine's own classes."""
    try:
        return load_weights(path)
    except ValueError as error:
        # Training with mmdet 3.x saves its log, made of such objects, beside the weights.
        found = re.search(r"GLOBAL ((?:mmengine|mmcv|mmdet|numpy)\.\S+)", str(error.__cause__))
        if not found:
            raise
        raise ValueError(f"{error}: it holds a {found[1]}. {_RESAVE}") from error


def state_of(content: Any) -> Mapping:
    """The state dict of a file's content, alone or in a checkpoint; {} if there is nothing like
    it."""
    state = content if isinstance(content, Mapping) else {}
    held = (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping))
    state = next(held, state)
    # Saved from a model wrapped for several GPUs.
    prefix = "module."
    wrapped = state and all(isinstance(k, str) and k.startswith(prefix) for k in state)
    return {k[len(prefix) :]: v for k, v in state.items()} if wrapped else state


def is_detector(content: Any) -> bool:
    """Whether a file's content is named as mmdet's detectors are, convertible or not."""
    return any(isinstance(name, str) and name.startswith("backbone.") for name in state_of(content))


def read_detector(content: Mapping[str, Any], source: str) -> Checkpoint:
    """The parts of a checkpoint.

    Args:
        content: a state dict, or a dict that holds one (:func:`state_of`).
        source: where it is from, for the error.

    Raises:
        ValueError: if there is no state dict, or it is of mmdet 1.x.
    """
    state = state_of(content)
    if not is_state_dict(state):
        raise ValueError(f"{source}: not a state dict, which maps names to tensors")
    meta = content.get("meta")
    version = str(setting(meta, "mmdet_version") or "")
    if version.startswith(("0.", "1.")):
        raise ValueError(
            f"{source}: written by mmdet {version}; before 2.0 it had other boxes and anchors and "
            "another order of classes. Some files of 2.0's own model zoo tell an older version: "
            "save the 'state_dict' of such a file alone, and convert that"
        )
    keys = ("CLASSES", "dataset_meta.classes", "dataset_meta.CLASSES")
    classes = next((c for c in (setting(meta, k) for k in keys) if c), ())
    prefix = "backbone."
    return Checkpoint(
        {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)},
        {k: v for k, v in state.items() if not k.startswith(prefix)},
        read_python_config(setting(meta, "cfg") or setting(meta, "config")),
        tuple(classes) if isinstance(classes, (list, tuple)) else (str(classes),),
    )


def read_python_config(text: Any) -> Dict[str, Any]:
    """The top-level assignments of a config in Python, without running any of it.

    Args:
        text: its source; anything else has none.

    Returns:
        Name -> its value: dicts (calls of ``dict``, too), lists (tuples, too) and literals; None in
        place of whatever else.
    """
    try:
        return {
            target.id: _value(node.value)
            for node in (ast.parse(text).body if isinstance(text, str) else [])
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return {}


def setting(config: Any, key: str) -> Any:
    """The value at a key such as "model.backbone.style", None if there is none."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def differing_settings(training: Mapping[str, Any], possible: Settings) -> Iterator[str]:
    """The settings of a training config with another value than the possible ones, in words.

    Args:
        training: what isn't set in it counts as possible.
        possible: what can be converted.
    """
    for key, values in possible.items():
        found = setting(training, key)
        if isinstance(found, str):
            found = found.rpartition(".")[2]  # without the module of a class
        if found is not None and found not in values:
            yield f"{key} is {found!r} instead of {values[0]!r}"


def differing_inputs(training: Mapping[str, Any], model: CN) -> Iterator[str]:
    """As :func:`differing_settings`, of what the images of a detectron2 model are.

    Args:
        training: wherever it tells how images are normalized.
        model: of RGB images and a ResNet without STRIDE_IN_1X1, with PIXEL_MEAN and PIXEL_STD.
    """
    yield from differing_settings(training, {"model.backbone.style": ("pytorch",)})
    possible = {"mean": (model.PIXEL_MEAN,), "std": (model.PIXEL_STD,)}
    possible.update({"to_rgb": (True,), "bgr_to_rgb": (True,)})
    for place, found in normalizations(training):
        yield from (f"{place}.{said}" for said in differing_settings(found, possible))


def normalizations(config: Any, place: str = "") -> Iterator[Tuple[str, Mapping[str, Any]]]:
    """Place and content of all that a config says on how images are normalized."""
    if isinstance(config, Mapping):
        kind = str(config.get("type")).rpartition(".")[2]
        named = place.endswith(("img_norm_cfg", "data_preprocessor"))
        if named or kind in ("Normalize", "DetDataPreprocessor"):
            yield place, config
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    for key, value in items:
        if isinstance(value, (Mapping, list)):
            yield from normalizations(value, f"{place}.{key}".lstrip("."))


def test_size(training: Mapping[str, Any]) -> Tuple[int, int]:
    """The shorter and the longer side that images have in tests: of a training config's
    ``test_pipeline``, or, if it doesn't tell, mmdet's own."""
    steps = training.get("test_pipeline")
    for step in steps if isinstance(steps, list) else []:
        step = step if isinstance(step, Mapping) else {}
        size = step.get("img_scale") or step.get("scale")
        if isinstance(size, list) and len(size) == 2 and all(type(x) is int for x in size):
            return min(size), max(size)
    return 800, 1333


def anchor_settings(head: str, **values: Any) -> Settings:
    """What detectron2's anchors of three ratios stand for, and more ``values``."""
    values = {"type": "AnchorGenerator", "ratios": [0.5, 1.0, 2.0], "center_offset": 0, **values}
    values.update(scale_major=True, base_sizes=values["strides"], centers=None)
    return {f"model.{head}.anchor_generator.{k}": (v,) for k, v in values.items()}


def coder_settings(head: str, stds: List[float]) -> Settings:
    """What a ``Box2BoxTransform`` of the weights 1 / ``stds`` stands for."""
    coder = f"model.{head}.bbox_coder"
    return {
        f"{coder}.type": ("DeltaXYWHBBoxCoder",),
        f"{coder}.target_means": ([0.0] * 4,),
        f"{coder}.target_stds": (stds,),
    }


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return {k.arg: _value(k.value) for k in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values) if _is_name(k)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(x) for x in node.elts]
    try:
        return ast.literal_eval(node)
    except (TypeError, ValueError):
        return None


def _is_name(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
