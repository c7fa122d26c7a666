"""The pure losses: against recorded reference values, hand-known answers and identities."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from crosskd_ifc import (
    confident_giou,
    confident_iou,
    confident_l1,
    kl_divergence,
    pkd,
    quality_focal,
    standardize_like,
)

GOLDEN = np.load(os.path.join(os.path.dirname(__file__), "..", "data", "losses.npz"))
INDEX = json.loads(str(GOLDEN["index"]))


def cases(family):
    return [
        pytest.param(k, id=f"{k}-{v['note']}") for k, v in INDEX.items() if k.startswith(family)
    ]


def load(case, *names):
    # In float64, as the reference was computed from these float32 numbers.
    return [torch.tensor(GOLDEN[f"{case}.{name}"]).double() for name in names]


def assert_matches(loss, case, name, **gradients):
    """``loss`` and the gradients of the given tensors equal the recorded ones."""
    assert loss.dim() == 0
    expected = float(GOLDEN[f"{case}.{name}"])
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    loss.backward()
    for key, tensor in gradients.items():
        expected = torch.tensor(GOLDEN[f"{case}.{key}"])
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", cases("box_head"))
def test_kl_divergence_equals_the_reference(case):
    teacher, cross = load(case, "teacher_logits", "cross_logits")
    cross.requires_grad_()
    meta = INDEX[case]
    loss = 0.5 * kl_divergence(cross, teacher, temperature=meta["T"], normalizer=meta["avg_factor"])
    assert_matches(loss, case, "kl_loss", grad_cross_logits=cross)


@pytest.mark.parametrize("case", cases("box_head"))
def test_confident_l1_equals_the_reference(case):
    logits, teacher, cross = load(case, "teacher_logits", "teacher_deltas", "cross_deltas")
    cross.requires_grad_()
    assert_matches(confident_l1(cross, teacher, logits), case, "box_loss", grad_cross_deltas=cross)


@pytest.mark.parametrize("case", cases("quality_focal"))
def test_quality_focal_equals_the_reference(case):
    cross, teacher, weights = load(case, "cross", "teacher", "weights")
    cross.requires_grad_()
    meta = INDEX[case]
    loss = quality_focal(
        cross, teacher, beta=meta["beta"], weights=weights, normalizer=meta["avg_factor"]
    )
    assert_matches(loss, case, "loss", grad_cross=cross)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_quality_focal_has_the_gradient_of_its_formula_in_any_shape_and_strides(beta, weighted):
    torch.manual_seed(0)
    cross, teacher = (torch.randn(2, 4, 3, 5, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(2, 5, 3, dtype=torch.float64) if weighted else None
    cross.requires_grad_()

    def loss(x):  # (2, 4, 3, 5) -> (2, 5, 3, 4), not contiguous
        x, t = (y.permute(0, 3, 2, 1) for y in (x, teacher))
        return quality_focal(x, t, beta=beta, weights=weights, normalizer=7)

    assert torch.autograd.gradcheck(loss, cross)
    p, q = cross.sigmoid(), teacher.sigmoid()
    terms = (p - q).abs() ** beta * -(q * p.log() + (1 - q) * (1 - p).log())
    if weighted:
        terms = terms * weights.permute(0, 2, 1).unsqueeze(1)
    torch.testing.assert_close(loss(cross), terms.sum() / 7)


def test_quality_focal_gives_its_gradient_as_often_as_its_graph_is_kept():
    cross, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = quality_focal(cross, teacher, beta=1.0, normalizer=2)
    (first,) = torch.autograd.grad(3 * loss, cross, retain_graph=True)
    (second,) = torch.autograd.grad(loss, cross)
    torch.testing.assert_close(first, 3 * second)
    assert not quality_focal(cross.detach(), teacher, beta=1.0, normalizer=2).requires_grad


@pytest.mark.parametrize("case", cases("confident_giou"))
def test_confident_giou_equals_the_reference(case):
    cross, teacher, weights = load(case, "cross", "teacher", "weights")
    cross.requires_grad_()
    loss = confident_giou(cross, teacher, weights, normalizer=INDEX[case]["avg_factor"])
    assert_matches(loss, case, "loss", grad_cross=cross)


@pytest.mark.parametrize("case", cases("pkd"))
def test_pkd_equals_the_reference(case):
    student, teacher = load(case, "student", "teacher")
    student.requires_grad_()
    assert_matches(pkd(student, teacher), case, "loss", grad_student=student)


@pytest.mark.parametrize("case", cases("standardize_like"))
def test_standardize_like_equals_the_reference(case):
    student, teacher, out, cotangent, gradient = load(
        case, "student", "teacher", "out", "cotangent", "grad_student"
    )
    student.requires_grad_()
    result = standardize_like(student, teacher)
    torch.testing.assert_close(result, out, rtol=1e-6, atol=1e-7)
    (result * cotangent).sum().backward()
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-9)


def test_kl_divergence_of_two_classes_is_known_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4, 1/4
    cross = torch.zeros(1, 2)  # 1/2, 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = kl_divergence(cross, teacher, temperature=1.0, normalizer=1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    halved = kl_divergence(cross, teacher, temperature=1.0, normalizer=2)
    assert halved.item() == pytest.approx(expected / 2, rel=1e-6)


def test_kl_divergence_scales_with_the_squared_temperature():
    g = torch.Generator().manual_seed(0)
    cross, teacher = torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g)
    hot = kl_divergence(cross * 3, teacher * 3, temperature=3.0, normalizer=5)
    cold = kl_divergence(cross, teacher, temperature=1.0, normalizer=5)
    assert hot.item() == pytest.approx(9 * cold.item(), rel=1e-5)


def test_confident_l1_compares_the_boxes_of_the_best_foreground_class():
    logits = torch.tensor([[1.0, 3.0, 9.0]])  # background wins, class 1 is the best foreground
    teacher = torch.zeros(1, 8)
    cross = torch.tensor([[100.0] * 4 + [1.0, 2.0, 3.0, 4.0]])
    # One row: its confidence cancels; the mean of 1, 2, 3, 4.
    assert confident_l1(cross, teacher, logits).item() == pytest.approx(2.5, rel=1e-3)


def test_confident_l1_weighs_rows_by_confidence():
    logits = torch.tensor([[20.0, 0.0], [0.0, 20.0]])  # one class: sure foreground, sure background
    cross = torch.tensor([[1.0] * 4, [1000.0] * 4])
    assert confident_l1(cross, torch.zeros(2, 4), logits).item() == pytest.approx(1.0, rel=1e-4)


def test_giou_and_iou_losses_of_shifted_unit_boxes_are_known_by_hand():
    one = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    two = torch.tensor([[1.0, 0.0, 3.0, 2.0]])  # IoU 1/3; hull 6, union 6
    confidence = torch.tensor([0.5])
    giou = confident_giou(one, two, confidence, normalizer=1)
    assert giou.item() == pytest.approx(0.5 * (1 - 1 / 3), rel=1e-5)
    iou = confident_iou(one, two, confidence, normalizer=2)
    assert iou.item() == pytest.approx(0.25 * math.log(3), rel=1e-5)


@pytest.mark.parametrize("spread", [1.0, 10.0], ids=["overlapping", "mostly_disjoint"])
def test_giou_loss_and_gradient_are_those_of_torchvision(spread):
    g = torch.Generator().manual_seed(0)
    corners = spread * torch.rand(2, 50, 2, generator=g, dtype=torch.float64)
    sides = 0.1 + torch.rand(2, 50, 2, generator=g, dtype=torch.float64)
    cross, teacher = torch.cat([corners, corners + sides], dim=2)
    confidence = torch.rand(50, generator=g, dtype=torch.float64)
    cross.requires_grad_()
    expected = (confidence * generalized_box_iou_loss(cross, teacher)).sum() / 7
    loss = confident_giou(cross, teacher, confidence, normalizer=7)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(x, cross)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_iou_loss_of_disjoint_and_empty_boxes_is_the_cap():
    one = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    two = torch.tensor([[3.0, 3.0, 4.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    loss = confident_iou(one, two, torch.ones(2), normalizer=1)
    assert loss.item() == pytest.approx(-2 * math.log(1e-6), rel=1e-5)
    loss.backward()
    assert torch.isfinite(one.grad).all()


def test_quality_focal_of_one_logit_is_known_by_hand():
    # p = 1/2, q = 3/4: |p - q| * (-q log p - (1 - q) log(1 - p)) = 1/4 * log 2
    loss = quality_focal(torch.zeros(1, 1), torch.tensor([[math.log(3.0)]]), beta=1, normalizer=1)
    assert loss.item() == pytest.approx(math.log(2) / 4, rel=1e-6)


def test_pkd_ignores_scale_and_shift_of_each_channel():
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 3, 4, 4, generator=g)
    scale = torch.tensor([2.0, 5.0, 0.5]).view(1, 3, 1, 1)
    assert pkd(teacher * scale + 7, teacher).item() < 1e-6


def test_pkd_of_anticorrelated_features_is_twice_the_variance():
    teacher = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    # normalised: +-1/sqrt(2); difference sqrt(2), squared 2, halved 1
    assert pkd(-teacher, teacher).item() == pytest.approx(1.0, rel=1e-4)


ALL_LOSSES = {
    "kl": lambda x, t: kl_divergence(x, t, temperature=3.0, normalizer=1),
    "l1": lambda x, t: confident_l1(x[:, :4], t[:, :4], t[:, :2]),
    "giou": lambda x, t: confident_giou(x[:, :4], t[:, :4], t[:, 0], normalizer=1),
    "iou": lambda x, t: confident_iou(x[:, :4], t[:, :4], t[:, 0], normalizer=1),
    "focal": lambda x, t: quality_focal(x, t, beta=1, normalizer=1),
    "pkd": lambda x, t: pkd(x.view(-1, 6, 1, 1), t.view(-1, 6, 1, 1)),
    "standardize": lambda x, t: standardize_like(x, t).sum(),
}


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_empty_input_gives_a_connected_zero(name):
    x = torch.zeros(0, 6, requires_grad=True)
    loss = ALL_LOSSES[name](x * 1.0, torch.zeros(0, 6))
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert x.grad is not None and x.grad.shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_low_precision_input_is_computed_in_float32(name, dtype):
    g = torch.Generator().manual_seed(0)
    x, t = torch.rand(4, 6, generator=g).to(dtype), torch.rand(4, 6, generator=g).to(dtype)
    loss = ALL_LOSSES[name](x, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ALL_LOSSES[name](x.float(), t.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_no_gradient_flows_into_the_teacher(name):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 6, generator=g, requires_grad=True)
    t = torch.rand(4, 6, generator=g, requires_grad=True)
    ALL_LOSSES[name](x, t).backward()
    assert x.grad is not None and t.grad is None


@pytest.mark.parametrize("function", [pkd, standardize_like])
def test_one_element_per_channel_and_dead_channels_give_finite_gradients(function):
    for shape in [(1, 3, 1, 1), (2, 3, 2, 2)]:
        student = torch.ones(shape, requires_grad=True)
        teacher = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        function(student, teacher).sum().backward()
        assert torch.isfinite(student.grad).all()


def test_standardize_like_takes_over_the_teachers_statistics():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(50, 4, generator=g), 3 * torch.randn(50, 4, generator=g) + 2
    result = standardize_like(student, teacher)
    torch.testing.assert_close(result.mean(0), teacher.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.std(0), teacher.std(0), rtol=1e-4, atol=1e-4)
