"""torchvision's ImageNet ResNets as detectron2 backbones.

The file holds unprefixed names (``stem.conv1.weight``, ``res2.0.conv1.norm.bias``) and
``matching_heuristics: True``, with which detectron2 matches names by their endings: the same file
fills the backbone of an FPN (``backbone.bottom_up.res5``) in any detector and a C4 model, whose
res5 is part of the ROI heads. Names with a prefix would fit only one of them.
"""

import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

import torch
import torchvision
from detectron2.config import CfgNode as CN

from ..common.files import refuse_overwriting, replacing
from .reading import load_weights
from .state_dicts import describe_mismatch, is_state_dict

DEPTHS = (18, 34, 50, 101)
# torchvision's ImageNet statistics on the scale of detectron2's images, 0 to 255; R, G, B.
PIXEL_MEAN = tuple(round(255 * x, 3) for x in (0.485, 0.456, 0.406))
PIXEL_STD = tuple(round(255 * x, 3) for x in (0.229, 0.224, 0.225))

StateDict = Dict[str, torch.Tensor]


class Conversion(NamedTuple):
    """What :func:`convert_file` did.

    Attributes:
        found: what the source holds, such as "torchvision ResNet-18".
        depth: of the ResNet that was found.
        written: number of tensors in the file.
        dropped: names in the source that the model doesn't need.
        config: the config keys that the model needs to run on these weights.
    """

    found: str
    depth: int
    written: int
    dropped: List[str]
    config: CN


def convert_file(source: str, out: str, *, force: bool = False) -> Conversion:
    """Convert a torchvision ResNet-18, 34, 50 or 101 for ``MODEL.WEIGHTS`` of detectron2.

    Args:
        source: a state dict saved by torch or as safetensors, alone or as the "model" or
            "state_dict" of a checkpoint; a path or URL.
        out: the ``.pth`` file to write; it appears complete or not at all.
        force: replace an existing file.

    Raises:
        FileExistsError: if ``out`` exists, without ``force``.
        FileNotFoundError: if ``source`` doesn't exist.
        ValueError: if ``source`` is no such ResNet.
    """
    if not out.endswith(".pth"):
        # detectron2 takes .pkl and .pyth for other formats.
        raise ValueError(f"OUT is {out!r}; its name must end in .pth")
    refuse_overwriting(out, sources=[source], force=force)
    state = _state_of(load_weights(source))
    depth, weights = convert_resnet(state, source)
    found = f"torchvision ResNet-{depth}"
    config = required_config(depth)
    config.MODEL.WEIGHTS = os.path.abspath(out)
    content = {"model": weights, "__author__": f"crosskd_ifc: {found}"}
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with replacing(out) as f:
        torch.save({**content, "matching_heuristics": True}, f)
    dropped = [name for name in state if detectron2_name(name) not in weights]
    return Conversion(found, depth, len(weights), dropped, config)


def convert_resnet(state: Mapping[str, Any], source: str = "the file") -> Tuple[int, StateDict]:
    """The depth of a torchvision ResNet, and its backbone's weights by detectron2's names.

    Args:
        state: torchvision's state dict.
        source: where it is from, for the error.

    Raises:
        ValueError: if it is none of ``DEPTHS``; tells the differences to the closest one.
    """
    if not is_state_dict(state):
        raise ValueError(f"{source}: not a state dict, which maps names to tensors")
    weights = {k: v for k, v in state.items() if not _is_dropped(k)}
    expected = {depth: _torchvision_shapes(depth) for depth in DEPTHS}
    depth = min(DEPTHS, key=lambda d: len(expected[d].keys() ^ weights.keys()))
    problem = describe_mismatch(weights, expected[depth])
    if problem:
        raise ValueError(
            f"{source}: not a torchvision ResNet of depth {', '.join(map(str, DEPTHS))}. "
            f"Closest is ResNet-{depth}; {problem}"
        )
    return depth, {detectron2_name(k): v.detach().float().clone() for k, v in weights.items()}


def detectron2_name(name: str) -> str:
    """``layer1.0.bn2.bias`` -> ``res2.0.conv2.norm.bias``."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    if not name.startswith("res"):
        name = f"stem.{name}"
    name = name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)


def required_config(depth: int) -> CN:
    """The keys that a model needs to see with these weights what torchvision's model saw."""
    config = CN({"MODEL": {"RESNETS": {}}, "INPUT": {"FORMAT": "RGB"}})
    config.MODEL.RESNETS.DEPTH = depth
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    config.MODEL.PIXEL_MEAN = list(PIXEL_MEAN)
    config.MODEL.PIXEL_STD = list(PIXEL_STD)
    return config


def _state_of(content: Any) -> Mapping:
    """The state dict of a file's content, alone or in a checkpoint; {} if there is nothing like
    it."""
    state = content if isinstance(content, Mapping) else {}
    held = (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping))
    state = next(held, state)
    # Saved from a model wrapped for several GPUs.
    prefix = "module."
    wrapped = state and all(isinstance(k, str) and k.startswith(prefix) for k in state)
    return {k[len(prefix) :]: v for k, v in state.items()} if wrapped else state


def _is_dropped(name: str) -> bool:
    # Frozen norms don't count batches; others start from 0 where a file has no count.
    return name.startswith("fc.") or name.endswith(".num_batches_tracked")


def _torchvision_shapes(depth: int) -> StateDict:
    """Name -> tensor without memory, of torchvision's own model."""
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    return {k: v for k, v in state.items() if not _is_dropped(k)}
