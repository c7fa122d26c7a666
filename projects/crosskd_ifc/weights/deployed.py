"""A student exported as one file, run in its own runtime as if it were a detectron2 model.

Shape shorthand: (H, W) size of the network's input, M detections.
"""

import json
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, ROIMasks
from detectron2.structures.keypoints import heatmaps_to_keypoints
from detectron2.utils.file_io import PathManager
from torch.nn import functional as F

from ..common.errors import one_line

INFO_NAME = "model.json"
KEYPOINTS = "keypoint_heatmaps"
BOX_TOLERANCE = 1e-2  # pixels
SCORE_TOLERANCE = 1e-4
_MASK_THRESHOLD = 0.5  # detectron2's
_MASK_TOLERANCE = 1e-3  # of the image's pixels
_HEATMAP_TOLERANCE = 1e-2  # logits


class Info(NamedTuple):
    """What is to know about a file's input and output.

    Attributes:
        file: its name.
        channels: order of the image's channels, such as "BGR".
        size: (H, W), if only this one will do: an image is resized to fit in, and padded at the
            right and the bottom.
        shortest_edge, longest_edge: otherwise an image is resized to this shortest edge, or to a
            smaller one where the longest would become longer than that; shortest_edge 0 keeps it.
        padding: value of the padding for each channel, which becomes 0 in the network.
        precision: "float32", or "int8" of convolutions and linear layers.
        outputs: names, in order.
        classes: names, by number.
        keypoint_sigmas: COCO's measure of each keypoint's accuracy, () for those of its persons.
    """

    file: str
    channels: str
    size: Optional[Tuple[int, int]]
    shortest_edge: Optional[int]
    longest_edge: Optional[int]
    padding: Tuple[float, ...]
    precision: str
    outputs: Tuple[str, ...]
    classes: Tuple[str, ...]
    keypoint_sigmas: Tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """ "torchscript", "onnx" or, of an ONNX file in int8, "int8"."""
        if self.precision != "float32":
            return self.precision
        return "onnx" if self.file.endswith(".onnx") else "torchscript"

    def to_json(self) -> Dict[str, Any]:
        """As it stands in ``model.json``, with what is the same for all files."""
        return {
            **self._asdict(),
            "input": f"image: float32 ({len(self.padding)}, height, width), 0 to 255; one image",
            "normalization": "inside",
            "resizing": "bilinear, antialiased when it shrinks",
            "boxes": "x0, y0, x1, y1 in pixels of the input",
        }

    def mapper(self) -> DatasetMapper:
        """What reads and resizes an image; not yet :meth:`padded`."""
        if self.size:
            resize = T.ResizeScale(1.0, 1.0, *self.size)
        else:
            resize = T.ResizeShortestEdge(self.shortest_edge, self.longest_edge)
        return DatasetMapper(False, augmentations=[resize], image_format=self.channels)

    def padded(self, image: torch.Tensor) -> torch.Tensor:
        """An image (3, h, w) in the network's size (3, H, W).

        Raises:
            ValueError: if it is larger.
        """
        height, width = image.shape[1:]
        if self.size is None:
            return image.float()
        if height > self.size[0] or width > self.size[1]:
            raise ValueError(f"an image of {height} x {width} pixels is larger than {self.size}")
        mean = torch.tensor(self.padding).view(-1, 1, 1)
        room = (0, self.size[1] - width, 0, self.size[0] - height)
        return F.pad(image.float() - mean, room) + mean


def read_info(folder: str) -> Info:
    """What stands in an export's ``model.json``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another file.
    """
    path = os.path.join(folder, INFO_NAME)
    if not PathManager.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such file; export_student.py writes it with --format torchscript or onnx"
        )
    try:
        with PathManager.open(path) as f:
            content = json.load(f)
        return Info(**{k: content[k] for k in Info._fields if k in content})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not written by export_student.py ({error})") from error


