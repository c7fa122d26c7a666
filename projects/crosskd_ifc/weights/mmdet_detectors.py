"""Faster R-CNN and RetinaNet of OpenMMLab's mmdet, 2.x and 3.x, by detectron2's names.

Both have the same order of classes (background last) and of deltas, the same box coding, RoIAlign,
levels and order of the RPN's anchors. RetinaNet's nine anchors lie ratio by ratio in mmdet and size
by size in detectron2, so the rows of its predictors change places; mmdet has no ReLU before P7, see
``modeling/backbones.py``. One difference stays: mmdet bounds the predicted dw and dh from both
sides, detectron2 only from above, so that its boxes can become narrower than 1/62 of their anchor.
"""

import math
import re
from typing import Any, Callable, Dict, Mapping, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from .mmdet_files import (
    Checkpoint,
    Settings,
    StateDict,
    anchor_settings,
    coder_settings,
    differing_inputs,
    differing_settings,
    normalizations,
    test_size,
)
from .state_dicts import describe_mismatch

_BOX = "roi_head.bbox_head"
_SUPPORTED = (
    "Supported are mmdet's Faster R-CNN (rpn_head, roi_head.bbox_head with shared_fcs) and "
    "RetinaNet (bbox_head.retina_cls, retina_reg) of a ResNet and an FPN, without a norm in neck "
    "or heads and without other parts"
)
_ASSUMED = (
    "The file doesn't tell all of how it was trained. Assumed is what mmdet's base configs have: "
    "style='pytorch', not 'caffe' (RGB images, divided by a std), anchors, box coding, RoIAlign"
)
_CHECKED = (
    "The training config in the file fits detectron2's model (normalization, anchors, box coding)"
)
# Of every ResNet here.
_BACKBONE = {
    "model.backbone.strides": ([1, 2, 2, 2],),
    "model.backbone.dilations": ([1, 1, 1, 1],),
}


class ConvertedDetector(NamedTuple):
    """A converted detector.

    Attributes:
        name: such as "Faster R-CNN".
        weights: by detectron2's full names.
        config: the keys that it needs, all but MODEL.WEIGHTS.
        note: what is known of its training.
    """

    name: str
    weights: StateDict
    config: CN
    note: str


class _Layout(NamedTuple):
    """How a detector of mmdet's is laid out in detectron2.

    Attributes:
        first_stage: of the ResNet's stages that the pyramid is made from, 2 or 3.
        model: keys of the node MODEL, without RESNETS and FPN.
        modules: mmdet's module -> detectron2's, without those that every FPN has.
        settings: of the training config -> possible values, without those of the input.
        ratio_outer: of mmdet's modules, the predictors whose rows are ordered by ratio first.
    """

    first_stage: int
    model: Dict[str, Any]
    modules: Dict[str, str]
    settings: Settings
    ratio_outer: Tuple[str, ...] = ()


class _LayoutError(ValueError):
    """Why the weights don't tell the layout."""


def convert_detector(
    checkpoint: Checkpoint, backbone: Mapping[str, torch.Tensor], resnet: CN, source: str
) -> ConvertedDetector:
    """The same detector in detectron2.

    Args:
        checkpoint: the detector.
        backbone: weights of its ResNet by detectron2's names, such as ``stem.conv1.weight``.
        resnet: the keys that the ResNet needs, see :func:`convert.required_config`.
        source: where it is from, for the error.

    Raises:
        ValueError: if it is none that is supported, or its training config has settings that
            detectron2's model wouldn't have.
    """
    name, find_layout = _kind(checkpoint.rest, source)
    try:
        layout = find_layout(checkpoint.rest, 8 * resnet.MODEL.RESNETS.RES2_OUT_CHANNELS)
        config = _config(resnet, layout, checkpoint)
        names = _full_names(layout)
        expected = _weights_of(config)
        problem = describe_mismatch(checkpoint.rest, {k: expected[v] for k, v in names.items()})
    except _LayoutError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{source}: not laid out as mmdet's {name}; {problem}. {_SUPPORTED}")
    training = checkpoint.training
    differing = [*differing_inputs(training, resnet.MODEL)]
    differing += differing_settings(training, {**_BACKBONE, **layout.settings})
    if differing:
        raise ValueError(
            f"{source}: trained with settings that can't be converted, by the config in the file: "
            f"{'; '.join(differing)}"
        )
    weights = {f"backbone.bottom_up.{k}": v for k, v in backbone.items()}
    for key, value in checkpoint.rest.items():
        value = value.detach().float().clone()
        is_outer = key.rpartition(".")[0] in layout.ratio_outer
        weights[names[key]] = sizes_first(value) if is_outer else value
    is_told = training.get("model") and any(
        "mean" in found for _, found in normalizations(training)
    )
    note = _CHECKED if is_told else _ASSUMED
    return ConvertedDetector(name, weights, config, note)


