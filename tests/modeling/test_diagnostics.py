"""Gradients of distillation and detection, compared; shares of disagreement with the truth."""

import pytest
import torch
from helpers import distilling, tiny_batch, train_losses

K = "MODEL.CROSSKD."
ON = (K + "DIAGNOSTICS.GRAD_PERIOD", 5)
STUDENT_HEAD = (K + "MIMIC", "student_head")
NAMES = {
    f"grad_{what}_{place}" for what in ("cosine", "ratio") for place in ("pyramid", "predictor")
}


def logged(student, iteration):
    losses, storage = train_losses(student, tiny_batch(), iteration=iteration)
    found = {k[8:]: v for k, (v, _) in storage.latest().items() if k.startswith("crosskd/grad_")}
    return losses, found


def expected(losses, parameters):
    """Cosine and ratio from two ordinary backward passes."""
    gradients = []
    for chosen in (True, False):
        for p in parameters:
            p.grad = None
        sum(v for k, v in losses.items() if k.endswith("_kd") == chosen).backward(retain_graph=True)
        gradients.append(
            torch.cat(
                [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
            )
        )
    a, b = gradients
    return torch.cosine_similarity(a, b, dim=0).item(), (a.norm() / b.norm()).item()


FUSION = K + "FUSION."
POOL = (FUSION + "IN_FEATURES", ("pool",), FUSION + "NAME", "none", FUSION + "ENTRY", "pool")
CASES = {
    "fc2": (FUSION + "IN_FEATURES", ("fc1", "fc2")),
    "pool": POOL,
    "features only": (
        *(K + "LOSS.CLS_WEIGHT", 0.0, K + "LOSS.BOX_WEIGHT", 0.0),
        *(K + "LOSS.FEATURE_WEIGHT", 1.0),
    ),
    "student_head": STUDENT_HEAD,
    "both": (K + "MIMIC", "both"),
}


@pytest.mark.parametrize("case", CASES)
def test_cosine_and_ratio_at_the_pyramid_are_those_of_two_backward_passes(case):
    student, _ = distilling(*ON, *CASES[case])
    losses, found = logged(student, 10)
    assert set(found) == NAMES
    pyramid = [p for c in student.backbone.output_convs for p in c.parameters()]
    cosine, ratio = expected(losses, pyramid)
    assert found["grad_cosine_pyramid"] == pytest.approx(cosine, rel=1e-3)
    assert found["grad_ratio_pyramid"] == pytest.approx(ratio, rel=1e-3) and ratio > 0
    predictor = list(student.roi_heads.box_predictor.parameters())
    cosine, ratio = expected(losses, predictor)
    assert found["grad_cosine_predictor"] == pytest.approx(cosine, rel=1e-3)
    assert found["grad_ratio_predictor"] == pytest.approx(ratio, rel=1e-3)


def test_cross_head_distillation_does_not_touch_the_predictor_and_student_head_does():
    student, _ = distilling(*ON)
    _, found = logged(student, 0)
    assert found["grad_cosine_predictor"] == found["grad_ratio_predictor"] == 0
    student, _ = distilling(*ON, *STUDENT_HEAD)
    _, found = logged(student, 0)
    assert found["grad_cosine_predictor"] != 0 and found["grad_ratio_predictor"] > 0


def test_they_are_measured_every_period_only_and_never_by_default():
    student, _ = distilling(*ON)
    assert [bool(logged(student, i)[1]) for i in (4, 5, 6, 10)] == [False, True, False, True]
    assert not logged(distilling()[0], 0)[1]


def test_measuring_changes_neither_losses_nor_gradients():
    results = []
    for opts in ((), ON):
        student, _ = distilling(*opts)
        losses, _ = logged(student, 0)
        sum(losses.values()).backward()
        results.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_a_step_without_distillation_has_no_distillation_gradient():
    student, _ = distilling(*ON)
    student.kd_factor = 0.0
    _, found = logged(student, 0)
    assert found == dict.fromkeys(NAMES, 0.0)


def test_a_teacher_that_knows_the_truth_does_not_disagree_with_it():
    student, teacher = distilling()
    predictor = teacher.roi_heads.box_predictor
    answers = {"background": 3, "class 1": 1}
    found = {}
    for name, answer in answers.items():
        with torch.no_grad():
            predictor.cls_score.weight.zero_()
            predictor.cls_score.bias.copy_(torch.eye(4)[answer] * 10)
        batch = tiny_batch()
        for x in batch:
            x["instances"].gt_classes[:] = 1
        _, storage = train_losses(student, batch, iteration=19)
        latest = {k[8:]: v for k, (v, _) in storage.latest().items()}
        found[name] = latest["disagreement_truth"], latest["disagreement_truth_foreground"]
    assert found["background"][1] == 1 and found["class 1"][1] == 0
    # Each RoI is either background or class 1.
    assert found["background"][0] + found["class 1"][0] == pytest.approx(1)


def test_frozen_layers_have_no_gradient_to_compare():
    student, _ = distilling(*ON)
    student.roi_heads.box_predictor.requires_grad_(False)
    _, found = logged(student, 0)
    assert found["grad_ratio_predictor"] == 0 and found["grad_ratio_pyramid"] > 0
    student.backbone.requires_grad_(False)
    _, found = logged(student, 0)
    assert found == dict.fromkeys(NAMES, 0.0)


def test_a_student_with_sigmoid_scores_says_background_where_no_class_has_one_half():
    student, teacher = distilling("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    found = []
    with torch.no_grad():
        for model in (student, teacher):
            model.roi_heads.box_predictor.cls_score.weight.zero_()
        teacher.roi_heads.box_predictor.cls_score.bias[3] += 1  # background
        for logit in (-0.1, 0.1):
            student.roi_heads.box_predictor.cls_score.bias.fill_(logit)
            _, storage = train_losses(student, tiny_batch(), iteration=19)
            found.append(storage.latest()["crosskd/agreement_student"][0])
    assert found == [1, 0]
