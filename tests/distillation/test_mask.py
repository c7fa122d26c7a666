"""Mask R-CNN: the mask head's distillation on positive RoIs."""

import copy

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from helpers import check_mimic_both, distilling, tiny_batch, tiny_cfg, tiny_model, train_losses

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.distillation import losses

K = "MODEL.CROSSKD."
MASKS = (
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7),
)
STUDENT_HEAD = (K + "MIMIC", "student_head")
TRUTH = (K + "LOSS.MASK_CHANNELS", "ground_truth")
PUBLISHED = (K + "LOSS.MASK_REDUCTION", "published")
WEIGHT_1 = (K + "LOSS.MASK_WEIGHT", 1.0)


def visible_masks(model):
    """The mask predictor starts at almost 0; make its logits differ from place to place."""
    torch.nn.init.normal_(model.roi_heads.mask_head.predictor.weight, std=1.0)
    return model


def mask_pair(*opts, teacher_opts=()):
    torch.manual_seed(3)
    teacher = visible_masks(tiny_model(tiny_cfg(*MASKS, *teacher_opts), seed=2))
    student, _ = distilling(*MASKS, *opts, teacher=teacher)
    return visible_masks(student), teacher


def batch(**kwargs):
    return tiny_batch(masks=True, **kwargs)


def recorded(student, inputs):
    """The step of a training forward, as the distiller has recorded it."""
    torch.manual_seed(0)
    with EventStorage(), student.distiller.recording(student, inputs, 1.0) as step:
        GeneralizedRCNN.forward(student, inputs)
    return step


def teacher_masks(teacher, step, inputs):
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(inputs).tensor)
        heads = teacher.roi_heads
        pooled = heads.mask_pooler([features[f] for f in heads.mask_in_features], step_boxes(step))
        return heads.mask_head.layers(pooled)


def step_boxes(step):
    return [x.proposal_boxes for x in step.heads.mask.instances]


def cross_masks(teacher, step):
    heads = teacher.roi_heads
    features = [step.features[f] for f in heads.mask_in_features]
    return heads.mask_head.layers(heads.mask_pooler(features, step_boxes(step)))


@pytest.mark.parametrize("opts", [(), STUDENT_HEAD, TRUTH, PUBLISHED, (*STUDENT_HEAD, *TRUTH)])
def test_a_student_that_is_its_own_teacher_has_no_mask_loss(opts):
    cfg = tiny_cfg(*MASKS, *opts)
    torch.manual_seed(3)
    student = visible_masks(tiny_model(cfg))
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    result, _ = train_losses(student.train(), batch())
    assert 0 <= result["loss_mask_kd"] <= 1e-5


@pytest.mark.parametrize("resolution", [7, 14], ids=["equal poolers", "unlike poolers"])
@pytest.mark.parametrize("reduction", ["published", "mean"])
def test_the_loss_is_the_focal_loss_of_the_students_pyramid_in_the_teachers_head(
    resolution, reduction
):
    size = ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", resolution)
    weight = (K + "LOSS.MASK_WEIGHT", 3.0, K + "LOSS.MASK_REDUCTION", reduction)
    student, teacher = mask_pair(*weight, teacher_opts=size)
    inputs = batch()
    step = recorded(student, inputs)
    z, t = cross_masks(teacher, step), teacher_masks(teacher, step, inputs)
    assert len(z) > 0 and z.shape[1:] == (3, 2 * resolution, 2 * resolution)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (z, t)]
    normalizer = 32 if reduction == "published" else z.numel()  # 32: RoIs of both images
    expected = losses.quality_focal(*rows, beta=1.0, normalizer=normalizer)
    result, _ = train_losses(student, inputs)
    torch.testing.assert_close(result["loss_mask_kd"], 3 * expected)
    assert expected > 0


@pytest.mark.parametrize("opts", [(), STUDENT_HEAD, PUBLISHED])
def test_the_ground_truth_channel_is_the_one_that_the_class_map_says(opts):
    order = ((0, 2), (1, 0), (2, ""))
    student, teacher = mask_pair(*TRUTH, *WEIGHT_1, K + "TEACHER.CLASS_MAP", order, *opts)
    inputs = batch()
    step = recorded(student, inputs)
    classes = torch.cat([x.gt_classes for x in step.heads.mask.instances])
    kept = classes != 2
    assert 0 < kept.sum() < len(kept)
    ours, theirs = classes[kept], torch.tensor([2, 0])[classes[kept]]
    own = opts == STUDENT_HEAD
    z = (step.heads.mask.logits if own else cross_masks(teacher, step))[kept]
    t, index = teacher_masks(teacher, step, inputs)[kept], torch.arange(len(z))
    picked = [x[index, i].reshape(-1, 1) for x, i in ((z, ours if own else theirs), (t, theirs))]
    normalizer = 32 if opts == PUBLISHED else picked[0].numel()
    expected = losses.quality_focal(*picked, beta=1.0, normalizer=normalizer)
    result, _ = train_losses(student, inputs)
    torch.testing.assert_close(result["loss_mask_kd"], expected)


