"""The losses of other methods, alone: against recorded reference values, hand-known answers and
identities."""

import json
import math
import os

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from crosskd_ifc import (
    CLS_LOSS_REGISTRY,
    FEATURE_LOSS_REGISTRY,
    channel_wise,
    decoupled_kl,
    dist,
    gap_giou,
    kl_divergence,
    losses,
    score_gap,
)
from crosskd_ifc.distillation.loss_types.focal_global import box_masks

GOLDEN = np.load(os.path.join(os.path.dirname(__file__), "..", "data", "baselines.npz"))
INDEX = json.loads(str(GOLDEN["index"]))


def cases(family):
    return [k for k in INDEX if k.startswith(family)]


def load(case, *names):
    return [torch.tensor(GOLDEN[f"{case}.{name}"]) for name in names]


def assert_matches(loss, case, x):
    """``loss`` and its gradient by ``x`` equal the recorded ones."""
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(float(GOLDEN[f"{case}.loss"]), rel=1e-5, abs=1e-9)
    loss.backward()
    torch.testing.assert_close(x.grad, load(case, "grad")[0], rtol=1e-5, atol=1e-7)


def random(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def loss_of(name, channels=4, **options):
    torch.manual_seed(0)
    return FEATURE_LOSS_REGISTRY.get(name)(channels, **options).double()


@pytest.mark.parametrize("case", cases("cwd"))
def test_channel_wise_equals_the_reference(case):
    student, teacher = load(case, "student", "teacher")
    student.requires_grad_()
    loss = channel_wise(student, teacher, temperature=INDEX[case]["tau"])
    assert_matches(loss, case, student)


@pytest.mark.parametrize("case", cases("dist"))
def test_dist_equals_the_reference(case):
    cross, teacher = load(case, "cross_logits", "teacher_logits")
    cross.requires_grad_()
    meta = INDEX[case]
    weights = {name: meta[name] for name in ("inter", "intra")}
    assert_matches(dist(cross, teacher, temperature=meta["tau"], **weights), case, cross)


@pytest.mark.parametrize("case", cases("dkd"))
def test_decoupled_kl_equals_the_reference(case):
    cross, teacher, targets = load(case, "cross_logits", "teacher_logits", "targets")
    cross.requires_grad_()
    meta = INDEX[case]
    weights = {name: meta[name] for name in ("alpha", "beta")}
    loss = decoupled_kl(cross, teacher, targets, temperature=meta["tau"], normalizer=1, **weights)
    assert_matches(loss, case, cross)


def test_the_losses_stand_with_the_others_under_the_promised_path():
    assert losses.channel_wise is channel_wise and losses.dist is dist
    assert losses.decoupled_kl is decoupled_kl


def test_channel_wise_of_two_pixels_is_known_by_hand():
    teacher = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 1, 2)  # probabilities 3/4, 1/4
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = channel_wise(torch.zeros(1, 1, 1, 2), teacher, temperature=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_channel_wise_ignores_a_shift_of_each_channel():
    teacher = random(2, 3, 4, 5)
    shifted = teacher + torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)
    assert channel_wise(shifted, teacher, temperature=2.0).item() < 1e-12


def test_dist_ignores_what_leaves_the_correlations_as_they_are():
    logits = random(6, 4)
    assert dist(logits, logits, temperature=2.0, inter=1.0, intra=1.0).item() < 1e-5
    # Of two classes p and 1 - p, the correlation within rows is 1 wherever the same class wins.
    sure, unsure = torch.tensor([[3.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    assert dist(sure, unsure, temperature=1.0, inter=1.0, intra=0.0).item() < 1e-5


def test_dist_takes_classes_that_are_never_probable_as_uncorrelated():
    # As published: the product of two norms of 4e-8 is nothing beside the 1e-8 that is added to it.
    sure = torch.tensor([[17.0, 0.0, 0.0], [18.0, 0.0, 0.0]])
    settings = {"inter": 0.0, "intra": 1.0}
    assert dist(sure, sure, temperature=1.0, **settings).item() == pytest.approx(1, abs=1e-4)
    assert dist(sure, sure, temperature=4.0, **settings).item() / 16 < 1e-2


def test_rows_without_spread_give_finite_gradients():
    cross = torch.zeros(1, 3, requires_grad=True)  # one row: no spread within columns, either
    dist(cross, random(1, 3).float(), temperature=1.0, inter=1.0, intra=1.0).backward()
    assert torch.isfinite(cross.grad).all()


def test_decoupled_kl_adds_up_to_the_kl_divergence():
    cross, teacher = random(1, 5, grad=True), random(1, 5, seed=1)
    targets = torch.tensor([2])
    share = teacher.softmax(dim=1)[0, 2].item()
    settings = {"temperature": 1.0, "normalizer": 1}
    found = decoupled_kl(cross, teacher, targets, alpha=1.0, beta=1 - share, **settings)
    torch.testing.assert_close(found, kl_divergence(cross, teacher, **settings))


def test_decoupled_kl_stays_finite_where_the_target_is_all_or_nothing():
    cross = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 0.0, 0.0]], requires_grad=True)
    teacher, targets = torch.randn(2, 3), torch.tensor([0, 0])
    settings = {"temperature": 1.0, "alpha": 1.0, "beta": 1.0, "normalizer": 2}
    decoupled_kl(cross, teacher, targets, **settings).backward()
    assert torch.isfinite(cross.grad).all()


