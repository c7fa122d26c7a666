"""torchvision's ImageNet ResNets as detectron2 backbones, and mmdet's detectors as detectron2's.

A backbone's file holds unprefixed names (``stem.conv1.weight``, ``res2.0.conv1.norm.bias``) and
``matching_heuristics: True``, with which detectron2 matches names by their endings: the same file
fills the backbone of an FPN (``backbone.bottom_up.res5``) in any detector and a C4 model, whose
res5 is part of the ROI heads. Names with a prefix would fit only one of them. A detector's file
holds full names, and its config lies beside it; see ``mmdet_detectors.py``.
"""

import os
import re
import textwrap
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import torch
import torchvision
from detectron2.config import CfgNode as CN
from detectron2.utils.file_io import PathManager

from ..common.files import refuse_overwriting, staging_folder
from ..config import class_count
from .mmdet_detectors import convert_detector
from .mmdet_files import is_detector, load_source, read_detector, state_of
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
        config_file: of a detector, the complete config that was written, else "".
        note: what is known of a detector's training, else "".
    """

    found: str
    depth: int
    written: int
    dropped: List[str]
    config: CN
    config_file: str = ""
    note: str = ""


def convert_file(
    source: str, out: str, *, fold_input: bool = False, force: bool = False
) -> Conversion:
    """Convert weights for ``MODEL.WEIGHTS`` of detectron2: a torchvision ResNet-18, 34, 50 or 101,
    or a detector of mmdet's with such a backbone.

    Args:
        source: a state dict saved by torch or as safetensors, alone or as the "model" or
            "state_dict" of a checkpoint; a path or URL.
        out: the ``.pth`` file to write; it appears complete or not at all. So does a detector's
            config, in a ``.yaml`` file beside it.
        fold_input: see :func:`fold_input_format`; not for detectors.
        force: replace existing files.

    Raises:
        FileExistsError: if a file to write exists, without ``force``.
        FileNotFoundError: if ``source`` doesn't exist.
        ValueError: if ``source`` is neither.
    """
    if not out.endswith(".pth"):
        # detectron2 takes .pkl and .pyth for other formats.
        raise ValueError(f"OUT is {out!r}; its name must end in .pth")
    refuse_overwriting(out, sources=[source], force=force)
    content = load_source(source)
    if is_detector(content):
        if fold_input:
            raise ValueError(
                f"{source}: --fold-input is for backbones that are still to be trained in a "
                "detector; this is a whole detector, whose config goes with its own input"
            )
        return _convert_detector(content, source, out, force)
    state = state_of(content)
    depth, weights = convert_resnet(state, source)
    if fold_input:
        weights = fold_input_format(weights)
    found = f"torchvision ResNet-{depth}"
    config = required_config(depth, fold_input=fold_input)
    config.MODEL.WEIGHTS = os.path.abspath(out)
    _write({out: _content(weights, found, matching_heuristics=True)})
    dropped = [name for name in state if detectron2_name(name) not in weights]
    return Conversion(found, depth, len(weights), dropped, config)


def _convert_detector(content: Mapping[str, Any], source: str, out: str, force: bool) -> Conversion:
    config_out = out[: -len(".pth")] + ".yaml"
    refuse_overwriting(config_out, sources=[source], force=force)
    checkpoint = read_detector(content, source)
    depth, backbone = convert_resnet(checkpoint.backbone, f"{source}: its backbone")
    detector = convert_detector(
        checkpoint, backbone, required_config(depth, fold_input=False), source
    )
    weights, config = detector.weights, detector.config
    found = f"{detector.name} (mmdet, ResNet-{depth}-FPN, {class_count(config)[1]} classes)"
    config.MODEL.WEIGHTS = os.path.abspath(out)
    text = _header(found, source, config, checkpoint.classes)
    text += config.dump(default_flow_style=None)
    _write({out: _content(weights, found, matching_heuristics=False), config_out: text})
    dropped = [name for name in checkpoint.backbone if _is_dropped(name)]
    return Conversion(
        found, depth, len(weights), dropped, config, os.path.abspath(config_out), detector.note
    )


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


def _content(weights: StateDict, found: str, *, matching_heuristics: bool) -> Dict[str, Any]:
    return {
        "model": weights,
        "__author__": f"crosskd_ifc: {found}",
        "matching_heuristics": matching_heuristics,
    }


def _header(found: str, source: str, config: CN, classes: Sequence[str]) -> str:
    """The comment at the top of a detector's config; ASCII, whatever the names are."""
    lines = [
        f"{found}, from {ascii(os.path.basename(source))}.",
        "MODEL.WEIGHTS is an absolute path: change it if you move the files.",
    ]
    if "mmdet" in config.MODEL.BACKBONE.NAME:
        lines.append("`import crosskd_ifc` registers the backbone.")
    if classes:
        names = f"Classes: {', '.join(map(ascii, classes))}."
        lines += textwrap.wrap(names, 96, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _write(files: Mapping[str, Any]) -> None:
    """Write files into one folder, a text as it is and other content by torch; they appear when
    all are complete."""
    with staging_folder(os.path.dirname(os.path.abspath(next(iter(files))))) as folder:
        staged = {path: os.path.join(folder, os.path.basename(path)) for path in files}
        for path, content in files.items():
            if isinstance(content, str):
                with PathManager.open(staged[path], "w") as f:
                    f.write(content)
            else:
                torch.save(content, staged[path])
        for path in files:
            os.replace(staged[path], path)


def _is_dropped(name: str) -> bool:
    # Frozen norms don't count batches; others start from 0 where a file has no count.
    return name.startswith("fc.") or name.endswith(".num_batches_tracked")


def _torchvision_shapes(depth: int) -> StateDict:
    """Name -> tensor without memory, of torchvision's own model."""
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    return {k: v for k, v in state.items() if not _is_dropped(k)}
