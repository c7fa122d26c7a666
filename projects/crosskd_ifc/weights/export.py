"""The student alone, for stock detectron2 or as one file, verified before it appears."""

import os
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from torch import nn

from ..common.files import refuse_overwriting, staging_folder, write_json
from .deployed import INFO_NAME, DeployedModel, Info, difference, read_info
from .graphs import GRAPH_NAMES, describe, write_graph
from .metadata import METADATA_NAME, describe_detector, read_metadata, yacs_settings
from .own_code import own_code
from .quantizing import quantize
from .reading import save_safetensors
from .samples import calibration_images, sample_images
from .stock import load_stock, write_config
from .student import LoadedStudent, load_student

FORMATS = ("detectron2", *GRAPH_NAMES)
_WEIGHTS, _CONFIG, _SAFETENSORS = "model.pth", "config.yaml", "model.safetensors"
# All names that an export can have: a forced one leaves none of an earlier one.
_NAMES = (_WEIGHTS, _CONFIG, _SAFETENSORS, METADATA_NAME, INFO_NAME, *GRAPH_NAMES.values())
_ABOUT = {METADATA_NAME: read_metadata, INFO_NAME: read_info}  # one of them is in each


class Export(NamedTuple):
    """What :func:`export_student` wrote.

    Attributes:
        weights: absolute path of the weights, or of the one file that is the model.
        config: absolute path of the file that says how to use it.
        architecture: of the checkpoint's own config, and what it is now.
        is_lazy: whether ``config`` is a LazyConfig.
        parameters: their number.
        detections: how many were compared in the verification.
        dropped: what the checkpoint holds beside the student.
        own_code: files of the user's own that ``config`` needs (:func:`own_code`).
    """

    weights: str
    config: str
    architecture: Tuple[str, str]
    is_lazy: bool
    parameters: int
    detections: int
    dropped: List[str]
    own_code: Sequence[str] = ()


def export_student(
    checkpoint: str,
    out: str,
    *,
    config_file: str = "",
    overrides: Sequence[str] = (),
    format: str = "detectron2",
    images: Sequence[str] = (),
    size: Optional[Tuple[int, int]] = None,
    int8: bool = False,
    calibrate: Sequence[str] = (),
    force: bool = False,
    safetensors: bool = False,
) -> Export:
    """Write a checkpoint's student, without optimizer and adapters, into a folder.

    The folder appears only after what is in it found what the checkpoint's student finds: in
    ``detectron2`` format exactly, on random images, as a model of stock detectron2; as a
    ``torchscript`` or ``onnx`` file nearly (:func:`difference`), on images with objects, in its own
    runtime on the CPU. A stock config's path of the weights is absolute, since detectron2 looks for
    a relative one from the current folder.

    Args:
        checkpoint: ``.pth`` or ``.safetensors`` file; of a distilled or a plain model.
        out: a folder to make. ``detectron2``: with ``model.pth``, ``metadata.json`` and
            ``config.yaml`` (a LazyConfig, if it is of FCOS or the student was of one); else with
            ``model.ts`` or ``model.onnx``, and ``model.json``.
        config_file: of the checkpoint's training; empty for the one in the checkpoint, or, if it
            holds none, the one beside it: of ``x.pth`` an ``x.yaml``, or ``config.yaml``. A
            LazyConfig (.py) is code, and is run.
        overrides: of a LazyConfig, in its syntax: those of its training.
        format: one of ``FORMATS``.
        images: files to verify a ``torchscript`` or ``onnx`` file with; empty for the first ones of
            the config's DATASETS.TEST.
        size: fixed (height, width) of a ``torchscript`` or ``onnx`` file's input; None for any.
        int8: quantize the ``onnx`` file after it was verified (:func:`quantize`), which changes
            what it finds: measure its AP.
        calibrate: image files to quantize with; empty for the first ones of DATASETS.TRAIN.
        force: replace an earlier export; never other files, nor a training's.
        safetensors: also write the weights as ``.safetensors``, which stock detectron2 doesn't
            read, but ``MODEL.WEIGHTS`` and ``TEACHER.WEIGHTS`` here and other tools do.

    Raises:
        FileExistsError: if ``out`` exists, without ``force``, or is no export, or the input is to
            be replaced.
        FileNotFoundError: if the checkpoint or its config doesn't exist.
        ConfigError: if the config can't be read or has parts without a stock counterpart.
        ValueError: if the weights don't fit the config, the detections differ, or there are none to
            compare.
    """
    if not out or out.endswith(".pth"):
        raise ValueError(f"OUT is {out!r}; give the name of a folder to make")
    if format == "detectron2" and (images or size):
        raise ValueError("--images and --size are for --format torchscript and onnx")
    if (int8 and format != "onnx") or (calibrate and not int8):
        raise ValueError("--int8 is for --format onnx, and --calibrate for --int8")
    if size and min(size) < 1:
        raise ValueError(f"--size is {size[0]} x {size[1]}, expected at least 1 x 1")
    if format != "detectron2" and safetensors:
        raise ValueError("--safetensors is for --format detectron2")
    found = load_student(checkpoint, config_file, overrides)
    out = os.path.abspath(out)
    beside = os.path.join(os.path.dirname(checkpoint), _CONFIG)
    _check_out(out, [checkpoint, beside, found.config_path], force)
    is_new = not os.path.lexists(out)
    with staging_folder(os.path.dirname(out) if is_new else out) as staging:
        folder = os.path.join(staging, "student")
        PathManager.mkdirs(folder)
        if format == "detectron2":
            export = _write_stock(found, folder, out, safetensors=safetensors)
        else:
            info = describe(found.cfg, found.classes, format, size)
            samples = sample_images(found.cfg, info, images)
            export = _write_one_file(found, folder, out, info, samples)
            if int8:
                _quantize(folder, calibration_images(found.cfg, info, calibrate), samples)
        _move(folder, out, is_new)
    return export


