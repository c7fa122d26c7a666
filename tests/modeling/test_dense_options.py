"""What else dense detectors can distil: own predictions, pyramids, other classes, a start from the
teacher's weights; and the measured gradients."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from helpers import tiny_batch, train_losses
from test_dense import KEYS, K, dense, dense_cfg, fusion, gradients, pair, traced, twin_losses

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.distillation import losses
from crosskd_ifc.distillation.dense.box import by_anchor
from crosskd_ifc.distillation.teacher import TeacherPass

STUDENT_HEAD = (K + "MIMIC", "student_head")
OTHER_CLASSES = ("MODEL.RETINANET.NUM_CLASSES", 5, "MODEL.FCOS.NUM_CLASSES", 5)


def by_index(*teacher_classes):
    return (K + "TEACHER.CLASS_MAP", [[i, t] for i, t in enumerate(teacher_classes)])


def teachers_own(student, batch):
    """Logits and deltas in the order of the anchors."""
    box = student.distiller.box
    return flat(box.teacher.by_level(box.run_teacher(TeacherPass(student.teacher, batch))[1]))


def flat(predictions):
    return by_anchor(predictions.logits), by_anchor(predictions.deltas)


@dense
def test_student_head_is_zero_for_equal_models_and_has_nothing_to_learn(kind):
    for loss in twin_losses(kind, *STUDENT_HEAD):
        assert 0 <= loss <= 1e-5
    student, _ = pair(kind, *STUDENT_HEAD)
    assert not hasattr(student, "fusion") and not student.has_cross_head


@dense
def test_student_head_compares_the_students_own_predictions(kind):
    student, teacher = pair(kind, *STUDENT_HEAD)
    batch = tiny_batch(boxes_per_image=(9, 12))
    trace, (t, b) = traced(student, batch), teachers_own(student, batch)
    z, d = flat(trace.own)
    valid = trace.labels >= 0
    n = student.kd_normalizer(trace)
    cls = losses.quality_focal(z[valid], t[valid], beta=1.0, normalizer=n)
    anchors = Boxes.cat(trace.anchors).tensor.repeat(2, 1)
    ours, theirs = (
        teacher.box2box_transform.apply_deltas(x.flatten(0, 1), anchors) for x in (d, b)
    )
    kept = valid.flatten() & (Boxes(theirs).area() > 0)
    measure = losses.confident_giou if kind == "RetinaNet" else losses.confident_iou
    confidence = t.sigmoid().amax(2).flatten()
    box = measure(ours[kept], theirs[kept], confidence[kept], normalizer=n)
    result, _ = train_losses(student, batch)
    torch.testing.assert_close(result["loss_cls_kd"], 0.5 * cls)
    torch.testing.assert_close(result["loss_box_reg_kd"], box)


@dense
def test_student_head_reaches_the_students_predictors(kind):
    student, _ = pair(kind, *STUDENT_HEAD)
    result, _ = train_losses(student, tiny_batch())
    sum(result[key] for key in KEYS).backward()
    assert student.head.cls_score.weight.grad.any() and student.head.bbox_pred.weight.grad.any()


@dense
def test_a_class_map_compares_only_the_classes_that_correspond(kind):
    student, teacher = pair(kind, *STUDENT_HEAD, *by_index(4, "", 0), teacher_opts=OTHER_CLASSES)
    batch = tiny_batch()
    trace, (t, _) = traced(student, batch), teachers_own(student, batch)
    valid = trace.labels >= 0
    expected = losses.quality_focal(
        flat(trace.own)[0][valid][:, [0, 2]],
        t[valid][:, [4, 0]],
        beta=1.0,
        normalizer=student.kd_normalizer(trace),
    )
    result, _ = train_losses(student, batch)
    torch.testing.assert_close(result["loss_cls_kd"], 0.5 * expected)


@dense
def test_a_teacher_of_other_classes_teaches_through_its_own_head(kind):
    accepted = (K + "TEACHER.CLASS_MAP", ("teacher",))
    student, _ = pair(kind, *accepted, teacher_opts=OTHER_CLASSES)
    found = gradients(student, tiny_batch())
    assert all(torch.isfinite(g).all() for g in found.values())
    _, storage = train_losses(student, tiny_batch(), iteration=19)
    assert "crosskd/agreement_cross_head" in storage.latest()
    assert "crosskd/agreement_student" not in storage.latest()
    assert all(len(x["instances"]) for x in student.eval().cross_head_inference(tiny_batch()))


@dense
@pytest.mark.parametrize("combine", [False, True])
def test_the_pyramid_can_be_mimicked_alone(kind, combine):
    weights = (
        K + "LOSS.CLS_WEIGHT",
        0.0,
        K + "LOSS.BOX_WEIGHT",
        0.0,
        K + "LOSS.FEATURE_WEIGHT",
        2.0,
    )
    student, teacher = pair(kind, *weights, K + "LOSS.FEATURE_COMBINE", combine)
    batch = tiny_batch()
    result, _ = train_losses(student, batch)
    assert result["loss_cls_kd"] == result["loss_box_reg_kd"] == 0
    if not combine:
        with torch.no_grad():
            ours, theirs = (
                m.backbone(m.preprocess_image(batch).tensor) for m in (student, teacher)
            )
        expected = sum(losses.pkd(ours[level], theirs[level]) for level in ours)
        torch.testing.assert_close(result["loss_feature_kd"], 2 * expected)
    assert result["loss_feature_kd"] > 0
    result["loss_feature_kd"].backward()
    assert student.backbone.fpn_output3.weight.grad.any()


INHERIT = (K + "INHERIT", ("backbone.fpn", "backbone.top_block", "head"))


@dense
def test_a_student_starts_from_its_teachers_pyramid_and_head(kind):
    student, teacher = pair(kind, *INHERIT)
    before = student.backbone.bottom_up.stem.conv1.weight.clone()
    student.inherit_weights()
    ours, theirs = student.state_dict(), teacher.state_dict()
    covered = [n for n in ours if n.startswith(("backbone.fpn", "backbone.top_block", "head."))]
    assert any("p7" in n for n in covered) and all(torch.equal(ours[n], theirs[n]) for n in covered)
    assert torch.equal(student.backbone.bottom_up.stem.conv1.weight, before)


def test_inherited_class_rows_follow_the_map_for_each_anchor():
    three_anchors = ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [48], [64]])
    student, teacher = pair(
        "RetinaNet", *INHERIT, *three_anchors, *by_index(4, "", 0), teacher_opts=OTHER_CLASSES
    )
    own = student.head.cls_score.weight.detach().clone().unflatten(0, (-1, 3))
    student.inherit_weights()
    ours = student.head.cls_score.weight.unflatten(0, (-1, 3))
    theirs = teacher.head.cls_score.weight.unflatten(0, (-1, 5))
    assert len(ours) == len(theirs) == 3
    assert torch.equal(ours[:, [0, 2]], theirs[:, [4, 0]])
    assert torch.equal(ours[:, 1], own[:, 1])


def test_deltas_of_another_encoding_are_not_inherited():
    other = ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0))
    student, _ = pair("RetinaNet", *INHERIT, teacher_opts=other)
    before = student.head.bbox_pred.weight.clone()
    student.inherit_weights()
    assert torch.equal(student.head.bbox_pred.weight, before)
    with pytest.raises(ConfigError, match="INHERIT: nothing of 'head.bbox_pred'.*BBOX_REG_WEIGHTS"):
        pair("RetinaNet", K + "INHERIT", ("head.bbox_pred",), teacher_opts=other)


def test_boxes_of_another_encoding_are_compared_decoded():
    weights = ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (2.0, 2.0, 2.0, 2.0))
    cfg = dense_cfg("RetinaNet", *STUDENT_HEAD)
    torch.manual_seed(1)
    teacher_cfg = dense_cfg("RetinaNet", *weights, stock=True)
    student, teacher = build_model(cfg), build_model(teacher_cfg)
    teacher.load_state_dict(student.state_dict())
    with torch.no_grad():  # deltas that are twice as large mean the same boxes
        for p in teacher.head.bbox_pred.parameters():
            p *= 2
    attach_teacher(student, cfg, teacher=teacher)
    result, _ = train_losses(student.train(), tiny_batch())
    assert abs(result["loss_box_reg_kd"]) < 1e-5


PLACES = ("pyramid", "predictor")


@dense
@pytest.mark.parametrize("mimic", ["cross_head", "student_head"])
def test_gradients_are_measured_at_the_pyramid_and_at_the_predictors(kind, mimic):
    period = (K + "DIAGNOSTICS.GRAD_PERIOD", 1)
    student, _ = pair(kind, *period, K + "MIMIC", mimic, "MODEL.FCOS.NORM", "")
    result, storage = train_losses(student, tiny_batch())
    found = {k[8:]: v for k, (v, _) in storage.latest().items() if k.startswith("crosskd/grad")}
    assert set(found) == {f"grad_{x}_{place}" for x in ("cosine", "ratio") for place in PLACES}
    assert found["grad_ratio_pyramid"] > 0
    assert (found["grad_ratio_predictor"] == 0) == (mimic == "cross_head")
    # By hand.
    parameters = [p for c in student.backbone.output_convs for p in c.parameters()]
    a, b = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    sum(v for k, v in result.items() if k.endswith("_kd") == is_kd),
                    parameters,
                    retain_graph=True,
                )
            ]
        )
        for is_kd in (True, False)
    )
    assert found["grad_cosine_pyramid"] == pytest.approx(
        float(a @ b / a.norm() / b.norm()), abs=1e-4
    )
    assert found["grad_ratio_pyramid"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-4)


@dense
def test_a_learned_fusion_gets_zero_gradients_when_only_the_pyramid_is_mimicked(kind):
    weights = (
        K + "LOSS.CLS_WEIGHT",
        0.0,
        K + "LOSS.BOX_WEIGHT",
        0.0,
        K + "LOSS.FEATURE_WEIGHT",
        1.0,
    )
    student, _ = pair(kind, *weights, *fusion("weighted", ("conv1", "conv2")))
    found = gradients(student, tiny_batch())
    learned = {n: g for n, g in found.items() if n.startswith("fusion.")}
    assert len(learned) == 2 and all(g is not None and not g.any() for g in learned.values())
