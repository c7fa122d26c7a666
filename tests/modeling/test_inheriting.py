"""The inheriting start: a student that begins with its teacher's weights."""

import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from helpers import distilling, tiny_cfg, tiny_model
from test_dense import pair

from crosskd_ifc import ConfigError, attach_teacher

I = "MODEL.CROSSKD.INHERIT"  # noqa: E741
HEAD = ("backbone.fpn", "proposal_generator", "roi_heads.box_head")
FUSED = "MODEL.CROSSKD.FUSION.IN_FEATURES"
MAP = "MODEL.CROSSKD.TEACHER.CLASS_MAP"


def inherited(*opts, teacher_opts=()):
    """(state before, student, teacher) after inheriting."""
    student, teacher = distilling(*opts, teacher_opts=teacher_opts)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    student.inherit_weights()
    return before, student, teacher


def test_named_modules_start_from_the_teacher_and_all_others_stay():
    before, student, teacher = inherited(I, HEAD)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        expected = theirs if name.startswith(HEAD) else before
        assert torch.equal(value, expected[name]), name


def test_nothing_is_inherited_by_default_or_before_it_is_asked_for():
    before, student, _ = inherited()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    student, teacher = distilling(I, HEAD)
    name = "roi_heads.box_head.fc1.weight"
    assert not torch.equal(student.state_dict()[name], teacher.state_dict()[name])


def test_the_teacher_keeps_its_own_copy():
    _, student, teacher = inherited(I, HEAD)
    weight = teacher.roi_heads.box_head.fc1.weight.clone()
    with torch.no_grad():
        student.roi_heads.box_head.fc1.weight.zero_()
    assert torch.equal(teacher.roi_heads.box_head.fc1.weight, weight)


def test_shapes_that_differ_are_left_and_what_happened_is_logged(caplog):
    wider = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 24)
    with caplog.at_level(logging.INFO, "crosskd_ifc"):
        before, student, teacher = inherited(
            *(I, ("roi_heads.box_head",), "MODEL.ROI_BOX_HEAD.NUM_CONV", 1), teacher_opts=wider
        )
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in ("conv1.weight", "conv1.bias"):
        assert torch.equal(ours[f"roi_heads.box_head.{name}"], theirs[f"roi_heads.box_head.{name}"])
    for name in ("fc1.weight", "fc2.bias"):
        assert torch.equal(ours[f"roi_heads.box_head.{name}"], before[f"roi_heads.box_head.{name}"])
    assert "INHERIT roi_heads.box_head: 2 of 6 tensors start from the teacher's" in caplog.text
    assert "roi_heads.box_head.fc2.bias ((16,), the teacher's is (24,))" in caplog.text


def test_layers_with_others_before_them_are_left(caplog):
    heads = ("roi_heads.box_head", "roi_heads.box_predictor")
    with caplog.at_level(logging.INFO, "crosskd_ifc"):
        before, student, teacher = inherited(
            *(I, heads[:1], "MODEL.ROI_BOX_HEAD.NUM_FC", 1, FUSED, ("pool",)),
        )
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert torch.equal(
        ours["roi_heads.box_head.fc1.weight"], theirs["roi_heads.box_head.fc1.weight"]
    )
    with pytest.raises(ConfigError, match="what lies before it in its head differs"):
        distilling(I, heads[1:], "MODEL.ROI_BOX_HEAD.NUM_FC", 1, FUSED, ("pool",))
    behind = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16)
    with pytest.raises(ConfigError, match="fc1.*what lies before it in its head differs"):
        distilling(I, ("roi_heads.box_head.fc1",), FUSED, ("pool",), teacher_opts=behind)


