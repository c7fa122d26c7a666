"""mmdet's detectors in detectron2, compared with what mmdet makes of the same weights.

mmdet's side is written here with plain functions of torch and torchvision.
"""

import math
import runpy
import sys
import types
from typing import NamedTuple

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import tiny_batch, tiny_cfg, tiny_model, train_losses
from test_convert import SCRIPT, load, torchvision_features, torchvision_model
from torch.nn import functional as F

from crosskd_ifc import add_crosskd_ifc_config, attach_teacher
from crosskd_ifc.weights import convert
from crosskd_ifc.weights.mmdet_detectors import convert_detector
from crosskd_ifc.weights.mmdet_files import read_detector, read_python_config

K, C, FC = 3, 32, 16  # classes, channels of the pyramid, units of a box head's layer
RATIOS = (0.5, 1.0, 2.0)
KINDS = ("Faster R-CNN", "RetinaNet")
kinds = pytest.mark.parametrize("kind", KINDS)
BOX = "roi_head.bbox_head."


class Made(NamedTuple):
    """A detector of mmdet's.

    Attributes:
        resnet: torchvision's, whose weights its backbone has.
        state: by mmdet's names.
    """

    resnet: torch.nn.Module
    state: dict


def head_shapes(kind, *, depth=18, from_p5=False, deltas=4 * K, channels=C):
    """mmdet's module -> shape of its weight, of neck and heads."""
    stages = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
    square = (channels, channels, 3, 3)
    first = 0 if kind == "Faster R-CNN" else 1
    shapes = {}
    for i, width in enumerate(stages[first:]):
        shapes[f"neck.lateral_convs.{i}.conv"] = (channels, width, 1, 1)
        shapes[f"neck.fpn_convs.{i}.conv"] = square
    if kind == "Faster R-CNN":
        return {
            **shapes,
            "rpn_head.rpn_conv": square,
            "rpn_head.rpn_cls": (3, channels, 1, 1),
            "rpn_head.rpn_reg": (12, channels, 1, 1),
            BOX + "shared_fcs.0": (FC, channels * 49),
            BOX + "shared_fcs.1": (FC, FC),
            BOX + "fc_cls": (K + 1, FC),
            BOX + "fc_reg": (deltas, FC),
        }
    shapes["neck.fpn_convs.3.conv"] = (channels, channels if from_p5 else stages[-1], 3, 3)
    shapes["neck.fpn_convs.4.conv"] = square
    for tower in ("cls", "reg"):
        shapes.update({f"bbox_head.{tower}_convs.{i}.conv": square for i in range(4)})
    shapes["bbox_head.retina_cls"] = (9 * K, channels, 3, 3)
    shapes["bbox_head.retina_reg"] = (36, channels, 3, 3)
    return shapes


def made(kind, **settings) -> Made:
    """A detector none of whose weights is at its initial value, and whose outputs vary."""
    resnet = torchvision_model(18)
    backbone = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    state = {f"backbone.{k}": v for k, v in backbone.items()}
    g = torch.Generator().manual_seed(7)
    for module, shape in head_shapes(kind, **settings).items():
        weight = torch.randn(shape, generator=g)
        # Deltas small enough not to be bounded.
        gain = 0.1 if module.endswith("_reg") else math.sqrt(2)
        state[f"{module}.weight"] = weight * gain / math.sqrt(weight[0].numel())
        state[f"{module}.bias"] = torch.randn(shape[0], generator=g) * 0.1
    return Made(resnet, state)


def without_memory(kind, depth=18, **settings):
    """The same as a state dict of tensors without memory, of any depth."""
    with torch.device("meta"):
        resnet = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        state = {f"backbone.{k}": v for k, v in resnet.items() if not k.startswith("fc.")}
        for module, shape in head_shapes(kind, depth=depth, **settings).items():
            state[f"{module}.weight"] = torch.empty(shape)
            state[f"{module}.bias"] = torch.empty(shape[0])
    return state


def in_memory(content, depth=18):
    """What the converter makes of a content, without files."""
    checkpoint = read_detector(content, "IN")
    _, backbone = convert.convert_resnet(checkpoint.backbone)
    resnet = convert.required_config(depth, fold_input=False)
    return convert_detector(checkpoint, backbone, resnet, "IN")


