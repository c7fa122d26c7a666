"""torchvision's ImageNet ResNets as detectron2 backbones.

The file written holds unprefixed names (``stem.conv1.weight``, ``res2.0.conv1.norm.bias``) and
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

from .checkpoints import (
    describe_mismatch,
    is_state_dict,
    load_torch_file,
    refuse_overwriting,
    staging_folder,
)

DEPTHS = (18, 34, 50, 101)
# torchvision's ImageNet statistics on the scale of detectron2's images, 0 to 255; R, G, B.
PIXEL_MEAN = tuple(round(255 * x, 3) for x in (0.485, 0.456, 0.406))
PIXEL_STD = tuple(round(255 * x, 3) for x in (0.229, 0.224, 0.225))

StateDict = Dict[str, torch.Tensor]


class Conversion(NamedTuple):
    """What :func:`convert_file` did.

    Attributes:
        depth: of the ResNet that was found.
        written: number of tensors in the file.
        dropped: names in the source that the backbone doesn't need.
        config: the config keys that the model needs to run on these weights.
    """

    depth: int
    written: int
    dropped: List[str]
    config: CN


def convert_file(
    source: str, out: str, *, fold_input: bool = False, force: bool = False
) -> Conversion:
    """Convert a torchvision ResNet-18, 34, 50 or 101 for ``MODEL.WEIGHTS`` of a detector.

    Args:
        source: a state dict saved by torch, a path or URL.
        out: the ``.pth`` file to write; it appears complete or not at all.
        fold_input: see :func:`fold_input_format`.
        force: replace an existing ``out``.

    Raises:
        FileExistsError: if ``out`` exists, without ``force``.
        FileNotFoundError: if ``source`` doesn't exist.
        ValueError: if ``source`` isn't such a state dict.
    """
    if not out.endswith(".pth"):
        # detectron2 takes .pkl and .pyth for other formats.
        raise ValueError(f"OUT is {out!r}; its name must end in .pth")
    refuse_overwriting(out, sources=[source], force=force)
    state = load_torch_file(source)
    depth, weights = convert_resnet(state, source)
    if fold_input:
        weights = fold_input_format(weights)
    content = {
        "model": weights,
        "__author__": f"crosskd_ifc: torchvision ResNet-{depth}",
        "matching_heuristics": True,
    }
    with staging_folder(os.path.dirname(os.path.abspath(out))) as folder:
        staged = os.path.join(folder, os.path.basename(out))
        torch.save(content, staged)
        os.replace(staged, out)
    dropped = [name for name in state if detectron2_name(name) not in weights]
    config = required_config(depth, fold_input=fold_input)
    config.MODEL.WEIGHTS = os.path.abspath(out)
    return Conversion(depth, len(weights), dropped, config)


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


def fold_input_format(weights: Mapping[str, torch.Tensor]) -> StateDict:
    """Weights for the input of detectron2's model zoo: BGR, less the mean, not divided by a std.

    With ``x_c = (i_c - mean_c) / std_c`` the stem's ``sum_c W_c x_c`` is
    ``sum_c (W_c / std_c) (i_c - mean_c)``: the std goes into W, whose input channels are then
    turned round. The mean stays with ``MODEL.PIXEL_MEAN``: as a bias it would be wrong at the
    border, where the image is padded with zeros, which stand for the mean. Meant for a frozen stem
    (``BACKBONE.FREEZE_AT`` 1 or more): trained, its small weights want another learning rate.
    """
    stem = "stem.conv1.weight"
    std = torch.tensor(PIXEL_STD).view(1, 3, 1, 1)
    return {**weights, stem: (weights[stem] / std).flip(1)}


def required_config(depth: int, *, fold_input: bool) -> CN:
    """The keys that a model needs to see with these weights what torchvision's model saw."""
    config = CN({"MODEL": {"RESNETS": {}}, "INPUT": {}})
    config.MODEL.RESNETS.DEPTH = depth
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    config.MODEL.PIXEL_MEAN = list(reversed(PIXEL_MEAN) if fold_input else PIXEL_MEAN)
    config.MODEL.PIXEL_STD = [1.0, 1.0, 1.0] if fold_input else list(PIXEL_STD)
    config.INPUT.FORMAT = "BGR" if fold_input else "RGB"
    return config


def _is_dropped(name: str) -> bool:
    # Frozen norms don't count batches; others start from 0 where a file has no count.
    return name.startswith("fc.") or name.endswith(".num_batches_tracked")


def _torchvision_shapes(depth: int) -> StateDict:
    """Name -> tensor without memory, of torchvision's own model."""
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    return {k: v for k, v in state.items() if not _is_dropped(k)}
