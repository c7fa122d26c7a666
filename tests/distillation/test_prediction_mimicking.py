"""MIMIC student_head: the student's own predictions mimic the teacher's."""

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses

from crosskd_ifc import attach_teacher
from crosskd_ifc.distillation import losses
from crosskd_ifc.distillation.teacher import TeacherPass

K = "MODEL.CROSSKD."
STUDENT_HEAD = (K + "MIMIC", "student_head")


def test_a_student_that_is_its_own_teacher_has_no_loss_and_no_new_key():
    cfg = tiny_cfg(*STUDENT_HEAD)
    student = tiny_model(cfg)
    keys = list(student.state_dict())
    attach_teacher(student, cfg, teacher=tiny_model(cfg))
    result, _ = train_losses(student.train(), tiny_batch())
    assert 0 <= result["loss_cls_kd"] <= 1e-5 and 0 <= result["loss_box_reg_kd"] <= 1e-5
    assert list(student.state_dict()) == keys and not hasattr(student, "fusion")


def test_the_losses_compare_the_students_own_predictions_with_the_teachers():
    student, teacher = distilling(*STUDENT_HEAD)
    batch = tiny_batch()
    torch.manual_seed(0)
    with EventStorage(), student.roi_heads.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    (trace,) = heads.stages
    t, _ = student.distiller.box.predict(TeacherPass(student.teacher, batch), trace.boxes)
    result, _ = train_losses(student, batch)
    kl = losses.kl_divergence(trace.logits, t.logits, temperature=3.0, normalizer=len(t.logits))
    torch.testing.assert_close(result["loss_cls_kd"], 0.5 * kl)
    expected = losses.confident_l1(trace.deltas, t.deltas, t.logits)
    torch.testing.assert_close(result["loss_box_reg_kd"], expected)


def test_the_gradient_reaches_the_students_predictor_which_cross_head_does_not():
    student, _ = distilling(*STUDENT_HEAD)
    result, _ = train_losses(student, tiny_batch())
    (result["loss_cls_kd"] + result["loss_box_reg_kd"]).backward()
    for name, p in student.roi_heads.box_predictor.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("agnostic", ["student", "teacher"])
def test_class_agnostic_boxes_are_compared_with_those_of_the_teachers_best_class(agnostic):
    option = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    student, _ = distilling(
        *STUDENT_HEAD,
        *(option if agnostic == "student" else ()),
        teacher_opts=option if agnostic == "teacher" else (),
    )
    result, _ = train_losses(student, tiny_batch())
    assert torch.isfinite(result["loss_box_reg_kd"]) and result["loss_box_reg_kd"] > 0


@pytest.mark.parametrize("box_type", ["l1", "giou"])
def test_boxes_of_unequal_encodings_are_compared_in_the_students(box_type):
    other = ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (5.0, 5.0, 2.5, 2.5))
    cfg = tiny_cfg(*STUDENT_HEAD, K + "LOSS.BOX_TYPE", box_type)
    student, teacher = tiny_model(cfg), tiny_model(tiny_cfg(*other))
    with torch.no_grad():  # the same boxes in the other encoding
        for p in teacher.roi_heads.box_predictor.bbox_pred.parameters():
            p *= torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(3).view(-1, *[1] * (p.dim() - 1))
    attach_teacher(student, cfg, teacher=teacher)
    result, _ = train_losses(student.train(), tiny_batch())
    assert result["loss_box_reg_kd"] <= 1e-5


def test_there_are_no_cross_head_detections():
    student, _ = distilling(*STUDENT_HEAD)
    with pytest.raises(RuntimeError, match="MIMIC other than student_head"):
        student.eval().cross_head_inference(tiny_batch())
