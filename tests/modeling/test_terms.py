"""The general loss: terms for the combined feature and for taps by themselves, in all heads."""

import re

import pytest
import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import DENSE, pair

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.fusion import FEATURE_FUSION_REGISTRY

K = "MODEL.CROSSKD."
KEYS = ("loss_cls_kd", "loss_box_reg_kd")
KINDS = ("RCNN", *DENSE)
TAPS = {"RCNN": ("pool", "fc1", "fc2"), **dict.fromkeys(DENSE, ("conv1", "conv2", "conv3"))}
kinds = pytest.mark.parametrize("kind", KINDS)


def student_of(
    kind,
    *,
    name="mean",
    taps=None,
    entry="",
    route="through",
    align="",
    weights=(),
    fused=1.0,
    detach=(),
    opts=(),
):
    """A student in training mode; its taps go through the teacher's layers."""
    settings = {
        "FUSION.NAME": name,
        "FUSION.IN_FEATURES": taps or TAPS[kind],
        "FUSION.ENTRY": entry or ("conv3" if kind in DENSE else ""),
        "FUSION.ALIGN": align,
        "FUSION.DETACH": detach,
        "LOSS.TAP_WEIGHTS": weights,
        "LOSS.FUSED_WEIGHT": fused,
        "FUSION.ROUTE": route,
    }
    opts = [x for k, v in settings.items() for x in (K + k, v)] + list(opts)
    return (distilling(*opts) if kind == "RCNN" else pair(kind, *opts))[0]


def losses_of(student, iteration=0):
    found, _ = train_losses(student, tiny_batch(), iteration=iteration)
    return {key: found[key] for key in KEYS}


def gradients(student, losses):
    parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    total = sum(losses.values())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found))


@kinds
def test_a_weight_of_one_on_the_combined_feature_is_the_loss_of_the_mean(kind):
    today, general = student_of(kind), student_of(kind, weights=(0.0, 0.0, 0.0))
    for one, other in zip(losses_of(today).values(), losses_of(general).values()):
        assert torch.equal(one, other)


@kinds
def test_terms_of_taps_alone_are_the_weighted_sum_of_the_losses_of_single_taps(kind):
    weights = (1.0, 0.5, 0.25)
    found = losses_of(student_of(kind, weights=weights, fused=0.0))
    single = [losses_of(student_of(kind, name="none", taps=(tap,))) for tap in TAPS[kind]]
    for key in KEYS:
        wanted = sum(w * x[key] for w, x in zip(weights, single))
        torch.testing.assert_close(found[key], wanted, rtol=1e-5, atol=1e-6)


@kinds
def test_taps_that_are_not_combined_have_a_loss_each_the_first_with_twice_the_weight(kind):
    found = losses_of(student_of(kind, name="none", route=""))
    route = "direct" if kind in DENSE else "through"
    wanted = losses_of(student_of(kind, weights=(1.0, 0.5, 0.5), fused=0.0, route=route))
    assert all(torch.equal(found[key], wanted[key]) for key in KEYS)
    weights = (0.25, 0.0, 1.0)
    found = losses_of(student_of(kind, name="none", weights=weights))
    wanted = losses_of(student_of(kind, weights=weights, fused=0.0))
    assert all(torch.equal(found[key], wanted[key]) for key in KEYS)


@pytest.mark.parametrize("tap", TAPS["RCNN"])
def test_a_tap_alone_is_the_term_that_it_is_among_several(tap):
    found = losses_of(student_of("RCNN", name="none", taps=(tap,), route=""))
    weights = [float(tap == other) for other in TAPS["RCNN"]]
    wanted = losses_of(student_of("RCNN", name="none", route="", weights=weights))
    assert all(torch.equal(found[key], wanted[key]) for key in KEYS)


def test_pool_alone_is_plain_crosskd():
    found, wanted = (
        losses_of(student_of("RCNN", name="none", taps=("pool",), entry=entry, route=""))
        for entry in ("", "pool")
    )
    assert all(torch.equal(found[key], wanted[key]) for key in KEYS)


@kinds
def test_weights_of_taps_with_one_tap_are_refused(kind):
    with pytest.raises(ConfigError, match=r"TAP_WEIGHTS is \(1.0,\), .*one tap.*FUSED_WEIGHT"):
        student_of(kind, name="none", taps=TAPS[kind][:1], weights=(1.0,))


@kinds
def test_the_tap_of_plain_crosskd_comes_first_where_none_is_named(kind):
    opts = (K + "FUSION.NAME", "none")
    found = losses_of((distilling(*opts) if kind == "RCNN" else pair(kind, *opts))[0])
    depth = {"RetinaNet": 3, "FCOS": 2}.get(kind)
    taps = tuple(f"conv{i}" for i in range(depth, 0, -1)) if depth else TAPS[kind]
    wanted = losses_of(
        student_of(
            kind,
            taps=taps,
            entry=taps[0] if depth else "",
            fused=0.0,
            route="direct" if depth else "through",
            weights=(1.0, 0.5, 0.5)[: len(taps)],
        )
    )
    assert all(torch.equal(found[key], wanted[key]) for key in KEYS)


