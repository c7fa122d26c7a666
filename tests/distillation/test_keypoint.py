"""Keypoint R-CNN: the keypoint head's distillation on positive RoIs."""

import copy

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from helpers import check_mimic_both, distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_cascade_students import student_cfg

from crosskd_ifc import ConfigError, attach_teacher

K = "MODEL.CROSSKD."
HEAD = "MODEL.ROI_KEYPOINT_HEAD."
POINTS = (
    *("MODEL.KEYPOINT_ON", True, HEAD + "NUM_KEYPOINTS", 3, HEAD + "CONV_DIMS", (8,)),
    *(HEAD + "POOLER_RESOLUTION", 7),
)
ON = (*POINTS, K + "LOSS.KEYPOINT_WEIGHT", 2.0)
OWN = (K + "MIMIC", "student_head")


def pair(*opts, teacher_opts=()):
    return distilling(*ON, *opts, teacher_opts=(*POINTS, *teacher_opts))


def batch(**kwargs):
    return tiny_batch(keypoints=3, **kwargs)


def recorded(student, inputs):
    torch.manual_seed(0)
    with EventStorage(), student.distiller.recording(student, inputs, 1.0) as step:
        GeneralizedRCNN.forward(student, inputs)
    return step


@pytest.mark.parametrize("opts", [(), OWN, (K + "MIMIC", "both")])
@pytest.mark.parametrize("make_cfg", [tiny_cfg, student_cfg], ids=["plain", "cascade"])
def test_a_student_that_is_its_own_teacher_has_no_keypoint_loss(make_cfg, opts):
    cfg = make_cfg(*ON, *opts)
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    found, _ = train_losses(student.train(), batch())
    assert abs(found["loss_keypoint_kd"]) <= 1e-5


@pytest.mark.parametrize(
    "opts, resolution",
    [((), 7), ((), 14), (OWN, 7)],
    ids=["equal poolers", "unlike poolers", "student's head"],
)
def test_the_loss_is_the_mean_divergence_of_the_heatmaps_over_their_pixels(opts, resolution):
    student, teacher = pair(*opts, teacher_opts=(HEAD + "POOLER_RESOLUTION", resolution))
    inputs, heads = batch(), teacher.roi_heads
    step = recorded(student, inputs)
    seen = step.heads.keypoint
    names = heads.keypoint_in_features
    with torch.no_grad():
        levels = teacher.backbone(teacher.preprocess_image(inputs).tensor)
        t = heads.keypoint_head.layers(
            heads.keypoint_pooler([levels[n] for n in names], seen.boxes)
        )
    levels = [step.features[n] for n in names]
    z = heads.keypoint_head.layers(heads.keypoint_pooler(levels, seen.boxes))
    if opts:
        z = student.roi_heads.keypoint_head.layers(seen.pooled)
    assert len(z) > 0 and z.shape[1:] == (3, 4 * resolution, 4 * resolution)
    q, p = (x.flatten(2).softmax(dim=2) for x in (t, z))
    expected = (q * (q / p).log()).sum(dim=2).mean()
    found, _ = train_losses(student, inputs)
    torch.testing.assert_close(found["loss_keypoint_kd"], 2 * expected, rtol=1e-4, atol=1e-6)
    assert expected > 0


def test_mimic_both_adds_the_losses_of_cross_head_and_own_keypoints():
    check_mimic_both(pair, batch(), "loss_keypoint_kd")


def test_what_is_recorded_is_what_the_head_computes_and_changes_nothing():
    student, _ = pair()
    inputs, head = batch(), student.roi_heads.keypoint_head
    step = recorded(student, inputs)
    assert torch.equal(step.heads.keypoint.logits, head.layers(step.heads.keypoint.pooled))
    stock = tiny_model(tiny_cfg(*POINTS, architecture="GeneralizedRCNN"), seed=1).train()
    found = [train_losses(m, inputs)[0]["loss_keypoint"] for m in (stock, student)]
    assert torch.equal(*found)


@pytest.mark.parametrize("opts, learns", [((), False), (OWN, True)])
def test_the_gradient_reaches_the_pyramid_and_only_own_predictions_the_students_head(opts, learns):
    student, teacher = pair(*opts)
    train_losses(student, batch())[0]["loss_keypoint_kd"].backward()
    touched = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("backbone.fpn_output") for n in touched)
    assert any(n.startswith("roi_heads.keypoint_head") for n in touched) == learns
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("opts", [(), OWN])
@pytest.mark.parametrize("boxes", [(0, 0), (2, 3)])
def test_every_parameter_gets_a_gradient_without_positive_rois_too(opts, boxes, factor):
    wide = () if opts else ("MODEL.FPN.OUT_CHANNELS", 12)
    student, _ = pair(*opts, teacher_opts=wide)
    assert hasattr(student, "fusion") == bool(wide)
    student.kd_factor = factor
    found, _ = train_losses(student, batch(boxes_per_image=boxes))
    assert (found["loss_keypoint_kd"] > 0) == (sum(boxes) > 0 and factor > 0)
    sum(found.values()).backward()
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name


def test_by_default_keypoints_are_left_alone_and_the_teacher_may_have_none():
    student, _ = distilling(*POINTS)
    found, _ = train_losses(student, batch())
    assert "loss_keypoint" in found and "loss_keypoint_kd" not in found


def test_the_cross_head_may_know_other_keypoints():
    student, _ = pair(teacher_opts=(HEAD + "NUM_KEYPOINTS", 5))
    assert train_losses(student, batch())[0]["loss_keypoint_kd"] > 0


def test_masks_and_keypoints_are_distilled_side_by_side():
    masks = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    student, _ = pair(*masks, teacher_opts=masks)
    found, _ = train_losses(student, batch(masks=True))
    assert found["loss_keypoint_kd"] > 0 and found["loss_mask_kd"] > 0


REFUSED = {
    "a teacher without keypoints": (
        (),
        ("MODEL.KEYPOINT_ON", False),
        "KEYPOINT_WEIGHT: the teacher.*no keypoint head.*set it to 0.0",
    ),
    "student_head with other keypoints": (
        OWN,
        (HEAD + "NUM_KEYPOINTS", 5),
        "NUM_KEYPOINTS: the student has 3.*5",
    ),
    "student_head with another size": (
        OWN,
        (HEAD + "POOLER_RESOLUTION", 14),
        r"ROI_KEYPOINT_HEAD.POOLER_RESOLUTION.*\(7, 7\).*\(14, 14\)",
    ),
    "a student without keypoints": (
        ("MODEL.KEYPOINT_ON", False),
        (),
        "LOSS.KEYPOINT_WEIGHT is 2.0.*no keypoint head.*0.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keypoints_that_do_not_fit_are_refused_naming_the_key(case):
    opts, teacher_opts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        pair(*opts, teacher_opts=teacher_opts)