def converted(content, folder):
    """(what was done, the model built from the written config) of a saved content."""
    torch.save(content, folder / "mmdet.pth")
    done = convert.convert_file(str(folder / "mmdet.pth"), str(folder / "teacher.pth"))
    cfg = get_cfg()
    cfg.merge_from_file(done.config_file, allow_unsafe=False)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    found = load(model, cfg.MODEL.WEIGHTS)
    assert not (found.missing_keys or found.unexpected_keys or found.incorrect_shapes)
    return done, model


def conv(state, module, x, **options):
    weight = state[f"{module}.weight"]
    options = {"padding": weight.shape[-1] // 2, **options}
    return F.conv2d(x, weight, state[f"{module}.bias"], **options)


def mmdet_pyramid(detector: Made, picture, size, *, first):
    """The ResNet's last map and the levels that are made from its stages ``first`` to 5."""
    stages = torchvision_features(detector.resnet, picture, size)
    maps = [stages[f"res{i}"] for i in range(first, 6)]
    laterals = [conv(detector.state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in range(len(laterals) - 1, 0, -1):
        shape = laterals[i - 1].shape[-2:]
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=shape, mode="nearest")
    levels = [conv(detector.state, f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(laterals)]
    return maps[-1], levels


def mmdet_anchors(level, stride, scales):
    """(positions, ratios x scales, 4): for each ratio all scales."""
    cells = []
    for ratio in RATIOS:
        for scale in scales:
            w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
            cells.append([-w / 2, -h / 2, w / 2, h / 2])
    y, x = torch.meshgrid(
        *(torch.arange(n) * float(stride) for n in level.shape[-2:]), indexing="ij"
    )
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return shifts + torch.tensor(cells)


def mmdet_boxes(boxes, deltas, stds=(1.0, 1.0, 1.0, 1.0)):
    """Boxes (..., 4) moved by deltas (..., 4)."""
    dx, dy, dw, dh = (deltas * torch.tensor(stds)).unbind(-1)
    bound = abs(math.log(16 / 1000))
    dw, dh = dw.clamp(-bound, bound), dh.clamp(-bound, bound)
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x, y = (boxes[..., 0] + boxes[..., 2]) / 2 + dx * w, (
        boxes[..., 1] + boxes[..., 3]
    ) / 2 + dy * h
    w, h = w * dw.exp(), h * dh.exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def by_position(maps, anchors, outputs):
    """(1, A * outputs, H, W) -> (positions, A, outputs)."""
    return maps[0].permute(1, 2, 0).reshape(-1, anchors, outputs)


def assert_close(found, wanted, tolerance=1e-4):
    """That the values of one map agree, relative to its largest."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def assert_same_anchor_by_anchor(found, wanted):
    """(anchors, scores, boxes) each (positions, A, n): the same, in whatever order of A."""
    order = torch.cdist(found[0][0], wanted[0][0]).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(len(order)))
    for x, y in zip(found, wanted):
        assert_close(x, y[:, order])


def moved(transform, anchors, deltas):
    """What detectron2 makes of anchors (positions, A, 4) and a map of deltas."""
    deltas = by_position(deltas, anchors.shape[1], 4)
    boxes = transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1))
    return boxes.reshape(anchors.shape)


@pytest.fixture
def picture():
    """An RGB picture and the size that 32 x 32 cells pad it to."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 120, 150), generator=g, dtype=torch.uint8), (128, 160)


@torch.no_grad()
@pytest.mark.parametrize("from_p5", [False, True], ids=["P6 from C5", "P6 from P5"])
def test_retinanet_gives_each_anchor_mmdets_scores_and_box(tmp_path, picture, from_p5):
    detector = made("RetinaNet", from_p5=from_p5)
    done, model = converted({"state_dict": detector.state}, tmp_path)
    assert done.found == "RetinaNet (mmdet, ResNet-18-FPN, 3 classes)"
    c5, levels = mmdet_pyramid(detector, *picture, first=3)
    state, source = detector.state, levels[-1] if from_p5 else c5
    levels.append(conv(state, "neck.fpn_convs.3.conv", source, stride=2))
    levels.append(conv(state, "neck.fpn_convs.4.conv", levels[-1], stride=2))
    assert (levels[-2] < 0).any()  # so a ReLU before P7 would show

    images = model.preprocess_image([{"image": picture[0]}])
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    anchors = model.anchor_generator(features)
    logits, deltas = model.head(features)
    scales = [4 * 2 ** (i / 3) for i in range(3)]
    for i, level in enumerate(levels):
        assert_close(features[i], level)
        towers = {}
        for tower in ("cls", "reg"):
            x = level
            for n in range(4):
                x = conv(state, f"bbox_head.{tower}_convs.{n}.conv", x).relu()
            towers[tower] = conv(state, f"bbox_head.retina_{tower}", x)
        theirs = mmdet_anchors(level, 8 * 2**i, scales)
        scores = by_position(towers["cls"], 9, K).sigmoid()
        boxes = mmdet_boxes(theirs, by_position(towers["reg"], 9, 4))
        assert scores.std() > 0.02 and (boxes - theirs).abs().mean() > 1
        ours = anchors[i].tensor.reshape(-1, 9, 4)
        our_scores = by_position(logits[i], 9, K).sigmoid()
        our_boxes = moved(model.box2box_transform, ours, deltas[i])
        assert_same_anchor_by_anchor((ours, our_scores, our_boxes), (theirs, scores, boxes))


@torch.no_grad()
@pytest.mark.parametrize("deltas", [4 * K, 4], ids=["by class", "class agnostic"])
def test_faster_rcnn_gives_mmdets_proposals_scores_and_boxes(tmp_path, picture, deltas):
    detector = made("Faster R-CNN", deltas=deltas)
    done, model = converted({"state_dict": detector.state}, tmp_path)
    assert done.found == "Faster R-CNN (mmdet, ResNet-18-FPN, 3 classes)"
    assert done.config.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG == (deltas == 4)
    _, levels = mmdet_pyramid(detector, *picture, first=2)
    levels.append(F.max_pool2d(levels[-1], 1, stride=2))

    images = model.preprocess_image([{"image": picture[0]}])
    features = model.backbone(images.tensor)
    rpn, state = model.proposal_generator, detector.state
    ours = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator(ours)
    logits, our_deltas = rpn.rpn_head(ours)
    for i, level in enumerate(levels):
        assert_close(ours[i], level)
        x = conv(state, "rpn_head.rpn_conv", level).relu()
        theirs = mmdet_anchors(level, 4 * 2**i, [8])
        scores = by_position(conv(state, "rpn_head.rpn_cls", x), 3, 1)
        boxes = mmdet_boxes(theirs, by_position(conv(state, "rpn_head.rpn_reg", x), 3, 4))
        assert scores.std() > 0.02 and (boxes - theirs).abs().mean() > 1
        cells = anchors[i].tensor.reshape(-1, 3, 4)
        our_boxes = moved(rpn.box2box_transform, cells, our_deltas[i])
        found = (cells, by_position(logits[i], 3, 1), our_boxes)
        assert_same_anchor_by_anchor(found, (theirs, scores, boxes))

    # One box for each of the four levels that boxes are assigned to, and one between two sizes.
    rois = torch.tensor(
        [[3, 4, 50, 60], [10, 0, 150, 118], [0, 0, 300, 260], [-200, -90, 400, 420], [9, 9, 30, 25]]
    ).float()
    sides = (rois[:, 2:] - rois[:, :2]).prod(dim=1).sqrt()
    assigned = (sides / 56 + 1e-6).log2().floor().clamp(0, 3).long()
    assert sorted(set(assigned.tolist())) == [0, 1, 2, 3]
    pooled = torch.stack(
        [
            torchvision.ops.roi_align(levels[i], [roi[None]], 7, 1 / (4 * 2**i), aligned=True)[0]
            for i, roi in zip(assigned.tolist(), rois)
        ]
    )
    x = pooled.flatten(1)
    for name in ("shared_fcs.0", "shared_fcs.1"):
        x = F.linear(x, state[f"{BOX}{name}.weight"], state[f"{BOX}{name}.bias"]).relu()
    scores = F.linear(x, state[f"{BOX}fc_cls.weight"], state[f"{BOX}fc_cls.bias"]).softmax(dim=1)
    moves = F.linear(x, state[f"{BOX}fc_reg.weight"], state[f"{BOX}fc_reg.bias"])
    moves = moves.reshape(len(rois), -1, 4)
    boxes = mmdet_boxes(rois[:, None].expand_as(moves), moves, stds=(0.1, 0.1, 0.2, 0.2))
    assert scores.std() > 0.02

    heads = model.roi_heads
    proposals = Instances(images.image_sizes[0], proposal_boxes=Boxes(rois))
    inputs = [features[name] for name in heads.box_in_features]
    predictions = heads.box_predictor(heads.box_head(heads.box_pooler(inputs, [Boxes(rois)])))
    assert_close(heads.box_predictor.predict_probs(predictions, [proposals])[0], scores)
    found = heads.box_predictor.predict_boxes(predictions, [proposals])[0]
    assert_close(found.reshape(len(rois), -1, 4), boxes)


def test_faster_rcnn_teaches_from_its_config(tmp_path):
    detector = made("Faster R-CNN")
    done, _ = converted(detector.state, tmp_path)
    teacher = "MODEL.CROSSKD.TEACHER."
    weights = done.config.MODEL.WEIGHTS
    cfg = tiny_cfg(teacher + "CONFIG_FILE", done.config_file, teacher + "WEIGHTS", weights)
    student = tiny_model(cfg)
    attached = attach_teacher(student, cfg)
    predictor = attached.model.roi_heads.box_predictor
    assert torch.equal(predictor.bbox_pred.weight, detector.state[BOX + "fc_reg.weight"])
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0


def test_retinanet_teaches_a_student_of_detectron2s_own_anchors_and_pyramid(tmp_path):
    detector = made("RetinaNet", from_p5=True)
    done, _ = converted(detector.state, tmp_path)
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.merge_from_file(done.config_file)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "CrossKDRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    # As in detectron2's own config.
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)
    ]
    cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE = done.config_file
    cfg.MODEL.CROSSKD.TEACHER.WEIGHTS = cfg.MODEL.WEIGHTS
    torch.manual_seed(0)
    student = build_model(cfg)
    attached = attach_teacher(student, cfg)
    p7 = attached.model.backbone.top_block.p7
    assert torch.equal(p7.weight, detector.state["neck.fpn_convs.4.conv.weight"])
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0


@kinds
@pytest.mark.parametrize("depth", convert.DEPTHS)
def test_every_depth_gives_all_weights_of_detectron2s_model(kind, depth):
    for from_p5 in (False, True):
        state = without_memory(kind, depth, from_p5=from_p5, channels=256)
        found = in_memory(state, depth)
        cfg = get_cfg()
        cfg.merge_from_other_cfg(found.config)
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            model = build_model(cfg)
        assert not convert.describe_mismatch(found.weights, model.state_dict())


@kinds
def test_prefixes_wrappers_and_half_precision_change_nothing(kind, tmp_path):
    detector = made(kind)
    wanted = in_memory(detector.state).weights
    for content in (
        {"state_dict": detector.state, "meta": {"epoch": 12}, "optimizer": {"state": {}}},
        {"module." + k: v for k, v in detector.state.items()},
    ):
        found = in_memory(content).weights
        assert found.keys() == wanted.keys()
        assert all(torch.equal(v, wanted[k]) for k, v in found.items())
    half = {k: v.half() if v.is_floating_point() else v for k, v in detector.state.items()}
    assert all(v.dtype == torch.float32 for v in in_memory(half).weights.values())


# Training configs as mmdet writes them into its checkpoints.
CONFIG_2 = """
model = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=18, norm_cfg=dict(type='BN'), style='pytorch'),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, start_level=1,
              add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=3,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True)))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
lr = -1 * base
"""
INLINE = "dict(transforms=[dict(type='Normalize', std=[255, 255, 255])])"
CONFIG_3 = """
model = dict(
    backbone=dict(depth=18, style='pytorch', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        std=[58.395, 57.12, 57.375],
        type='DetDataPreprocessor'),
    roi_head=dict(
        bbox_head=dict(
            bbox_coder=dict(
                target_stds=[0.1, 0.1, 0.2, 0.2],
                type='mmdet.models.task_modules.DeltaXYWHBBoxCoder'),
            num_classes=3),
        bbox_roi_extractor=dict(
            featmap_strides=[4, 8, 16, 32],
            roi_layer=dict(output_size=7, sampling_ratio=0, type='RoIAlign'))),
    rpn_head=dict(
        anchor_generator=dict(
            ratios=[0.5, 1.0, 2.0], scales=[8], strides=[4, 8, 16, 32, 64],
            type='AnchorGenerator'),
        bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0], type='DeltaXYWHBBoxCoder')))
"""


@pytest.mark.parametrize(
    "kind, key, text", [(KINDS[1], "config", CONFIG_2), (KINDS[0], "cfg", CONFIG_3)]
)
def test_a_training_config_in_the_file_is_compared(kind, key, text):
    state = without_memory(kind)
    content = {"state_dict": state, "meta": {key: text}}
    assert "fits detectron2's model" in in_memory(content).note
    for meta in (None, {}, {key: "model = ("}, {key: 3}, {key: "model = build()"}):
        assert "style='pytorch', not 'caffe'" in in_memory({"state_dict": state, "meta": meta}).note


@pytest.mark.parametrize(
    "kind, key, old, new, message",
    [
        (
            KINDS[1],
            "config",
            "'pytorch'",
            "'caffe'",
            "backbone.style is 'caffe' instead of 'pytorch'",
        ),
        (KINDS[1], "config", "to_rgb=True", "to_rgb=False", "img_norm_cfg.to_rgb is False"),
        (KINDS[1], "config", "base_scale=4", "base_scale=8", "octave_base_scale is 8 instead of 4"),
        (KINDS[1], "config", "'on_input'", "'on_lateral'", "add_extra_convs is 'on_lateral'"),
        (KINDS[1], "config", "num_outs=5", "relu_before_extra_convs=True", "relu_before_extra"),
        (KINDS[1], "config", "'AnchorGen", "'LegacyAnchorGen", "type is 'LegacyAnchorGenerator'"),
        (KINDS[0], "cfg", "58.395", "1.0", "data_preprocessor.std is"),
        (KINDS[0], "cfg", "scales=[8]", "scales=[4, 8]", "rpn_head.anchor_generator.scales is"),
        (KINDS[0], "cfg", "0.1, 0.1", "0.05, 0.05", "bbox_head.bbox_coder.target_stds is"),
        (KINDS[0], "cfg", "sampling_ratio=0", "sampling_ratio=2", "sampling_ratio is 2"),
        (KINDS[0], "cfg", "scales=[8]", "scales=[8], center_offset=0.5", "center_offset is 0.5"),
        (KINDS[1], "config", "means=[0.0", "means=[0.1", "target_means is [0.1"),
        (KINDS[1], "config", "ratios=", "scale_major=False, ratios=", "scale_major is False"),
        (KINDS[1], "config", "ratios=", "scales=[4], ratios=", "anchor_generator.scales is [4]"),
        (KINDS[1], "config", "depth=18", "depth=18, strides=(1, 2, 2, 1)", "strides is [1, 2, 2"),
        (KINDS[0], "cfg", "depth=18", "dilations=(1, 1, 1, 2)", "dilations is [1, 1, 1, 2]"),
        (KINDS[0], "cfg", "scales=[8]", "scales=[8], base_sizes=[8, 8]", "base_sizes is [8, 8]"),
        (KINDS[0], "cfg", "roi_layer=", "finest_scale=112, roi_layer=", "finest_scale is 112"),
        (
            *(
                KINDS[0],
                "cfg",
                "\nmodel = ",
                "\ndata_preprocessor = dict(mean=[0, 0, 0])\nmodel = ",
            ),
            "data_preprocessor.mean is [0, 0, 0] instead of",
        ),
        (
            *(KINDS[1], "config", "\nlr = ", f"\ntest_pipeline = [{INLINE}]\nlr = "),
            "test_pipeline.0.transforms.0.std is [255, 255, 255] instead of",
        ),
    ],
)
def test_settings_that_detectron2s_model_would_not_have_are_refused(kind, key, old, new, message):
    text = CONFIG_2 if key == "config" else CONFIG_3
    assert old in text
    content = {"state_dict": without_memory(kind), "meta": {key: text.replace(old, new)}}
    with pytest.raises(ValueError, match="IN: trained with settings that can't be conv") as error:
        in_memory(content)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "step",
    [
        "dict(type='MultiScaleFlipAug', img_scale=(512, 384), flip=False)",
        "dict(type='Resize', scale=(512, 384), keep_ratio=True)",
    ],
    ids=["2.x", "3.x"],
)
def test_images_have_the_size_that_mmdet_tests_them_with(step):
    state, text = (
        without_memory(KINDS[0]),
        CONFIG_3 + f"test_pipeline = [dict(type='Load'), {step}]",
    )
    found = in_memory({"state_dict": state, "meta": {"cfg": text}}).config.INPUT
    assert (found.MIN_SIZE_TEST, found.MAX_SIZE_TEST) == (384, 512)
    found = in_memory({"state_dict": state, "meta": {"cfg": CONFIG_3}}).config.INPUT
    assert (found.MIN_SIZE_TEST, found.MAX_SIZE_TEST) == (800, 1333)