def test_layers_of_other_blocks_are_left():
    # Some convolutions of R50's blocks have the shapes of R18's.
    depth, width = "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.RES2_OUT_CHANNELS"
    sizes = ("MODEL.RESNETS.WIDTH_PER_GROUP", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    _, student, teacher = inherited(
        *(I, ("backbone.bottom_up",), *sizes, depth, 18, width, 64),
        teacher_opts=(*sizes, depth, 50, width, 256),
    )
    ours, theirs = student.state_dict(), teacher.state_dict()
    names = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    weights = [n for n in names if n.startswith("backbone.bottom_up") and ours[n].dim() > 1]
    same = [n for n in weights if torch.equal(ours[n], theirs[n])]
    assert same == ["backbone.bottom_up.stem.conv1.weight"] and len(weights) > 1


def test_a_prefix_that_matches_nothing_is_refused_when_the_teacher_is_attached():
    with pytest.raises(ConfigError, match="INHERIT: nothing of 'roi_heads.mask_head'.*no such mod"):
        distilling(I, ("backbone", "roi_heads.mask_head"))
    with pytest.raises(ConfigError, match=r"'roi_heads.box_head.fc1'.*none of its tensors fits"):
        distilling(I, ("roi_heads.box_head.fc1",), teacher_opts=("MODEL.ROI_BOX_HEAD.FC_DIM", 24))


def test_a_predictor_follows_the_class_map_and_masked_classes_keep_their_rows():
    setting = ((0, 4), (1, ""), (2, 0))
    before, student, teacher = inherited(
        *(I, ("roi_heads.box_predictor",), MAP, setting),
        teacher_opts=("MODEL.ROI_HEADS.NUM_CLASSES", 5),
    )
    ours, theirs = (m.roi_heads.box_predictor for m in (student, teacher))
    own = before["roi_heads.box_predictor.cls_score.weight"]
    rows = [theirs.cls_score.weight[4], own[1], theirs.cls_score.weight[0]]
    expected = torch.stack([*rows, theirs.cls_score.weight[5]])
    assert torch.equal(ours.cls_score.weight, expected)
    own = before["roi_heads.box_predictor.bbox_pred.bias"]
    boxes = theirs.bbox_pred.bias
    assert torch.equal(ours.bbox_pred.bias, torch.cat([boxes[16:20], own[4:8], boxes[:4]]))


def test_a_mask_predictor_follows_the_class_map():
    masks = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    opts = (*masks, I, ("roi_heads.mask_head",), MAP, ((0, 2), (1, 0), (2, 1)))
    _, student, teacher = inherited(*opts, teacher_opts=masks)
    ours, theirs = (m.roi_heads.mask_head.predictor.weight for m in (student, teacher))
    assert torch.equal(ours, theirs[[2, 0, 1]])


def test_a_teacher_of_other_classes_gives_no_predictor_even_where_the_shapes_agree(caplog):
    with caplog.at_level(logging.INFO, "crosskd_ifc"):
        before, student, teacher = inherited(I, ("roi_heads",), MAP, ("teacher",))
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(student.state_dict()[name], before[name])
    assert f"{name} (the teacher's classes are others)" in caplog.text
    name = "roi_heads.box_head.fc1.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])


@pytest.mark.parametrize(
    "opts, key",
    [
        (("INPUT.FORMAT", "RGB"), "INPUT.FORMAT"),
        (("MODEL.PIXEL_STD", [57.0, 57.0, 58.0]), "MODEL.PIXEL_STD"),
        (("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]), "MODEL.PIXEL_MEAN"),
    ],
)
def test_the_layer_that_sees_the_image_is_refused_where_the_images_differ(opts, key):
    with pytest.raises(ConfigError, match=f"INHERIT: backbone.*stem.conv1.weight.*{key} differ"):
        distilling(I, ("backbone",), teacher_opts=opts)
    distilling(I, ("backbone.fpn",), teacher_opts=opts)


def test_disabled_distillation_inherits_nothing():
    cfg = tiny_cfg(I, HEAD, "MODEL.CROSSKD.ENABLED", False)
    student = tiny_model(cfg)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    attach_teacher(student, cfg, teacher=tiny_model(seed=5))
    student.inherit_weights()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize(
    "opts, module, key",
    [
        (
            ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (20.0, 20.0, 10.0, 10.0)),
            "roi_heads.box_predictor.bbox_pred",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
        ),
        (
            ("MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.0, 1.0)),
            "proposal_generator.rpn_head.anchor_deltas",
            "MODEL.RPN.BBOX_REG_WEIGHTS",
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", [[9], [16], [32], [48], [64]]),
            "proposal_generator.rpn_head.objectness_logits",
            "MODEL.ANCHOR_GENERATOR.SIZES",
        ),
    ],
)
def test_tensors_that_mean_something_else_are_left(opts, module, key, caplog):
    modules = ("roi_heads.box_predictor", "proposal_generator")
    with caplog.at_level(logging.INFO, "crosskd_ifc"):
        before, student, teacher = inherited(I, modules, teacher_opts=opts)
    assert torch.equal(student.state_dict()[f"{module}.weight"], before[f"{module}.weight"])
    assert f"{module}.weight (it means something else: {key}" in caplog.text
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
    with pytest.raises(ConfigError, match=f"nothing of '{module}'.*something else: {key}"):
        distilling(I, (module,), teacher_opts=opts)


def test_the_class_weights_of_a_federated_loss_stay_those_of_the_students_data(caplog):
    names, head = ("federated_ours", "federated_theirs"), "MODEL.ROI_BOX_HEAD."
    federated = (head + "USE_SIGMOID_CE", True, head + "USE_FED_LOSS", True)
    federated += (head + "FED_LOSS_NUM_CLASSES", 2)
    for name, counts in zip(names, ((1, 10, 100), (100, 10, 1))):
        counted = [{"id": i, "image_count": n} for i, n in enumerate(counts, 1)]
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).class_image_count = counted
    cfg = tiny_cfg(*federated, "DATASETS.TRAIN", names[:1], I, ("roi_heads",))
    other = (*federated, "DATASETS.TRAIN", names[1:])
    student, teacher = tiny_model(cfg), tiny_model(tiny_cfg(*other, architecture="GeneralizedRCNN"))
    attach_teacher(student, cfg, teacher=teacher)
    with caplog.at_level(logging.INFO, "crosskd_ifc"):
        student.inherit_weights()
    weights = student.roi_heads.box_predictor.fed_loss_cls_weights
    torch.testing.assert_close(weights, torch.tensor([1.0, 10.0, 100.0]).sqrt())
    assert "fed_loss_cls_weights (it counts the classes of the student's own data" in caplog.text
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def left_of(student, teacher, name, caplog):
    """Whether a layer's tensors were left as they are, and the log's reason."""
    before = {k: v.clone() for k, v in student.state_dict().items() if k.startswith(f"{name}.")}
    with caplog.at_level(logging.INFO, "crosskd_ifc"):
        student.inherit_weights()
    after, theirs = student.state_dict(), teacher.state_dict()
    changed = [k for k in before if k in theirs and not torch.equal(before[k], after[k])]
    reason = caplog.text.partition(f"{name}.weight (it means something else: ")[2]
    return not changed, reason.partition(" differs")[0]


@pytest.mark.parametrize("name", ["cls_score", "bbox_pred"])
def test_dense_predictors_behind_towers_of_another_depth_are_left(name, caplog):
    student, teacher = pair(
        "RetinaNet", I, ("head",), teacher_opts=("MODEL.RETINANET.NUM_CONVS", 5)
    )
    found = left_of(student, teacher, f"head.{name}", caplog)
    assert found == (True, "what lies before it in its head")


def test_a_classifier_of_another_kind_of_score_is_left(caplog):
    sigmoid = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    student, teacher = distilling(I, ("roi_heads.box_predictor",), teacher_opts=sigmoid)
    found = left_of(student, teacher, "roi_heads.box_predictor.cls_score", caplog)
    assert found == (True, sigmoid[0])


BODY = "backbone.bottom_up"


@pytest.mark.parametrize(
    "opts, left, kept, key",
    [
        (
            ("MODEL.RESNETS.STRIDE_IN_1X1", False),
            (f"{BODY}.res3.0.conv1", f"{BODY}.res3.0.conv2"),
            (f"{BODY}.res3.0.conv3", f"{BODY}.res2.0.conv1", f"{BODY}.res3.1.conv1"),
            "MODEL.RESNETS.STRIDE_IN_1X1 or RES5_DILATION",
        ),
        (
            ("MODEL.FPN.FUSE_TYPE", "avg"),
            ("backbone.fpn_lateral3", "backbone.fpn_output2"),
            (f"{BODY}.res5.2.conv3",),
            "MODEL.FPN.FUSE_TYPE",
        ),
        (
            ("MODEL.FPN.NORM", "BN"),
            ("backbone.fpn_lateral3", "backbone.fpn_output2"),
            (f"{BODY}.res5.2.conv3",),
            "MODEL.FPN.NORM",
        ),
        (("MODEL.RESNETS.NORM", "BN"), (), (f"{BODY}.res3.0.conv1",), ""),  # FrozenBN is one, too
    ],
    ids=lambda x: x[0] if x and str(x[0]).startswith("MODEL") else None,
)
def test_layers_that_compute_something_else_are_left(opts, left, kept, key, caplog):
    for name in (*left, *kept):
        caplog.clear()
        student, teacher = distilling(I, ("backbone",), teacher_opts=opts)
        with torch.no_grad():  # a new norm's statistics are all alike
            for n, b in teacher.named_buffers():
                b += 0.5 if n.endswith("running_mean") else 0
        found = left_of(student, teacher, name, caplog)
        assert found == ((True, key) if name in left else (False, "")), name


def test_layers_of_another_dilation_are_left(caplog):
    dc5 = (
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res5"]),
        *("MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 32]]),
    )
    cfg = tiny_cfg(*dc5, I, ("backbone",))
    student = build_model(cfg)
    teacher = build_model(tiny_cfg(*dc5, "MODEL.RESNETS.RES5_DILATION", 2))
    attach_teacher(student, cfg, teacher=teacher)
    found = left_of(student, teacher, "backbone.res5.1.conv2", caplog)
    assert found == (True, "MODEL.RESNETS.RES5_DILATION")


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_towers_with_another_norm_are_left(kind, caplog):
    key = f"MODEL.{kind.upper()}.NORM"
    plain, normed = (key, ""), (key, "GN")
    # Places are counted with the norms: conv3 of the one stands where conv4 of the other does.
    student, teacher = pair(kind, *normed, I, ("head",), teacher_opts=plain)
    assert left_of(student, teacher, "head.cls_subnet.6", caplog) == (True, key)
    student, teacher = pair(kind, *normed, I, ("head",), teacher_opts=normed)
    assert left_of(student, teacher, "head.cls_subnet.6", caplog)[0] is False