@kinds
def test_by_default_taps_of_a_box_head_have_a_loss_each_and_those_of_a_dense_one_their_mean(kind):
    name = "mean" if kind in DENSE else "none"
    found, wanted = (
        losses_of((distilling(*opts) if kind == "RCNN" else pair(kind, *opts))[0])
        for opts in ((), (K + "FUSION.NAME", name))
    )
    assert all(torch.equal(found[key], wanted[key]) for key in KEYS)


@pytest.mark.parametrize(
    "ours, theirs, taps",
    [
        ((0, 2), (0, 2), ("pool", "fc1", "fc2")),
        ((0, 2), (2, 1), ("pool", "fc1")),
        ((2, 1), (0, 2), ("pool", "fc1")),
        ((2, 0), (1, 0), ("pool", "conv1")),
        ((2, 0), (0, 2), ("pool",)),
    ],
)
def test_by_default_the_layers_are_tapped_that_both_box_heads_have(ours, theirs, taps):
    keys = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC")
    ours, theirs = ([x for pair in zip(keys, head) for x in pair] for head in (ours, theirs))
    student, _ = distilling(*ours, teacher_opts=theirs)
    assert student.distiller.box.fusion.taps == taps
    assert all(torch.isfinite(x) and x > 0 for x in losses_of(student).values())


def test_the_cross_head_prediction_of_taps_that_are_not_combined_is_that_of_the_first():
    separate, plain = (student_of("RCNN", name="none", taps=taps) for taps in (None, ("pool",)))
    batch = tiny_batch()
    found, wanted = (student.eval().cross_head_inference(batch) for student in (separate, plain))
    for x, y in zip(found, wanted):
        assert torch.equal(x["instances"].scores, y["instances"].scores)


def test_it_is_never_that_of_a_tap_without_a_loss():
    separate = student_of("RCNN", name="none", weights=(0.0, 1.0, 0.0))
    plain = student_of("RCNN", name="none", taps=("fc1",))
    found, wanted = (s.eval().cross_head_inference(tiny_batch()) for s in (separate, plain))
    for x, y in zip(found, wanted):
        assert torch.equal(x["instances"].scores, y["instances"].scores)


@kinds
def test_all_terms_together_are_the_sum_of_their_losses(kind):
    found = losses_of(student_of(kind, weights=(1.0, 0.0, 0.5), fused=0.5))
    parts = [
        losses_of(student_of(kind, weights=(1.0, 0.0, 0.5), fused=0.0)),
        losses_of(student_of(kind, fused=0.5)),
    ]
    for key in KEYS:
        wanted = parts[0][key] + parts[1][key]
        torch.testing.assert_close(found[key], wanted, rtol=1e-5, atol=1e-6)


@kinds
def test_both_losses_of_a_mean_at_the_last_entry_are_at_most_the_mean_of_the_taps(kind):
    """Convexity (method, section 7); dense heads have layers after the entry, RCNN none."""
    if kind != "RCNN":
        pytest.skip("only where the layers after the entry are affine")
    mean = losses_of(student_of(kind))
    taps = losses_of(student_of(kind, weights=(1 / 3,) * 3, fused=0.0))
    assert all(mean[key] < taps[key] for key in KEYS)


@kinds
def test_residual_starts_as_plain_crosskd_in_losses_and_gradients_bit_for_bit(kind):
    first = TAPS[kind][0]
    plain = student_of(kind, name="none", taps=(first,))
    residual = student_of(kind, name="residual")
    losses = losses_of(plain), losses_of(residual)
    for key in KEYS:
        assert torch.equal(losses[0][key], losses[1][key])
    wanted, found = gradients(plain, losses[0]), gradients(residual, losses[1])
    for name, gradient in wanted.items():
        if gradient is not None:
            assert torch.equal(gradient, found[name]), name
    gates = [g for name, g in found.items() if "gates" in name]
    assert gates and all(g.abs().sum() > 0 for g in gates)