def test_a_config_that_does_not_tell_the_input_is_not_said_to_fit():
    content = {"state_dict": without_memory(KINDS[0]), "meta": {"cfg": CONFIG_3}}
    assert "fits" in in_memory(content).note
    content["meta"]["cfg"] = CONFIG_3.replace("mean=[", "others=[")
    assert "Assumed" in in_memory(content).note


def test_a_config_is_read_and_never_run():
    text = "a = dict(b={'c': (1, -2.5)}, d=None)\ne = open('x')\nf: int = 3\nimport os\ng.h = 1"
    assert read_python_config(text) == {"a": {"b": {"c": [1, -2.5]}, "d": None}, "e": {}}


@pytest.mark.parametrize("deep", ["[" * 300 + "]" * 300, "-" * 9_000 + "1", "1" + "+1" * 9_000])
def test_a_config_nested_without_end_is_an_unknown_one(deep):
    assert read_python_config(f"a = {deep}") == {}
    content = {"state_dict": without_memory("RetinaNet"), "meta": {"cfg": f"model = {deep}"}}
    assert in_memory(content).note == in_memory({"state_dict": content["state_dict"]}).note


def changed(kind, *, without="", **added):
    state = without_memory(kind)
    state = {k: v for k, v in state.items() if not without or not k.startswith(without)}
    added = {k.replace("__", "."): torch.empty(v, device="meta") for k, v in added.items()}
    return {**state, **added}