LOGITS = {
    "dist": lambda x, t: dist(x, t, temperature=2.0, inter=1.0, intra=1.0),
    "dkd": lambda x, t: decoupled_kl(
        x,
        t,
        torch.arange(len(x)) % 6,
        temperature=2.0,
        alpha=1.0,
        beta=2.0,
        normalizer=1,
    ),
    "cwd": lambda x, t: channel_wise(x.view(-1, 6, 1, 1), t.view(-1, 6, 1, 1), temperature=1.0),
    **{
        f"registered {name}": lambda x, t, f=f, name=name: f(
            x,
            t,
            temperature=1.0,
            **({"targets": torch.arange(len(x)) % 6} if name == "dkd" else {}),
        )
        for name, f in CLS_LOSS_REGISTRY
    },
}


@pytest.mark.parametrize("name", LOGITS)
def test_empty_input_gives_a_connected_zero(name):
    x = torch.zeros(0, 6, requires_grad=True)
    loss = LOGITS[name](x * 1.0, torch.zeros(0, 6))
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert x.grad is not None and x.grad.shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOGITS)
def test_low_precision_input_is_computed_in_float32(name, dtype):
    x, t = random(4, 6).to(dtype), random(4, 6, seed=1).to(dtype)
    loss = LOGITS[name](x, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOGITS[name](x.float(), t.float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOGITS)
def test_no_gradient_flows_into_the_teacher(name):
    x, t = random(4, 6, grad=True), random(4, 6, seed=1, grad=True)
    LOGITS[name](x, t).backward()
    assert x.grad is not None and t.grad is None


BOXES = [torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 4.5, 3.0]]), torch.zeros(0, 4)]


def test_masks_give_each_box_the_same_share_and_the_smaller_box_the_overlap():
    foreground, background = box_masks(BOXES[0], 4, 6)
    expected = torch.zeros(4, 6)
    expected[1:3, 1:5] = 1 / 8  # 4.5 touches a fifth column
    expected[0:2, 0:2] = 1 / 4  # the smaller one wins at (1, 1)
    torch.testing.assert_close(foreground, expected)
    torch.testing.assert_close(background, (expected == 0).float() / (expected == 0).sum())


def test_masks_without_boxes_and_boxes_of_less_than_a_cell_or_outside_are_whole():
    foreground, background = box_masks(BOXES[1], 2, 3)
    assert not foreground.any() and torch.equal(background, torch.full((2, 3), 1 / 6))
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0], [7.0, 7.0, 9.0, 9.0]])
    foreground, background = box_masks(point, 2, 3)
    assert foreground.sum() == 1 and foreground[1, 1] == 1
    foreground, background = box_masks(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), 2, 3)
    torch.testing.assert_close(foreground, torch.full((2, 3), 1 / 6))
    assert not background.any()


def test_focal_and_global_terms_are_those_of_their_formulas():
    """Pixel by pixel, with weights of its context blocks that are not at their start."""
    loss = loss_of("fgd", background=0.3, attention=0.7, context=0.9)
    for p in loss.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(3))
    s, t = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    found = loss(s, t, [x.double() for x in BOXES])

    def attention(x):  # of one image (4, 3, 5)
        pixels = (x.abs().mean(0) / 0.5).exp()
        channels = (x.abs().mean((1, 2)) / 0.5).exp()
        return 15 * pixels / pixels.sum(), 4 * channels / channels.sum()

    def context(block, x):
        weigh, (first, norm, _, last) = block.weigh.weight[0, :, 0, 0], block.transform
        scores = torch.einsum("c,chw->hw", weigh, x).exp()
        mean = torch.einsum("chw,hw->c", x, scores / scores.sum())
        hidden = first.weight @ mean + first.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt()
        hidden = (hidden * norm.weight + norm.bias).clamp(min=0)
        return x + (last.weight @ hidden + last.bias).view(-1, 1, 1)

    wanted = 0
    for i in range(2):
        foreground, background = box_masks(BOXES[i].double(), 3, 5)
        (ps, cs), (pt, ct) = attention(s[i]), attention(t[i])
        for c in range(4):
            square = (s[i, c] - t[i, c]) ** 2 * pt * ct[c]
            wanted = wanted + (square * (foreground + 0.3 * background)).sum()
        wanted = wanted + 0.7 * ((ps - pt).abs().sum() + (cs - ct).abs().sum())
        contexts = context(loss.student_context, s[i]) - context(loss.teacher_context, t[i])
        wanted = wanted + 0.9 * (contexts**2).sum()
    torch.testing.assert_close(found, wanted / 2)