def sizes_first(rows: torch.Tensor) -> torch.Tensor:
    """A predictor's weight or bias for nine anchors of detectron2's order.

    Args:
        rows: its first dimension is (3 ratios, 3 sizes, outputs per anchor), flattened.
    """
    return rows.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _faster_rcnn(rest: StateDict, c5_channels: int) -> _Layout:
    fc_dim, pooled = _shape(rest, f"{_BOX}.shared_fcs.0.weight", 2)
    num_fc = _count(rest, f"{_BOX}.shared_fcs")
    num_classes = _shape(rest, f"{_BOX}.fc_cls.weight", 2)[0] - 1
    num_deltas = _shape(rest, f"{_BOX}.fc_reg.weight", 2)[0]
    model = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "ANCHOR_GENERATOR": {
            "SIZES": [[32], [64], [128], [256], [512]],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "PRE_NMS_TOPK_TRAIN": 2000,
            "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000,
            "POST_NMS_TOPK_TEST": 1000,
        },
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "NUM_CLASSES": max(num_classes, 1),
        },
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead",
            "NUM_FC": num_fc,
            "FC_DIM": fc_dim,
            "POOLER_RESOLUTION": max(math.isqrt(pooled // _fpn_channels(rest)), 1),
            "CLS_AGNOSTIC_BBOX_REG": num_deltas == 4 and num_classes > 1,
        },
    }
    modules = {
        "rpn_head.rpn_conv": "proposal_generator.rpn_head.conv",
        "rpn_head.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
        "rpn_head.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
        f"{_BOX}.fc_cls": "roi_heads.box_predictor.cls_score",
        f"{_BOX}.fc_reg": "roi_heads.box_predictor.bbox_pred",
    }
    modules.update(
        {f"{_BOX}.shared_fcs.{i}": f"roi_heads.box_head.fc{i + 1}" for i in range(num_fc)}
    )
    roi = "model.roi_head.bbox_roi_extractor"
    settings = {
        **anchor_settings("rpn_head", strides=[4, 8, 16, 32, 64], scales=[8]),
        **coder_settings("rpn_head", [1.0, 1.0, 1.0, 1.0]),
        **coder_settings(_BOX, [0.1, 0.1, 0.2, 0.2]),
        f"{roi}.featmap_strides": ([4, 8, 16, 32],),
        f"{roi}.finest_scale": (56,),
        f"{roi}.roi_layer.type": ("RoIAlign",),
        f"{roi}.roi_layer.sampling_ratio": (0,),
        f"{roi}.roi_layer.aligned": (True,),
    }
    return _Layout(2, model, modules, settings)


def _retinanet(rest: StateDict, c5_channels: int) -> _Layout:
    channels = _fpn_channels(rest)
    p6_inputs = _shape(rest, "neck.fpn_convs.3.conv.weight", 4)[1]
    if p6_inputs == channels == c5_channels:
        raise _LayoutError(
            f"C5 and P5 both have {channels} channels, which leaves open what P6 is made from"
        )
    from_p5 = p6_inputs == channels
    num_convs = _count(rest, "bbox_head.cls_convs")
    num_outputs = _shape(rest, "bbox_head.retina_cls.weight", 4)[0]
    builder = f"build_mmdet_retinanet_{'p5_' if from_p5 else ''}resnet_fpn_backbone"
    model = {
        "META_ARCHITECTURE": "RetinaNet",
        "BACKBONE": {"NAME": builder},
        "ANCHOR_GENERATOR": {
            "SIZES": [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)],
            "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        },
        "RETINANET": {
            "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "NUM_CLASSES": max(num_outputs // 9, 1),
            "NUM_CONVS": num_convs,
            "SMOOTH_L1_LOSS_BETA": 0.0,
        },
    }
    predictors = {
        "bbox_head.retina_cls": "head.cls_score",
        "bbox_head.retina_reg": "head.bbox_pred",
    }
    modules = {
        "neck.fpn_convs.3.conv": "backbone.top_block.p6",
        "neck.fpn_convs.4.conv": "backbone.top_block.p7",
        **predictors,
    }
    for i in range(num_convs):
        # In between lie the ReLUs.
        modules[f"bbox_head.cls_convs.{i}.conv"] = f"head.cls_subnet.{2 * i}"
        modules[f"bbox_head.reg_convs.{i}.conv"] = f"head.bbox_subnet.{2 * i}"
    anchors = {"octave_base_scale": 4, "scales_per_octave": 3, "scales": None}
    settings = {
        **anchor_settings("bbox_head", strides=[8, 16, 32, 64, 128], **anchors),
        **coder_settings("bbox_head", [1.0, 1.0, 1.0, 1.0]),
        # Older versions had True, for either.
        "model.neck.add_extra_convs": ("on_output" if from_p5 else "on_input", True),
        "model.neck.relu_before_extra_convs": (False,),
        "model.bbox_head.loss_cls.use_sigmoid": (True,),
    }
    return _Layout(3, model, modules, settings, tuple(predictors))