class DeployedModel:
    """Takes and gives what a detectron2 model does in evaluation."""

    def __init__(self, folder: str):
        """
        Args:
            folder: with ``model.json`` and the file that it names.

        Raises:
            FileNotFoundError: if there are no such files.
            ValueError: if they can't be read.
        """
        self.info = read_info(folder)
        path = os.path.join(folder, self.info.file)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self._run = (_torchscript if self.info.kind == "torchscript" else _onnx)(path)
        except ImportError:
            raise
        except Exception as error:  # runtimes raise what they like on foreign bytes
            raise ValueError(
                f"{path}: it can't be run; export it again ({one_line(error)})"
            ) from error

    @torch.no_grad()
    def __call__(self, batched_inputs: List[Dict[str, Any]]) -> List[Dict[str, Instances]]:
        """As a detectron2 model; ``image`` as :meth:`Info.mapper` gives it, one after the other."""
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, x: Dict[str, Any]) -> Instances:
        height, width = x["image"].shape[1:]
        found = dict(zip(self.info.outputs, self._run(self.info.padded(x["image"]))))
        boxes = found["boxes"]
        result = Instances((height, width), pred_boxes=Boxes(boxes))
        result.scores, result.pred_classes = found["scores"], found["classes"]
        if "masks" in found:
            result.masks, result.boxes = found["masks"], boxes.clone()
        if KEYPOINTS in found:
            result.pred_keypoint_heatmaps = found[KEYPOINTS]
            result.pred_keypoints = heatmaps_to_keypoints(found[KEYPOINTS], boxes)[:, :, [0, 1, 3]]
        out = x.get("height", height), x.get("width", width)
        result = detector_postprocess(result, *out)
        if result.has("masks"):
            # A mask is of the whole box, which may reach into the padding.
            boxes = Boxes(result.boxes)
            boxes.scale(out[1] / width, out[0] / height)
            masks = ROIMasks(result.masks[:, 0]).to_bitmasks(boxes, *out, _MASK_THRESHOLD)
            result.pred_masks = masks.tensor
            result.remove("masks"), result.remove("boxes")
        return result


def difference(found: Instances, wanted: Instances) -> str:
    """In what detections differ by more than rounding, or "".

    Each must have its like among the others: the same class, a box within ``BOX_TOLERANCE`` pixels
    and a score within ``SCORE_TOLERANCE``, and much the same mask or keypoint heatmap. Their order
    is free, since nearly equal scores may change places.
    """
    if len(found) != len(wanted):
        return f"{len(found)} detections instead of {len(wanted)}"
    if not len(wanted):
        return ""
    boxes = (found.pred_boxes.tensor[:, None] - wanted.pred_boxes.tensor).abs().amax(dim=2)
    scores = (found.scores[:, None] - wanted.scores).abs()
    error = torch.maximum(boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)  # MxM
    error[found.pred_classes[:, None] != wanted.pred_classes] = float("inf")
    for dim in (0, 1):
        lost = int((error.amin(dim=dim) > 1).sum())
        if lost:
            return f"{lost} of {len(wanted)} have another box, score or class"
    like = found[error.argmin(dim=0)]
    if wanted.has("pred_masks"):
        other = (like.pred_masks != wanted.pred_masks).float().mean(dim=(1, 2)).max()
        if other > _MASK_TOLERANCE:
            return f"a mask differs in {other:.2%} of the image's pixels"
    if wanted.has("pred_keypoint_heatmaps"):
        other = (like.pred_keypoint_heatmaps - wanted.pred_keypoint_heatmaps).abs().max()
        if other > _HEATMAP_TOLERANCE:
            return f"a keypoint heatmap differs by {other:.2g}"
    return ""


def _torchscript(path: str) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    return torch.jit.load(path, map_location="cpu").eval()


def _onnx(path: str) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: torch.Tensor) -> Sequence[torch.Tensor]:
        arrays = session.run(None, {"image": np.ascontiguousarray(image.numpy())})
        return [torch.from_numpy(array) for array in arrays]

    return run