def test_focal_and_global_distillation_of_equal_features_starts_at_zero():
    x = random(2, 4, 3, 5)
    assert loss_of("fgd")(x, x, [b.double() for b in BOXES]).item() == 0


def test_without_its_other_terms_it_is_mimicking_inside_of_the_ground_truth():
    options = {"temperature": 1e9, "background": 0.0, "attention": 0.0, "context": 0.0}
    s, t = random(1, 4, 3, 5), random(1, 4, 3, 5, seed=1)
    found = loss_of("fgd", **options)(s, t, [BOXES[0][:1].double()])
    wanted = (s - t)[:, :, :2, :2].square().sum() / 4
    torch.testing.assert_close(found, wanted)


def test_the_generator_restores_the_teacher_from_what_the_mask_leaves():
    loss = loss_of("mgd", mask_ratio=0.5)
    s, t = random(2, 4, 6, 7), random(2, 4, 6, 7, seed=1)
    seen = []
    loss.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with EventStorage(3):
        found = loss(s, t, [])
        kept = seen[0] != 0
        assert torch.equal(seen[0], s * kept) and (kept == kept[:, :1]).all()
        assert 0.3 < kept.double().mean() < 0.7
        assert not torch.equal(kept[0], kept[1])
        torch.testing.assert_close(found, (loss.generator(s * kept) - t).square().sum() / 2)


def test_masks_are_the_same_in_a_repeated_iteration_and_others_in_the_next():
    s, drawn = torch.ones(1, 4, 8, 8), []
    for iteration in (5, 5, 6):
        loss = loss_of("mgd").float()
        loss.generator.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0]))
        before = torch.get_rng_state()
        with EventStorage(iteration):
            loss(s, s, [])
            loss(s, s, [])
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[4])


@pytest.mark.parametrize(
    "name, options",
    [
        ("cwd", {"temperature": 0.0}),
        ("mgd", {"mask_ratio": 1.0}),
        ("fgd", {"temperature": -1.0}),
        ("fgd", {"context": -1.0}),
    ],
)
def test_settings_that_cannot_work_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0] + "|weight"):
        loss_of(name, **options)


def test_bckd_weighs_boxes_by_the_largest_difference_of_the_scores():
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-ln 3) = 1/4.
    ln3 = math.log(3)
    cross = torch.tensor([[0.0, 0.0], [ln3, 0.0], [ln3, -ln3]], requires_grad=True)
    teacher = torch.tensor([[ln3, 0.0], [-ln3, ln3], [ln3, -ln3]])
    gap = score_gap(cross, teacher)
    torch.testing.assert_close(gap, torch.tensor([0.25, 0.5, 0.0]))
    assert not gap.requires_grad
    # Boxes of area 4 that share 2: IoU 2/6, and their hull is their union, so GIoU is the same.
    theirs = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(3, 4)
    ours = (theirs + torch.tensor([1.0, 0.0, 1.0, 0.0])).requires_grad_()
    loss = gap_giou(ours, theirs, gap, normalizer=2)
    assert loss.item() == pytest.approx(0.75 * (1 - 1 / 3) / 2, rel=1e-5)
    loss.backward()
    assert ours.grad[:2].abs().sum() > 0 and ours.grad[2].abs().sum() == 0


def test_bckd_of_a_student_that_scores_or_localizes_as_its_teacher_is_zero():
    logits, boxes = torch.randn(5, 3), torch.rand(5, 2) * 9
    boxes = torch.cat([boxes, boxes + 4], dim=1)
    assert gap_giou(boxes + 3, boxes, score_gap(logits, logits), normalizer=1) == 0
    loss = gap_giou(boxes, boxes, score_gap(logits, logits + 1), normalizer=1)
    assert loss.abs() < 1e-5