# Name -> the tensor that tells the detector, and what finds its layout from the weights of neck and
# heads and the channels of C5.
_KINDS: Dict[str, Tuple[str, Callable[[StateDict, int], _Layout]]] = {
    "Faster R-CNN": (f"{_BOX}.fc_cls.weight", _faster_rcnn),
    "RetinaNet": ("bbox_head.retina_cls.weight", _retinanet),
}


def _kind(rest: StateDict, source: str) -> Tuple[str, Callable[[StateDict, int], _Layout]]:
    for name, (key, find_layout) in _KINDS.items():
        if key in rest:
            return name, find_layout
    # Such as bbox_head.gfl_cls, or roi_head.bbox_head.0 of a cascade.
    heads = dict.fromkeys(
        re.match(r"roi_head\.\w+(\.\d+)?|\w+(\.\w+)?", k)[0]
        for k in rest
        if not k.startswith("neck.")
    )
    raise ValueError(
        f"{source}: a detector that can't be converted; beside backbone and neck it has "
        f"{', '.join(heads) or 'nothing'}. {_SUPPORTED}"
    )


def _config(resnet: CN, layout: _Layout, checkpoint: Checkpoint) -> CN:
    stages = [f"res{i}" for i in range(layout.first_stage, 6)]
    config = resnet.clone()
    config.MODEL.RESNETS.OUT_FEATURES = stages
    config.MODEL.FPN = CN({"IN_FEATURES": stages, "OUT_CHANNELS": _fpn_channels(checkpoint.rest)})
    config.MODEL.update(CN(layout.model))
    shorter, longer = test_size(checkpoint.training)
    config.INPUT.MIN_SIZE_TRAIN, config.INPUT.MAX_SIZE_TRAIN = [shorter], longer
    config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST = shorter, longer
    if list(checkpoint.classes) == MetadataCatalog.get("coco_2017_val").thing_classes:
        config.DATASETS = CN({"TEST": ["coco_2017_val"]})
    config.VERSION = 2
    return config


def _weights_of(config: CN) -> StateDict:
    """Name -> tensor without memory, of detectron2's model."""
    cfg = get_cfg()
    cfg.merge_from_other_cfg(config)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def _full_names(layout: _Layout) -> Dict[str, str]:
    """mmdet's name of each tensor -> detectron2's."""
    modules = dict(layout.modules)
    for i, stage in enumerate(range(layout.first_stage, 6)):
        modules[f"neck.lateral_convs.{i}.conv"] = f"backbone.fpn_lateral{stage}"
        modules[f"neck.fpn_convs.{i}.conv"] = f"backbone.fpn_output{stage}"
    return {
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
    }


def _fpn_channels(rest: StateDict) -> int:
    return _shape(rest, "neck.lateral_convs.0.conv.weight", 4)[0]


def _shape(rest: StateDict, name: str, dims: int) -> Tuple[int, ...]:
    if name not in rest:
        raise _LayoutError(f"missing: {name}")
    shape = tuple(rest[name].shape)
    if len(shape) != dims or 0 in shape:
        raise _LayoutError(f"of another shape: {name} {shape} instead of {dims} dimensions")
    return shape


def _count(rest: StateDict, modules: str) -> int:
    """How many numbered modules there are, at least 1."""
    numbers = {k[len(modules) :].split(".")[1] for k in rest if k.startswith(f"{modules}.")}
    return max(len(numbers), 1)
