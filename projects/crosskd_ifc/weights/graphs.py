"""A detector as one file, a graph of tensor operations: TorchScript or ONNX.

The graph takes one image as the network sees it but for mean and std, and gives its detections.
Resizing, scaling boxes back, pasting masks and finding keypoints in their heatmaps lie outside.

Shape shorthand: (H, W) size of the network's input, M detections, K keypoints.
"""

import inspect
import logging
import os
import warnings
from typing import Any, Dict, Optional, Sequence, Tuple
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from ..common.files import write_json
from ..config import ConfigError
from ..data.class_names import names_or_numbers
from .deployed import INFO_NAME, KEYPOINTS, Info

# Format -> name of the file.
GRAPH_NAMES = {"torchscript": "model.ts", "onnx": "model.onnx"}
_OPSET = 17  # RoIAlign as detectron2 means it came with 16
# Field of detectron2's detections -> name of the output.
_OUTPUTS = {
    "pred_boxes": "boxes",
    "scores": "scores",
    "pred_classes": "classes",
    "pred_masks": "masks",
    "pred_keypoint_heatmaps": KEYPOINTS,
}
_HEATMAPS_TO_KEYPOINTS = "detectron2.modeling.roi_heads.keypoint_head.heatmaps_to_keypoints"


class Graph(nn.Module):
    """A detector in evaluation mode, from a tensor to tensors.

    Attributes:
        outputs: names of what the last forward returned.
    """

    def __init__(self, detector: nn.Module):
        """
        Raises:
            ConfigError: if it is of another kind than GeneralizedRCNN, RetinaNet or FCOS.
        """
        super().__init__()
        if not isinstance(detector, (GeneralizedRCNN, DenseDetector)):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE {type(detector).__name__} can't be exported as one file, "
                "only a GeneralizedRCNN, RetinaNet or FCOS"
            )
        self.detector = detector
        self.outputs: Tuple[str, ...] = ()

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Detections in an image (3, H, W), 0 to 255, in the detector's channel order.

        Returns:
            boxes (M, 4) as x0, y0, x1, y1 in its pixels, scores (M), classes (M), and of Mask R-CNN
            masks (M, 1, 28, 28), probabilities inside the box, and of Keypoint R-CNN keypoint
            heatmaps (M, K, 56, 56), logits inside the box.
        """
        # Of an older detectron2, this module needs caffe2.
        from detectron2.export.torchscript_patch import patch_builtin_len

        model, inputs = self.detector, [{"image": image}]
        with patch_builtin_len(), mock.patch(_HEATMAPS_TO_KEYPOINTS, _no_keypoints):
            if isinstance(model, GeneralizedRCNN):
                found = model.inference(inputs, do_postprocess=False)[0]
            else:
                images = model.preprocess_image(inputs)
                features = model.backbone(images.tensor)
                features = [features[name] for name in model.head_in_features]
                found = model.forward_inference(images, features, model.head(features))[0]
        fields = {_OUTPUTS[k]: v for k, v in found.get_fields().items() if k in _OUTPUTS}
        self.outputs = tuple(fields)
        return tuple(getattr(value, "tensor", value) for value in fields.values())


def _no_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    """In place of detectron2's loop over the boxes, which ONNX can't express."""
    return maps.new_zeros(len(rois), maps.shape[1], 4)


def describe(
    cfg: CfgNode, classes: Optional[Sequence[str]], format: str, size: Optional[Tuple[int, int]]
) -> Info:
    """What is to know of a graph's input and output, but for the names of its outputs.

    Args:
        cfg: of the detector.
        classes: their names; None: numbers.
        format: "torchscript" or "onnx".
        size: the fixed (H, W); None for any.
    """
    return Info(
        file=GRAPH_NAMES[format],
        channels=cfg.INPUT.FORMAT,
        size=size,
        shortest_edge=None if size else cfg.INPUT.MIN_SIZE_TEST,
        longest_edge=None if size else cfg.INPUT.MAX_SIZE_TEST,
        padding=tuple(cfg.MODEL.PIXEL_MEAN),
        precision="float32",
        outputs=(),
        classes=names_or_numbers(classes, cfg),
        keypoint_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
    )


@torch.no_grad()
def write_graph(detector: nn.Module, info: Info, image: torch.Tensor, folder: str) -> None:
    """Write a detector as one file, and ``model.json`` beside it.

    Args:
        detector: on the CPU, in evaluation mode.
        info: as :func:`describe` gives it.
        image: (3, h, w) to trace the detector with.
        folder: an existing one.

    Raises:
        ConfigError: if ONNX is not installed.
    """
    path, graph = os.path.join(folder, info.file), Graph(detector).eval()
    image = info.padded(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing fixes; the verification tells
        if info.file == GRAPH_NAMES["torchscript"]:
            torch.jit.trace(graph, image, check_trace=False).save(path)
        else:
            _write_onnx(graph, image, path, is_fixed=info.size is not None)
    write_json(os.path.join(folder, INFO_NAME), info._replace(outputs=graph.outputs).to_json())


def _write_onnx(graph: Graph, image: torch.Tensor, path: str, *, is_fixed: bool) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs {error.name}; install this package with its extra 'deploy'"
        ) from error
    graph(image)
    dynamic: Dict[str, Any] = {name: {0: "detections"} for name in graph.outputs}
    if not is_fixed:
        dynamic["image"] = {1: "height", 2: "width"}
    names = dict(input_names=["image"], output_names=list(graph.outputs), dynamic_axes=dynamic)
    logging.disable(logging.WARNING)
    try:
        # torch.export, which dynamo=True takes (torch 2.5), can't follow detectron2's code.
        knows_dynamo = "dynamo" in inspect.signature(torch.onnx.export).parameters
        options = {"dynamo": False} if knows_dynamo else {}
        torch.onnx.export(graph, (image,), path, opset_version=_OPSET, **options, **names)
    finally:
        logging.disable(logging.NOTSET)