def test_the_gradient_reaches_the_pyramid_but_not_the_students_mask_head():
    student, teacher = mask_pair()
    result, _ = train_losses(student, batch())
    result["loss_mask_kd"].backward()
    touched = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("backbone.fpn_output") for n in touched)
    assert not any(n.startswith(("roi_heads", "proposal_generator")) for n in touched)
    assert all(p.grad is None for p in teacher.parameters())


def test_student_head_compares_the_students_own_masks():
    student, teacher = mask_pair(*STUDENT_HEAD, *PUBLISHED, *WEIGHT_1)
    inputs = batch()
    step = recorded(student, inputs)
    rows = [
        x.permute(0, 2, 3, 1).reshape(-1, 3)
        for x in (step.heads.mask.logits, teacher_masks(teacher, step, inputs))
    ]
    result, _ = train_losses(student, inputs)
    expected = losses.quality_focal(*rows, beta=1.0, normalizer=32)
    torch.testing.assert_close(result["loss_mask_kd"], expected)
    result["loss_mask_kd"].backward()
    assert student.roi_heads.mask_head.predictor.weight.grad.any()


def test_the_students_own_masks_are_compared_with_those_of_the_same_classes():
    order = (K + "TEACHER.CLASS_MAP", ((0, 2), (1, 0), (2, 1)))
    student, teacher = mask_pair(*STUDENT_HEAD, *WEIGHT_1, *order)
    inputs = batch()
    step = recorded(student, inputs)
    z = step.heads.mask.logits.reshape(-1, 1)
    t = teacher_masks(teacher, step, inputs)[:, [2, 0, 1]].reshape(-1, 1)
    expected = losses.quality_focal(z, t, beta=1.0, normalizer=len(z))
    torch.testing.assert_close(train_losses(student, inputs)[0]["loss_mask_kd"], expected)


def test_mimic_both_adds_the_losses_of_cross_head_and_own_masks():
    check_mimic_both(mask_pair, batch(), "loss_mask_kd")


