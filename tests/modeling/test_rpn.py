"""CrossKDRPN: the student's proposals mimic the teacher's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.weights.stock import stock_config

NAME = ("MODEL.PROPOSAL_GENERATOR.NAME", "CrossKDRPN")
ON = (*NAME, "MODEL.CROSSKD.LOSS.RPN_WEIGHT", 1.0)


def telling(model, seed=0):
    """The RPN head starts at almost 0; make its answers differ."""
    torch.manual_seed(seed)
    for layer in (model.proposal_generator.rpn_head.objectness_logits,):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.anchor_deltas.weight, std=0.05)
    return model


def rpn_pair(*opts, teacher_opts=()):
    student, teacher = distilling(*ON, *opts, teacher_opts=teacher_opts)
    return telling(student, 1), telling(teacher, 2)


def test_a_student_that_is_its_own_teacher_has_no_loss():
    cfg = tiny_cfg(*ON)
    student = telling(tiny_model(cfg))
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    result, _ = train_losses(student.train(), tiny_batch())
    assert 0 <= result["loss_rpn_kd"] <= 1e-6


def test_the_loss_is_the_documented_formula_on_the_sampled_anchors():
    student, teacher = rpn_pair()
    batch, seen = tiny_batch(), {}
    rpn = student.proposal_generator
    losses = rpn.losses

    def keep(anchors, logits, labels, deltas, boxes):
        seen["logits"], seen["deltas"] = torch.cat(logits, 1), torch.cat(deltas, 1)
        seen["labels"] = torch.stack(labels)
        return losses(anchors, logits, labels, deltas, boxes)

    rpn.losses = keep
    result, _ = train_losses(student, batch)
    # The teacher's answers in the order of its own RPN's forward.
    theirs = teacher.proposal_generator
    theirs.losses = lambda a, logits, labels, deltas, boxes: seen.update(
        t=torch.cat(logits, 1), dt=torch.cat(deltas, 1)
    )
    with torch.no_grad(), EventStorage():
        images = teacher.preprocess_image(batch)
        theirs.train()
        features = teacher.backbone(images.tensor)
        theirs(images, features, [x["instances"] for x in batch])
    kept = seen["labels"] >= 0
    assert 0 < kept.sum() <= 2 * 256
    o, t = seen["logits"][kept], seen["t"][kept].sigmoid()
    focal = (o.sigmoid() - t).abs() * F.binary_cross_entropy_with_logits(o, t, reduction="none")
    distance = (seen["deltas"][kept] - seen["dt"][kept]).abs().sum(1) * t
    expected = (focal.sum() + distance.sum()) / (256 * 2)
    torch.testing.assert_close(result["loss_rpn_kd"], expected)
    assert expected > 1e-4


def test_the_gradient_reaches_the_students_rpn_and_not_the_teacher():
    student, teacher = rpn_pair()
    train_losses(student, tiny_batch())[0]["loss_rpn_kd"].backward()
    for name, p in student.proposal_generator.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_weight_or_a_teacher_it_is_the_stock_rpn_bit_for_bit():
    batch = tiny_batch()
    stock = tiny_model(tiny_cfg(architecture="GeneralizedRCNN"), seed=1).train()
    ours = tiny_model(tiny_cfg(*NAME), seed=1).train()
    distilled, _ = distilling(*NAME)
    expected, _ = train_losses(stock, batch)
    for model in (ours, distilled):
        result, _ = train_losses(model, batch)
        assert "loss_rpn_kd" not in result
        for key, value in expected.items():
            assert torch.equal(result[key], value)


def test_the_backbone_of_the_teacher_runs_once_for_all_losses():
    student, teacher = rpn_pair("MODEL.CROSSKD.LOSS.FEATURE_WEIGHT", 1.0)
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    result, _ = train_losses(student, tiny_batch())
    assert len(calls) == 1
    assert {"loss_rpn_kd", "loss_feature_kd", "loss_cls_kd"} <= set(result)
    student.kd_factor = 0.0
    result, _ = train_losses(student, tiny_batch())
    assert len(calls) == 1 and result["loss_rpn_kd"] == 0


REFUSED = {
    "sizes": (("MODEL.ANCHOR_GENERATOR.SIZES", [[9], [16], [32], [48], [64]]), "SIZES"),
    "ratios": (("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]), "ASPECT_RATIOS"),
    "offset": (("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5), "ANCHOR_GENERATOR.OFFSET"),
    "levels": (
        (
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]),
        ),
        "MODEL.RPN.IN_FEATURES",
    ),
    "encoding": (("MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 1.0, 1.0, 1.0)), "RPN.BBOX_REG_WEIGHTS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unlike_anchors_are_refused_naming_the_key(case):
    opts, key = REFUSED[case]
    with pytest.raises(ConfigError, match=f"RPN_WEIGHT compares anchor by anchor, but .*{key}"):
        rpn_pair(teacher_opts=opts)


def test_a_teacher_without_an_rpn_is_refused():
    teacher = build_model(tiny_cfg("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"))
    with pytest.raises(ConfigError, match="proposes with NoneType; .*RPN_WEIGHT needs an RPN"):
        distilling(*ON, teacher=teacher)


def test_the_exported_config_names_the_stock_rpn():
    assert stock_config(tiny_cfg(*ON), "w.pth").MODEL.PROPOSAL_GENERATOR.NAME == "RPN"