def test_a_detached_anchor_gets_no_gradient_from_the_combined_term():
    """With the fc taps' part cut off, what is left of the boosted loss is the anchor's own."""
    boosted = student_of("RCNN", weights=(1.0, 0.0, 0.0), fused=0.5, detach=("pool",))
    anchor = student_of("RCNN", weights=(1.0, 0.0, 0.0), fused=0.0)
    fc = [n for n, _ in boosted.named_parameters() if n.startswith("roi_heads.box_head")]
    assert fc
    taken = {}
    for name, student in (("boosted", boosted), ("anchor", anchor)):
        found, _ = train_losses(student, tiny_batch())
        taken[name] = gradients(student, {k: found[k] for k in KEYS})
    # the box head's own layers learn from the combined term only
    assert any(taken["boosted"][n].abs().sum() > 0 for n in fc)
    assert all(taken["anchor"][n] is None or not taken["anchor"][n].any() for n in fc)
    combined = student_of("RCNN", fused=0.5, detach=("fc1", "fc2"), weights=(0.0, 0.0, 0.0))
    without = gradients(combined, losses_of(combined))
    assert all(without[n] is None or not without[n].any() for n in fc)
    assert without["backbone.fpn_output2.weight"].any()


@kinds
def test_the_adapter_of_a_detached_tap_learns_and_the_student_does_not(kind):
    narrow = {"RCNN": ("MODEL.ROI_BOX_HEAD.FC_DIM", 12)}
    opts = narrow.get(kind, ("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FCOS.NORM", ""))
    detach, own = TAPS[kind][1:], (0.0, 1.0, 0.0)
    combined, both, alone = (
        gradients(student, losses_of(student))
        for student in (
            student_of(kind, opts=opts, detach=detach),
            student_of(kind, opts=opts, detach=detach, weights=own),
            student_of(kind, opts=opts, weights=own, fused=0.0),
        )
    )
    adapters = [n for n in combined if n.startswith("fusion.") and n.split(".")[-2] in detach]
    assert adapters and all(combined[n].any() for n in adapters)
    deeper = [n for n in combined if re.match(r"roi_heads\.box_head|head\.\w+_subnet\.[2-9]", n)]
    assert deeper and not any(combined[n] is not None and combined[n].any() for n in deeper)
    for n in deeper:  # those of a term of the tap's own, and no more
        torch.testing.assert_close(both[n], alone[n], rtol=1e-4, atol=1e-6)


@kinds
@pytest.mark.parametrize(
    "settings",
    [
        dict(name="weighted", weights=(1.0, 0.0, 0.0), fused=0.0),
        dict(name="concat", detach=TAPS["RCNN"][:1]),
        dict(name="residual", weights=(0.0, 1.0, 0.0), fused=0.5),
        dict(name="dropout"),
    ],
    ids=["unused fusion", "detached", "residual", "dropout"],
)
def test_every_learned_parameter_has_a_finite_gradient_in_every_step(kind, settings):
    if "detach" in settings:
        settings = {**settings, "detach": TAPS[kind][:1]}
    narrow = ("MODEL.ROI_BOX_HEAD.FC_DIM", 12) if kind == "RCNN" else ()
    student = student_of(kind, opts=narrow, **settings)
    learned = [n for n, _ in student.named_parameters() if n.startswith("fusion.")]
    assert learned or settings["name"] == "dropout"
    for factor in (1.0, 0.0):
        student.kd_factor = factor
        found = gradients(student, losses_of(student)) if learned else {}
        for name in learned:
            assert found[name] is not None and torch.isfinite(found[name]).all(), name


@kinds
def test_standardized_taps_of_one_tap_are_the_standardized_feature(kind):
    tap = TAPS[kind][-1:]
    a = losses_of(student_of(kind, name="mean", taps=tap, align="standardize"))
    b = losses_of(student_of(kind, name="mean", taps=tap, align="standardize_taps"))
    assert all(torch.equal(a[key], b[key]) for key in KEYS)


def test_standardized_taps_each_have_the_teachers_statistics_before_they_are_combined():
    torch.manual_seed(0)
    from crosskd_ifc.fusion import FeatureFusion, standardize_like

    shapes = {"a": (6,), "b": (6,)}
    fusion = FeatureFusion(
        name="mean",
        taps=("a", "b"),
        entry="b",
        route="direct",
        align="standardize_taps",
        student_shapes=shapes,
        teacher_shapes=shapes,
    )
    taps, teacher = {"a": torch.randn(5, 6), "b": 9 * torch.randn(5, 6)}, torch.randn(5, 6)
    found = fusion(taps, teacher, None)
    wanted = sum(standardize_like(x, teacher).relu() for x in taps.values()) / 2
    torch.testing.assert_close(found, wanted)


@kinds
def test_an_own_fusion_may_leave_out_a_parameter_in_a_step(kind):
    class Idle(torch.nn.Module):
        def __init__(self, taps, shape):
            super().__init__()
            self.spare = torch.nn.Parameter(torch.ones(3))

        def forward(self, features):
            return sum(features)

    name = f"idle_{kind}"
    FEATURE_FUSION_REGISTRY.register(name=name)(Idle)
    student = student_of(kind, name=name)
    found = gradients(student, losses_of(student))
    spare = [gradient for key, gradient in found.items() if key.endswith("spare")]
    assert spare and all(torch.equal(x, torch.zeros(3)) for x in spare)