def test_a_pooler_that_samples_otherwise_is_another_one():
    sampling = ("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 1)
    student, teacher = mask_pair(*WEIGHT_1, teacher_opts=sampling)
    inputs = batch()
    step = recorded(student, inputs)
    z, t = (
        x.reshape(-1, 1) for x in (cross_masks(teacher, step), teacher_masks(teacher, step, inputs))
    )
    expected = losses.quality_focal(z, t, beta=1.0, normalizer=len(z))
    torch.testing.assert_close(train_losses(student, inputs)[0]["loss_mask_kd"], expected)


def test_the_teachers_pooler_reads_float32_under_autocast():
    # It rounds the coordinates of boxes to the type of its features.
    student, teacher = mask_pair(teacher_opts=("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14))
    seen = []
    teacher.roi_heads.mask_pooler.register_forward_pre_hook(
        lambda _, inputs: seen.extend(x.dtype for x in inputs[0])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_losses(student, batch())
    assert len(seen) == 8 and set(seen) == {torch.float32}  # both pyramids


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("opts", [(), STUDENT_HEAD, (*TRUTH, *PUBLISHED)])
def test_without_positive_rois_the_loss_is_a_connected_zero(opts, factor):
    student, _ = mask_pair(*opts, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False)
    student.kd_factor = factor
    result, _ = train_losses(student, batch(boxes_per_image=(0, 0)))
    assert result["loss_mask_kd"] == 0
    if factor:
        assert result["loss_mask_kd"].requires_grad
    sum(result.values()).backward()
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_a_mask_forward_of_ones_own_is_refused_not_taken_for_no_positives(monkeypatch):
    student, _ = mask_pair()

    def own(self, features, instances):
        return {"loss_mask": features["p2"].sum() * 0}

    monkeypatch.setattr(type(student.roi_heads), "_forward_mask", own)
    with pytest.raises(ConfigError, match="don't call their mask_head.*MASK_WEIGHT to 0"):
        train_losses(student, batch())


def test_a_weight_of_zero_leaves_masks_alone_and_lets_the_teacher_have_none():
    off = (K + "LOSS.MASK_WEIGHT", 0.0)
    student, _ = distilling(*MASKS, *off)
    result, _ = train_losses(student, batch())
    assert "loss_mask" in result and "loss_mask_kd" not in result


def test_one_mask_pooling_for_each_network_where_the_poolers_agree():
    student, teacher = mask_pair()
    calls = []
    for model in (student, teacher):
        model.roi_heads.mask_pooler.register_forward_hook(lambda *_, m=model: calls.append(m))
    train_losses(student, batch())
    assert len(calls) == 2 and calls[0] is student and calls[1] is teacher


def test_class_agnostic_masks_have_one_channel():
    agnostic = ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True)
    for opts in ((), TRUTH):
        student, _ = mask_pair(*opts, teacher_opts=agnostic)
        assert train_losses(student, batch())[0]["loss_mask_kd"] > 0
    student, _ = mask_pair(*STUDENT_HEAD, *TRUTH, teacher_opts=agnostic)
    assert train_losses(student, batch())[0]["loss_mask_kd"] > 0


@pytest.mark.parametrize("pooler", [7, 14])
def test_a_narrower_pyramid_is_led_to_the_teachers_by_a_learned_convolution(pooler):
    wide = ("MODEL.FPN.OUT_CHANNELS", 12, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", pooler)
    student, teacher = mask_pair(teacher_opts=wide)
    assert student.fusion.mask.weight.shape == (12, 8, 1, 1)
    result, _ = train_losses(student, batch())
    assert result["loss_mask_kd"] > 0
    result["loss_mask_kd"].backward()
    assert student.fusion.mask.weight.grad.abs().sum() > 0
    assert student.backbone.fpn_output2.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    # One that gives nothing leaves the teacher's head to its biases.
    torch.nn.init.zeros_(student.fusion.mask.weight)
    assert not torch.equal(
        train_losses(student, batch())[0]["loss_mask_kd"], result["loss_mask_kd"]
    )


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("boxes", [(0, 0), (2, 3)])
def test_the_adapters_get_a_gradient_in_every_step(factor, boxes):
    student, _ = mask_pair(
        *(K + "LOSS.FEATURE_WEIGHT", 1.0), teacher_opts=("MODEL.FPN.OUT_CHANNELS", 12)
    )
    student.kd_factor = factor
    sum(train_losses(student, tiny_batch(boxes_per_image=boxes, masks=True))[0].values()).backward()
    learned = {n for n, _ in student.named_parameters() if n.startswith("fusion.")}
    assert {"fusion.mask.weight", "fusion.feature.p2.adapter.weight"} <= learned
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name


REFUSED = {
    "a teacher without masks": ((), None, "MASK_WEIGHT: the teacher.*no mask head.*set it to 0.0"),
    "student_head with another size": (
        STUDENT_HEAD,
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
        r"ROI_MASK_HEAD.POOLER_RESOLUTION.*\(7, 7\).*\(14, 14\)",
    ),
    "student_head with agnostic masks": (
        STUDENT_HEAD,
        ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
        "MASK_CHANNELS 'all'.*CLS_AGNOSTIC_MASK.*'ground_truth'",
    ),
    "the truth's channel of other classes": (
        (*TRUTH, K + "TEACHER.CLASS_MAP", ("teacher",)),
        (),
        "CLASS_MAP.*nothing in common, but MODEL.CROSSKD.LOSS.MASK_CHANNELS 'ground_truth'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_whose_masks_do_not_fit_is_refused_naming_the_key(case):
    opts, teacher_opts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        if teacher_opts is None:
            distilling(*MASKS, *opts)
        else:
            mask_pair(*opts, teacher_opts=teacher_opts)


def test_a_distilled_mask_rcnn_evaluates_and_loads_as_stock_detectron2():
    student, _ = mask_pair()
    stock = build_model(tiny_cfg(*MASKS, architecture="GeneralizedRCNN"))
    stock.load_state_dict(student.state_dict())
    with torch.no_grad():
        for a, b in zip(student.eval()(batch()), stock.eval()(batch())):
            a, b = a["instances"], b["instances"]
            assert len(a) == len(b) > 0
            assert torch.equal(a.pred_masks, b.pred_masks) and torch.equal(a.scores, b.scores)