@pytest.mark.parametrize(
    "state, message",
    [
        (
            changed("Faster R-CNN", roi_head__mask_head__conv_logits__weight=(3, 8, 1, 1)),
            "as mmdet's Faster R-CNN; unexpected: roi_head.mask_head.conv_logits.weight",
        ),
        (
            changed("Faster R-CNN", without=BOX, roi_head__bbox_head__0__fc_cls__weight=(4, 16)),
            "it has rpn_head.rpn_conv, rpn_head.rpn_cls, rpn_head.rpn_reg, roi_head.bbox_head.0",
        ),
        (
            changed("RetinaNet", without="bbox_head.retina", bbox_head__gfl_cls__weight=(3, 32)),
            "it has bbox_head.cls_convs, bbox_head.reg_convs, bbox_head.gfl_cls. Supported are",
        ),
        (
            changed(
                "RetinaNet",
                without="bbox_head.cls_convs.0.conv.bias",
                bbox_head__cls_convs__0__gn__bias=(32,),
            ),
            "missing: bbox_head.cls_convs.0.conv.bias; unexpected: bbox_head.cls_convs.0.gn.bias",
        ),
        (changed("RetinaNet", without="neck"), "missing: neck.lateral_convs.0.conv.weight"),
        (
            changed("RetinaNet", without="bbox_head.reg_convs.3"),
            "missing: bbox_head.reg_convs.3.conv.weight, bbox_head.reg_convs.3.conv.bias",
        ),
        (
            {**without_memory("Faster R-CNN"), "rpn_head.rpn_cls.bias": torch.empty(6)},
            "of another shape: rpn_head.rpn_cls.bias (6,) instead of (3,)",
        ),
        (
            {**without_memory("Faster R-CNN"), BOX + "fc_cls.weight": torch.empty(4)},
            "fc_cls.weight (4,) instead of 2 dimensions",
        ),
        (
            without_memory("RetinaNet", channels=512),
            "C5 and P5 both have 512 channels, which leaves open what P6 is made from",
        ),
        ({"state_dict": changed("RetinaNet"), "meta": {"mmdet_version": "1.2.0"}}, "mmdet 1.2.0"),
        ({"state_dict": {"backbone.conv1.weight": 3}}, "not a state dict"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(state, message):
    with pytest.raises(ValueError) as error:
        in_memory(state)
    assert message in str(error.value)


def test_another_backbone_is_refused(tmp_path):
    state = made("RetinaNet").state
    state["backbone.stem.0.weight"] = state.pop("backbone.conv1.weight")
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="its backbone: .*missing: conv1.weight; .*stem.0.weight"):
        convert.convert_file(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"))


def test_a_file_with_mmengines_objects_tells_how_to_save_it_without(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": {}, "meta": {}, "message_hub": module.HistoryBuffer()}
    torch.save(content, tmp_path / "IN")
    with pytest.raises(ValueError, match="a mmengine.logging.history_buffer.Hist") as error:
        convert.convert_file(str(tmp_path / "IN"), str(tmp_path / "out.pth"))
    (command,) = [x for x in str(error.value).splitlines() if "python -c" in x]
    monkeypatch.chdir(tmp_path)
    exec(command.split('"')[1], {})
    assert torch.load("plain.pth", weights_only=True) == {"state_dict": {}, "meta": {}}


def test_folding_the_input_of_a_detector_is_refused(tmp_path):
    torch.save(made("RetinaNet").state, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="--fold-input is for backbones"):
        convert.convert_file(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), fold_input=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]


def test_neither_file_is_written_where_the_config_exists(tmp_path):
    torch.save(made("RetinaNet").state, tmp_path / "in.pth")
    config, paths = tmp_path / "out.yaml", (str(tmp_path / "in.pth"), str(tmp_path / "out.pth"))
    config.write_text("mine")
    with pytest.raises(FileExistsError, match="out.yaml exists"):
        convert.convert_file(*paths)
    assert config.read_text() == "mine" and not (tmp_path / "out.pth").exists()
    convert.convert_file(*paths, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.pth", "out.yaml"]
    assert "RETINANET" in config.read_text()


def test_classes_stand_in_the_config_and_those_of_coco_name_its_data_set(tmp_path):
    names = ["café", "a\u2028b: #c", "x" * 120]
    meta = {"dataset_meta": {"classes": names}}
    done, _ = converted({"state_dict": made("RetinaNet").state, "meta": meta}, tmp_path)
    text = open(done.config_file, encoding="ascii").read()
    assert f"# Classes: 'caf\\xe9', 'a\\u2028b: #c',\n# '{'x' * 120}'.\n" in text
    assert "DATASETS" not in done.config
    coco = MetadataCatalog.get("coco_2017_val").thing_classes
    for meta in ({"CLASSES": tuple(coco)}, {"dataset_meta": {"CLASSES": coco}}):
        found = in_memory({"state_dict": without_memory("RetinaNet"), "meta": meta})
        assert found.config.DATASETS.TEST == ["coco_2017_val"]


@kinds
def test_script_names_what_it_found_and_how_to_use_it(kind, tmp_path, capsys):
    torch.save({"state_dict": made(kind).state, "meta": {}}, tmp_path / "in.pth")
    out = tmp_path / "new" / "teacher.pth"
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(tmp_path / "in.pth"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"Found a {kind} (mmdet, ResNet-18-FPN, 3 classes) in" in printed
    assert "Assumed" in printed
    assert f"MODEL.CROSSKD.TEACHER.CONFIG_FILE {out.with_suffix('.yaml')}\n" in printed
    assert f"MODEL.CROSSKD.TEACHER.WEIGHTS {out}\n" in printed
    assert main([str(tmp_path / "in.pth"), str(out), "--fold-input", "--force"]) == 1
    assert capsys.readouterr().err.startswith("convert_weights: ")