def test_each_tap_of_bckd_is_weighted_by_its_own_gap():
    opts, weights = (K + "LOSS.BOX_TYPE", "bckd"), (1.0, 0.5, 0.25)
    found = losses_of(student_of("RetinaNet", weights=weights, fused=0.0, opts=opts))
    single = [
        losses_of(student_of("RetinaNet", name="none", taps=(tap,), opts=opts))
        for tap in TAPS["RetinaNet"]
    ]
    expected = sum(w * x["loss_box_reg_kd"] for w, x in zip(weights, single))
    torch.testing.assert_close(found["loss_box_reg_kd"], expected, rtol=1e-5, atol=1e-6)


@kinds
def test_mimic_both_adds_the_losses_of_cross_head_and_student_head(kind):
    mimics = {m: (K + "MIMIC", m) for m in ("cross_head", "student_head", "both")}
    found = {
        m: losses_of((distilling(*opts) if kind == "RCNN" else pair(kind, *opts))[0])
        for m, opts in mimics.items()
    }
    for key in KEYS:
        wanted = found["cross_head"][key] + found["student_head"][key]
        torch.testing.assert_close(found["both"][key], wanted)


def subsets(iteration, times=1):
    taps = 3
    dropout = FEATURE_FUSION_REGISTRY.get("dropout")(("a", "b", "c"), (4,))
    features = [torch.full((400, 4), float(2**i)) for i in range(taps)]
    with EventStorage(iteration):
        return [dropout(features) for _ in range(times)]


def test_dropout_draws_each_non_empty_subset_about_as_often_and_takes_its_mean():
    means = {
        round(sum(2**i for i in chosen) / len(chosen), 4): chosen
        for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    }
    rows = [round(x, 4) for x in subsets(7)[0][:, 0].tolist()]
    counts = [rows.count(mean) for mean in means]
    assert sum(counts) == 400 and min(counts) > 30


def test_dropout_is_the_same_in_a_resumed_run_and_differs_by_step_and_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = subsets(7, times=2)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, second) and not torch.equal(first, subsets(8)[0])
    torch.manual_seed(99)
    assert not torch.equal(first, subsets(7)[0])
    torch.set_rng_state(before)  # as a resumed run does
    torch.rand(5)
    again = subsets(7, times=2)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_dropout_is_the_mean_in_evaluation():
    dropout = FEATURE_FUSION_REGISTRY.get("dropout")(("a", "b"), (4,)).eval()
    assert torch.equal(dropout([torch.zeros(2, 4), torch.ones(2, 4)]), torch.full((2, 4), 0.5))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_learned_is_in_the_mode_of_the_student_that_gets_it(training):
    cfg = tiny_cfg("MODEL.CROSSKD.FUSION.NAME", "dropout")
    student = tiny_model(cfg, seed=1).train(training)
    attach_teacher(student, cfg, teacher=tiny_model(seed=2))
    assert {module.training for module in student.fusion.modules()} == {training}


def test_what_each_tap_agrees_with_is_logged():
    student = student_of("RCNN", weights=(1.0, 0.0, 0.5))
    _, storage = train_losses(student, tiny_batch(), iteration=19)
    names = {k for k in storage.latest() if k.startswith("crosskd/agreement_")}
    wanted = {"cross_head", "pool", "fc2", "student"}
    assert names == {f"crosskd/agreement_{x}" for x in wanted}


def test_without_a_term_the_distillation_is_refused():
    """Heads that share no layer but their input have one tap, also where IN_FEATURES is ()."""
    convs = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.NUM_FC", 0)
    convs += ("MODEL.ROI_BOX_HEAD.CONV_DIM", 8)
    with pytest.raises(ConfigError, match="FUSED_WEIGHT is 0, and no tap of .* has a loss"):
        distilling("MODEL.CROSSKD.LOSS.FUSED_WEIGHT", 0.0, teacher_opts=convs)


def test_predictors_that_return_more_than_scores_and_deltas_distil_as_stock_ones(monkeypatch):
    stock = FastRCNNOutputLayers.forward
    student, _ = distilling()
    wanted, _ = train_losses(student, tiny_batch())
    own_losses = FastRCNNOutputLayers.losses

    def more(self, x):
        return (*stock(self, x), x.mean())

    monkeypatch.setattr(FastRCNNOutputLayers, "forward", more)

    def fewer(self, x, proposals):
        return own_losses(self, x[:2], proposals)

    monkeypatch.setattr(FastRCNNOutputLayers, "losses", fewer)
    found, _ = train_losses(student, tiny_batch())
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