def is_exported(weights: str) -> bool:
    """Whether a file of weights has the name of an export's, and no config of its own beside it."""
    has_own = os.path.isfile(os.path.splitext(weights)[0] + ".yaml")
    return os.path.basename(weights) in (_WEIGHTS, _SAFETENSORS) and not has_own


def _write_stock(found: LoadedStudent, folder: str, out: str, *, safetensors: bool) -> Export:
    """Write weights and config for stock detectron2 into ``folder``, as they will be in ``out``."""
    state, stock = found.model.state_dict(), found.stock_config(os.path.join(out, _WEIGHTS))
    torch.save({"model": state}, os.path.join(folder, _WEIGHTS))
    write_config(stock, os.path.join(folder, _CONFIG))
    is_lazy, about = not isinstance(stock, CfgNode), describe_detector(found.cfg, found.classes)
    if is_lazy and found.node is None:  # of FCOS; predict.py reads this, and runs nothing
        about["config"] = yacs_settings(found.cfg)
    write_json(os.path.join(folder, METADATA_NAME), about)
    if safetensors:
        save_safetensors(state, os.path.join(folder, _SAFETENSORS))
    detections, kind = _verify_stock(found.model, folder, is_lazy)
    export = _export(found, out, (_WEIGHTS, _CONFIG), kind, detections)
    return export._replace(is_lazy=is_lazy, own_code=own_code(stock))


def _write_one_file(
    found: LoadedStudent, folder: str, out: str, info: Info, samples: Sequence[torch.Tensor]
) -> Export:
    """Write the student as one graph into ``folder``, as it will be in ``out``."""
    write_graph(found.model, info, samples[0], folder)
    detections = _verify_graph(found.model, folder, samples)
    return _export(found, out, (info.file, INFO_NAME), info.kind, detections)


def _export(
    found: LoadedStudent, out: str, names: Tuple[str, str], kind: str, detections: int
) -> Export:
    weights, config = (os.path.join(out, name) for name in names)
    return Export(
        weights=weights,
        config=config,
        architecture=(found.cfg.MODEL.META_ARCHITECTURE, kind),
        is_lazy=False,
        parameters=sum(p.numel() for p in found.model.parameters()),
        detections=detections,
        dropped=found.dropped,
    )


