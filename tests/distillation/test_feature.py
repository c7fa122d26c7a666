"""Feature mimicking over the levels of the pyramid."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses

from crosskd_ifc import ConfigError, attach_teacher, pkd
from crosskd_ifc.distillation.feature import combine_levels

L = "MODEL.CROSSKD.LOSS."
ON = (L + "FEATURE_WEIGHT", 2.0)
PLAIN = (*ON, L + "FEATURE_COMBINE", False)
LEVELS = ("p2", "p3", "p4", "p5", "p6")
WIDE = ("MODEL.FPN.OUT_CHANNELS", 12)


def features(model, batch):
    with torch.no_grad():
        return model.backbone(model.preprocess_image(batch).tensor)


def test_plain_pkd_of_a_student_that_is_its_own_teacher_is_zero():
    cfg = tiny_cfg(*PLAIN)
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    assert train_losses(student.train(), tiny_batch())[0]["loss_feature_kd"] <= 1e-5


def test_without_combining_the_loss_is_the_sum_of_pkd_over_the_levels():
    student, teacher = distilling(*PLAIN)
    batch = tiny_batch()
    ours, theirs = features(student, batch), features(teacher, batch)
    expected = 2 * sum(pkd(ours[x], theirs[x]) for x in LEVELS)
    torch.testing.assert_close(train_losses(student, batch)[0]["loss_feature_kd"], expected)


def test_the_levels_that_are_named_count_alone():
    student, teacher = distilling(*PLAIN, L + "FEATURE_LEVELS", ("p5", "p2"))
    batch = tiny_batch()
    ours, theirs = features(student, batch), features(teacher, batch)
    expected = 2 * sum(pkd(ours[x], theirs[x]) for x in ("p2", "p5"))
    torch.testing.assert_close(train_losses(student, batch)[0]["loss_feature_kd"], expected)
    with pytest.raises(ConfigError, match="LOSS.FEATURE_LEVELS names 'p7'; .*p2, p3, p4, p5, p6"):
        distilling(*PLAIN, L + "FEATURE_LEVELS", ("p2", "p7"))


def test_combined_levels_are_the_sum_of_all_levels_resized():
    student, teacher = distilling(*ON)
    batch = tiny_batch()
    ours, theirs = features(student, batch), features(teacher, batch)
    expected = 0
    for level in LEVELS:
        size = ours[level].shape[-2:]
        combined = sum(
            F.interpolate(ours[m], size=size, mode="bilinear", align_corners=False) for m in LEVELS
        )
        expected = expected + 2 * pkd(combined, theirs[level])
    torch.testing.assert_close(
        train_losses(student, batch)[0]["loss_feature_kd"], expected, rtol=1e-4, atol=1e-5
    )


def test_constant_levels_add_up_to_their_sum_at_every_size_odd_ones_included():
    sizes = {"a": (7, 5), "b": (4, 3), "c": (1, 1)}
    maps = {n: torch.full((2, 3, *s), float(i + 1)) for i, (n, s) in enumerate(sizes.items())}
    for level, size in sizes.items():
        combined = combine_levels(maps, level, list(sizes))
        assert combined.shape == (2, 3, *size)
        torch.testing.assert_close(combined, torch.full((2, 3, *size), 6.0))
        assert torch.equal(combine_levels(maps, level, ()), maps[level])


def test_images_of_odd_sizes_give_finite_losses_and_gradients():
    student, _ = distilling(*ON)
    batch = tiny_batch()
    for x, (h, w) in zip(batch, ((33, 64), (64, 1))):
        x["image"] = x["image"][:, :h, :w]
    batch[0]["instances"]._image_size, batch[1]["instances"]._image_size = (33, 64), (64, 1)
    result, _ = train_losses(student, batch)
    result["loss_feature_kd"].backward()
    for p in student.backbone.parameters():
        assert p.grad is None or torch.isfinite(p.grad).all()
    one = tiny_batch(images=1)
    one[0]["image"] = one[0]["image"][:, :32, :32]  # p5 and p6 have one pixel
    assert torch.isfinite(train_losses(student, one)[0]["loss_feature_kd"])


def test_it_is_off_by_default_and_follows_the_schedules_factor():
    student, _ = distilling()
    assert "loss_feature_kd" not in train_losses(student, tiny_batch())[0]
    student, teacher = distilling(*ON)
    full = train_losses(student, tiny_batch())[0]["loss_feature_kd"]
    student.kd_factor = 0.5
    half = train_losses(student, tiny_batch())[0]["loss_feature_kd"]
    torch.testing.assert_close(2 * half, full)
    student.kd_factor = 0.0
    assert train_losses(student, tiny_batch())[0]["loss_feature_kd"] == 0


def test_with_both_box_weights_zero_the_teachers_heads_are_not_run():
    student, teacher = distilling(*PLAIN, L + "CLS_WEIGHT", 0.0, L + "BOX_WEIGHT", 0.0)
    calls = []
    teacher.roi_heads.box_head.fc1.register_forward_hook(lambda *_: calls.append(1))
    result, _ = train_losses(student, tiny_batch())
    assert not calls and result["loss_cls_kd"] == 0 and result["loss_feature_kd"] > 0


def test_equal_channels_need_no_adapter():
    student, _ = distilling(*ON, "MODEL.CROSSKD.MIMIC", "student_head")
    assert not hasattr(student, "fusion")


def test_unlike_channels_are_bridged_by_a_learned_convolution_on_each_level():
    student, _ = distilling(*PLAIN, teacher_opts=WIDE)
    found = train_losses(student, tiny_batch())[0]["loss_feature_kd"]
    found.backward()
    adapters = {n: p for n, p in student.named_parameters() if n.startswith("fusion.feature.")}
    assert adapters.keys() == {
        f"fusion.feature.{x}.adapter.{y}" for x in LEVELS for y in ("weight", "bias")
    }
    assert all(p.grad.abs().sum() > 0 for n, p in adapters.items() if n.endswith("weight"))


def test_unlike_strides_are_refused_naming_the_key():
    stages = (
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res5"]),
        *("MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]]),
    )
    cfg = tiny_cfg(*PLAIN, *stages)
    teacher = build_model(tiny_cfg(*stages, "MODEL.RESNETS.RES5_DILATION", 2))
    message = "FEATURE_WEIGHT.*res5 has the stride 32 in the student and 16 in the teacher"
    with pytest.raises(ConfigError, match=message):
        attach_teacher(build_model(cfg), cfg, teacher=teacher)


def test_a_teacher_without_a_shared_level_is_refused():
    c4 = (
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res4"]),
        *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]]),
    )
    with pytest.raises(ConfigError, match="FEATURE_WEIGHT.*p2, p3.*res4, none in common"):
        distilling(*ON, teacher=build_model(tiny_cfg(*c4)))


def test_levels_of_unlike_channels_are_compared_one_by_one_only():
    stages = (
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"]),
        *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]]),
    )
    cfg = tiny_cfg(*ON, *stages)
    with pytest.raises(ConfigError, match="FEATURE_COMBINE.*'res3': 32, 'res4': 64.*to False"):
        attach_teacher(build_model(cfg), cfg, teacher=build_model(tiny_cfg(*stages)))
    cfg = tiny_cfg(*PLAIN, *stages)
    student = build_model(cfg).train()
    attach_teacher(student, cfg, teacher=build_model(tiny_cfg(*stages)))
    assert train_losses(student, tiny_batch())[0]["loss_feature_kd"] > 0
