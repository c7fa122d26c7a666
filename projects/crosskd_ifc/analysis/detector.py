"""A trained detector from its weights and the config beside them, and its detections."""

import os
import time
from typing import Optional, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import nn

from ..common.building import build_detector
from ..common.config_files import load_config_text, merge_from_list
from ..common.environment import device_fault
from ..common.lazy_config import is_lazy
from ..config import ConfigError, teacher_configs
from ..data.class_names import class_names_or_numbers
from ..modeling.attach import load_teacher_config
from ..training.run_folder import last_checkpoint
from ..weights.deployed import INFO_NAME
from ..weights.export import is_exported
from ..weights.held_config import classes_of
from ..weights.lazy_student import build_lazy_student, check_is_of_run
from ..weights.metadata import read_metadata
from ..weights.reading import WeightsError, load_weights
from ..weights.strict import load_strictly
from ..weights.student import load_config_of


class Detector:
    """A detector in evaluation mode.

    Attributes:
        model: detectron2's.
        cfg: its config.
        class_names: in the model's order.
        seconds: that the model has worked so far.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode, names: Sequence[str]):
        self.model, self.cfg, self.class_names = model.eval(), cfg, list(names)
        self.seconds = 0.0
        sizes = [cfg.INPUT.MIN_SIZE_TEST] * 2
        self._resize = ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def detect(self, image: np.ndarray) -> Instances:
        """The detections of one image, on the CPU, in its pixels.

        Args:
            image: (H, W, 3) uint8 BGR.

        Raises:
            OSError: if nothing of it would be left in the network's size.
        """
        height, width = image.shape[:2]
        # As detectron2's mapper converts what it reads.
        rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        image = convert_PIL_to_numpy(rgb, self.cfg.INPUT.FORMAT)
        transform = self._resize.get_transform(image)
        if min(getattr(transform, "new_h", 1), getattr(transform, "new_w", 1)) < 1:
            raise OSError(f"{width}x{height} pixels, too thin to be resized")
        resized = transform.apply_image(np.ascontiguousarray(image))
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1).copy())
        start = self._clock()
        (found,) = self.model([{"image": tensor, "height": height, "width": width}])
        self.seconds += self._clock() - start
        return found["instances"].to("cpu")

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def load_detector(
    weights: str, *, config_file: str = "", opts: Sequence = (), device: str = ""
) -> Detector:
    """Build and load a detector; no teacher is needed.

    Args:
        weights: a folder that ``tools/export_student.py`` wrote or that a training ran in, or a
            file of weights.
        config_file: that the weights belong to; empty for the one that they hold or, if they hold
            none, the one beside them: ``config.yaml``, or for ``x.pth`` an ``x.yaml``. A LazyConfig
            (.py) is code, and is run.
        opts: KEY, VALUE, ... on top of it; of a LazyConfig KEY=VALUE, ...
        device: to run on; empty for the config's.

    Raises:
        ConfigError: if weights or config can't be found, read or combined.
    """
    file = _find(weights)
    about = read_metadata(os.path.dirname(file)) if is_exported(file) else {}
    names = about.get("classes")
    if is_lazy(config_file):
        student = build_lazy_student(config_file, opts)
        check_is_of_run(student, file, but=[str(opt).split("=")[0].lstrip("+~") for opt in opts])
        student.cfg.MODEL.DEVICE = device or student.cfg.MODEL.DEVICE
        _check_device(student.cfg)
        model = student.model.to(student.cfg.MODEL.DEVICE)
        return _loaded(model, student.cfg, file, names)
    opts = [*(["MODEL.DEVICE", device] if device else []), *opts]
    if "config" in about and not config_file:
        cfg = load_config_text(about["config"], source=f"{file}: the config in metadata.json")
        merge_from_list(cfg, opts, key="--opts")
        return _build(cfg, file, names)
    try:
        content = load_weights(file)
        cfg, _ = load_config_of(content, file, config_file, opts)
    except (FileNotFoundError, WeightsError) as error:
        raise ConfigError(str(error)) from error
    return _build(cfg, file, names or classes_of(content, cfg, file))


def load_configured_teacher(detector: Detector, opts: Sequence = ()) -> Detector:
    """The teacher that a student's config names.

    Args:
        detector: the student's.
        opts: KEY, VALUE, ... on top of the teacher's config.

    Raises:
        ConfigError: if there is none, or it can't be loaded.
    """
    if not teacher_configs(detector.cfg)[0][1].MODEL.CROSSKD.TEACHER.CONFIG_FILE:
        raise ConfigError(
            "--teacher config: the student's config names no teacher (an exported student's never "
            "does); give the teacher's weights: --teacher WEIGHTS"
        )
    cfg, weights = load_teacher_config(detector.cfg)
    if not isinstance(cfg, CfgNode):
        raise ConfigError(
            "--teacher config: the student's config names a teacher of a LazyConfig; give its "
            "files: --teacher WEIGHTS --teacher-config FILE.py"
        )
    merge_from_list(cfg, opts, key="--opts")
    return _build(cfg, weights, None)


def _find(weights: str) -> str:
    """The file of the weights."""
    if not os.path.isdir(weights):
        if not PathManager.isfile(weights):
            raise ConfigError(f"{weights}: no such file or folder of weights")
        return weights
    exported = os.path.join(weights, "model.pth")
    file = exported if os.path.isfile(exported) else last_checkpoint(weights)
    if not file and os.path.isfile(os.path.join(weights, INFO_NAME)):
        raise ConfigError(
            f"{weights}: an export for TorchScript or ONNX, which runs without this tool "
            "(docs/deploy.md); give the checkpoint, or an export of --format detectron2"
        )
    if not file:
        raise ConfigError(
            f"{weights}: there is no model.pth and no checkpoint of a training in this folder"
        )
    return file


def _build(cfg: CfgNode, weights: str, names: Optional[Sequence[str]]) -> Detector:
    _check_device(cfg)
    model = build_detector(cfg, what=f"{weights}: its config")
    return _loaded(model, cfg, weights, names)


def _loaded(
    model: nn.Module, cfg: CfgNode, weights: str, names: Optional[Sequence[str]]
) -> Detector:
    cfg.MODEL.WEIGHTS = weights
    cfg.freeze()
    load_strictly(model, weights)
    return Detector(model, cfg, names or class_names_or_numbers(cfg))


def _check_device(cfg: CfgNode) -> None:
    fault = device_fault(cfg.MODEL.DEVICE)
    if fault:
        raise ConfigError(f"the device is {cfg.MODEL.DEVICE!r}, {fault}")