def _check_out(out: str, sources: Sequence[str], force: bool) -> None:
    """Refuse to replace one of the sources, anything without ``force``, and with it all but an
    export."""
    names = [name for name in _NAMES if os.path.lexists(os.path.join(out, name))]
    if os.path.lexists(os.path.join(out, "last_checkpoint")):
        raise FileExistsError(f"{out}: a training's folder; give another OUT")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise FileExistsError(f"{out} is a file; give the name of a folder")
    try:
        about = [f(out) for name, f in _ABOUT.items() if name in names]
    except ValueError as error:
        raise FileExistsError(f"{error}; it is not of an export: give another OUT") from None
    if names and not about:
        raise FileExistsError(f"{out}: its {names[0]} is not of an export; give another OUT")
    for path in (out, *(os.path.join(out, name) for name in names)):
        refuse_overwriting(path, sources=sources, force=force)


def _move(folder: str, out: str, is_new: bool) -> None:
    """Put a complete export in its place; of an earlier one nothing is left."""
    if is_new:
        os.rename(folder, out)
        return
    for name in _NAMES:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            os.replace(path, os.path.join(out, name))
        elif os.path.exists(os.path.join(out, name)):
            os.remove(os.path.join(out, name))


@torch.no_grad()
def _verify_stock(student: nn.Module, folder: str, as_lazy: bool) -> Tuple[int, str]:
    """Compare the written model with the student; returns the number of equal detections, and the
    name of the written model's class."""
    paths = (os.path.join(folder, name) for name in (_CONFIG, _WEIGHTS))
    models = load_stock(*paths, lazy=as_lazy), student
    for module in (module for model in models for module in model.modules()):
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = -1.0  # so that there is something to compare
    g = torch.Generator().manual_seed(0)
    sizes = [(len(student.pixel_mean), *hw) for hw in ((96, 128), (128, 96))]
    images = [torch.randint(0, 256, size, generator=g).float() for size in sizes]
    found, wanted = ([x["instances"] for x in m([{"image": i} for i in images])] for m in models)
    if not all(map(_equal, found, wanted)):
        raise ValueError(
            "the exported model's detections differ from the student's; nothing was written"
        )
    return sum(map(len, found)), type(models[0]).__name__


def _equal(a: Instances, b: Instances) -> bool:
    """Whether all fields (boxes, scores, classes, masks, ...) are the same, bit for bit."""

    def tensors(x: Instances) -> Dict[str, torch.Tensor]:
        return {k: getattr(v, "tensor", v) for k, v in x.get_fields().items()}

    a_fields, b_fields = tensors(a), tensors(b)
    return a_fields.keys() == b_fields.keys() and all(
        torch.equal(v, b_fields[k]) for k, v in a_fields.items()
    )


def _quantize(folder: str, images: Sequence[torch.Tensor], samples: Sequence[torch.Tensor]) -> None:
    info = read_info(folder)
    quantize(os.path.join(folder, info.file), images)
    write_json(os.path.join(folder, INFO_NAME), info._replace(precision="int8").to_json())
    found = DeployedModel(folder)([{"image": info.padded(image)} for image in samples])
    if not any(len(x["instances"]) for x in found):
        raise ValueError("in int8 the student detects nothing any more; nothing was written")


@torch.no_grad()
def _verify_graph(student: nn.Module, folder: str, samples: Sequence[torch.Tensor]) -> int:
    """Run the written file on images beside the student; returns the number of detections."""
    deployed, detections = DeployedModel(folder), 0
    for image in map(deployed.info.padded, samples):
        wanted = student([{"image": image}])[0]["instances"]
        try:
            found = deployed([{"image": image}])[0]["instances"]
        except Exception as error:  # runtimes raise what they like
            reason = str(error).strip().split("\n")[-1]
            raise ValueError(
                f"the exported file can't run on an image of {tuple(image.shape[1:])} pixels: the "
                "network computes with the size of the image it was traced with, so give a size "
                f"that --size fixes ({reason}). Nothing was written"
            ) from error
        problem = difference(found, wanted)
        if problem:
            raise ValueError(
                f"the exported file's detections differ from the student's ({problem}); nothing "
                "was written"
            )
        detections += len(wanted)
    if not detections:
        raise ValueError(
            f"the student detects nothing in the {len(samples)} images that the exported file "
            "would be compared on; give images with objects by --images. Nothing was written"
        )
    return detections
