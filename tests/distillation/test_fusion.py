"""Adapters, combinations, routes and alignment."""

import math

import pytest
import torch

from crosskd_ifc.distillation.fusion import FEATURE_FUSION_REGISTRY, FeatureFusion, build_adapter

SHAPES = {"pool": (4, 7, 7), "fc1": (6,), "fc2": (6,)}


def fuse(
    name, taps, features, *, teacher=None, entry="fc2", route="direct", align="none", run=None
):
    fusion = FeatureFusion(
        name=name,
        taps=taps,
        entry=entry,
        route=route,
        align=align,
        student_shapes=SHAPES,
        teacher_shapes=SHAPES,
    )
    return fusion(features, teacher, run)


ONE, TWO = torch.tensor([[1.0, -2.0] * 3]), torch.tensor([[3.0, 4.0] * 3])


@pytest.mark.parametrize(
    "name, expected", [("sum", [4.0, 2.0] * 3), ("mean", [2.0, 1.0] * 3)], ids=lambda x: str(x)[:4]
)
def test_combinations_are_known_by_hand(name, expected):
    assert fuse(name, ("fc1", "fc2"), {"fc1": ONE, "fc2": TWO}).tolist() == [expected]


@pytest.mark.parametrize("name", ["weighted", "attention", "concat"])
@pytest.mark.parametrize("shape", [(6,), (4, 7, 7)], ids=["vectors", "maps"])
def test_learned_combinations_start_as_the_mean_and_are_learned(name, shape):
    g = torch.Generator().manual_seed(0)
    features = [torch.randn(5, *shape, generator=g) for _ in range(3)]
    combine = FEATURE_FUSION_REGISTRY.get(name)(("a", "b", "c"), shape)
    mean = FEATURE_FUSION_REGISTRY.get("mean")(("a", "b", "c"), shape)
    torch.testing.assert_close(combine(features), mean(features))
    combine(features).square().sum().backward()
    for parameter_name, p in combine.named_parameters():
        assert p.grad.abs().sum() > 0, parameter_name


def test_attention_weighs_each_roi_by_itself():
    combine = FEATURE_FUSION_REGISTRY.get("attention")(("a", "b"), (1,))
    with torch.no_grad():
        combine.vectors[0] = 1.0
    # Scores 0 and 0, then log 3 and 0: weights 1/2, 1/2 and 3/4, 1/4.
    first = torch.tensor([[0.0], [1.0986123]])
    fused = combine([first, torch.tensor([[2.0], [4.0]])])
    torch.testing.assert_close(fused, torch.tensor([[1.0], [0.75 * 1.0986123 + 1.0]]))


def test_attention_looks_at_the_mean_of_a_map():
    combine = FEATURE_FUSION_REGISTRY.get("attention")(("a", "b"), (1, 1, 2))
    with torch.no_grad():
        combine.vectors[0] = 1.0
    first = torch.tensor([0.0, 2 * math.log(3)]).view(1, 1, 1, 2)  # mean log 3: weights 3/4, 1/4
    fused = combine([first, torch.full_like(first, 4.0)])
    torch.testing.assert_close(fused, 0.75 * first + 1)


def test_residual_adds_the_difference_by_a_gate_below_one():
    combine = FEATURE_FUSION_REGISTRY.get("residual")(("a", "b"), (1,))
    torch.nn.init.constant_(combine.gates, math.log(3) / 2)  # tanh: 1/2
    assert combine([torch.tensor([[2.0]]), torch.tensor([[6.0]])]).item() == pytest.approx(4)


@pytest.mark.parametrize("detach", [(), ("fc1",), ("fc2",)])
@pytest.mark.parametrize("taps", [("fc1", "fc2"), ("fc2", "fc1")])
def test_the_first_tap_that_is_named_is_the_first_of_the_combination(taps, detach):
    fusion = FeatureFusion(
        name="residual",
        taps=taps,
        entry="fc2",
        route="direct",
        align="none",
        detach=detach,
        student_shapes=SHAPES,
        teacher_shapes=SHAPES,
    )
    features = {"fc1": ONE, "fc2": TWO}
    assert torch.equal(fusion(features, None, None), features[taps[0]])  # as it starts
    assert torch.equal(fusion.features(features, None, None)[0], features[taps[0]])


def test_none_hands_the_tap_on_as_it_is():
    assert fuse("none", ("fc1",), {"fc1": ONE, "fc2": TWO}) is ONE


def test_through_runs_the_teachers_layers_between_tap_and_entry():
    calls = []

    def run(x, after, until):
        calls.append((after, until))
        return 10 * x

    taps = {"fc1": ONE, "fc2": TWO}
    assert fuse("sum", ("fc1", "fc2"), taps, route="through", run=run).tolist() == [
        [40.0, 20.0] * 3
    ]
    assert calls == [("fc1", "fc2"), ("fc2", "fc2")]


def test_standardize_is_followed_by_relu_unless_the_entry_is_pool():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(20, 6, generator=g), torch.randn(20, 6, generator=g)
    fused = fuse("none", ("fc1",), {"fc1": student}, teacher=teacher, align="standardize")
    assert (fused >= 0).all() and (fused == 0).any()
    maps = torch.randn(2, 4, 7, 7, generator=g), torch.randn(2, 4, 7, 7, generator=g)
    fused = fuse(
        "none", ("pool",), {"pool": maps[0]}, teacher=maps[1], entry="pool", align="standardize"
    )
    assert (fused < 0).any()


@pytest.mark.parametrize(
    "source, target, kind",
    [
        ((6,), (6,), "Identity"),
        ((4, 7, 7), (4, 7, 7), "Identity"),
        ((4, 7, 7), (5, 7, 7), "Conv2d"),
        ((4, 7, 7), (6,), "Sequential"),
        ((4,), (6,), "Linear"),
    ],
)
def test_adapters_map_shapes_and_have_no_weights_where_they_agree(source, target, kind):
    adapter = build_adapter(source, target)
    assert type(adapter).__name__ == kind
    assert adapter(torch.zeros(3, *source)).shape == (3, *target)
    assert bool(list(adapter.parameters())) == (source != target)


def test_the_adapter_from_a_map_to_a_vector_reads_the_maps_mean():
    adapter = build_adapter((1, 2, 2), (1,))
    with torch.no_grad():
        adapter[1].weight.fill_(1.0)
        adapter[1].bias.zero_()
    assert adapter(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])).item() == pytest.approx(3)


@pytest.mark.parametrize("source, target", [((6,), (4, 7, 7)), ((4, 7, 7), (4, 14, 14))])
def test_shapes_that_no_adapter_bridges_are_refused(source, target):
    with pytest.raises(ValueError, match="no adapter"):
        build_adapter(source, target)


def test_the_registry_names_what_it_has():
    assert {"none", "sum", "mean", "weighted", "attention", "concat"} <= set(
        FEATURE_FUSION_REGISTRY.names()
    )
    with pytest.raises(KeyError, match="blend"):
        FEATURE_FUSION_REGISTRY.get("blend")
