"""Splitting heads by layers."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from crosskd_ifc.distillation.head_layers import BoxHeadLayers, TowerLayers

HEADS = {
    "two fc": dict(conv_dims=[], fc_dims=[6, 5]),
    "two conv, two fc": dict(conv_dims=[4, 8], fc_dims=[6, 5]),
    "with norm": dict(conv_dims=[32, 32], fc_dims=[6], conv_norm="GN"),
    "conv only": dict(conv_dims=[4, 4], fc_dims=[]),
    "one fc": dict(conv_dims=[], fc_dims=[6]),
}


def head_and_input(name):
    torch.manual_seed(0)
    head = FastRCNNConvFCHead(ShapeSpec(channels=3, height=7, width=7), **HEADS[name])
    return head, torch.randn(2, 3, 7, 7)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_split_at_any_layer_and_joined_is_the_head(name):
    head, x = head_and_input(name)
    layers = BoxHeadLayers(head, (7, 7))
    for cut in layers.names:
        joined = layers.run(layers.run(x, "pool", cut), cut)
        assert torch.equal(joined, head(x)), cut


@pytest.mark.parametrize("name", HEADS)
def test_names_and_shapes_are_those_of_the_layers_outputs(name):
    head, x = head_and_input(name)
    layers = BoxHeadLayers(head, (7, 7))
    convs, fcs = len(HEADS[name]["conv_dims"]), len(HEADS[name]["fc_dims"])
    expected = [f"conv{i + 1}" for i in range(convs)] + [f"fc{i + 1}" for i in range(fcs)]
    assert layers.names == ["pool", *expected] and layers.last == layers.names[-1]
    outputs = layers.trace(x)
    assert {n: tuple(o.shape[1:]) for n, o in outputs.items()} == layers.shapes
    assert all((o >= 0).all() for n, o in outputs.items() if n != "pool")  # after the ReLU


def test_running_to_the_same_layer_is_the_identity():
    head, x = head_and_input("two fc")
    assert BoxHeadLayers(head, (7, 7)).run(x, "pool", "pool") is x


def test_a_head_that_computes_more_than_its_layers_is_refused():
    class Scaled(FastRCNNConvFCHead):
        def forward(self, x):
            return 2 * super().forward(x)

    scaled = Scaled(ShapeSpec(channels=3, height=7, width=7), conv_dims=[], fc_dims=[6])
    with pytest.raises(TypeError, match="Scaled"):
        BoxHeadLayers(scaled, (7, 7))
    longer, _ = head_and_input("one fc")
    longer.add_module("projection", torch.nn.Linear(6, 6))
    with pytest.raises(TypeError, match="projection"):
        BoxHeadLayers(longer, (7, 7))


def test_an_unknown_head_is_refused():
    with pytest.raises(TypeError, match="Linear.*FastRCNNConvFCHead"):
        BoxHeadLayers(torch.nn.Linear(2, 2), (7, 7))


DENSE = {
    "retinanet": (RetinaNetHead, dict(num_anchors=3)),
    "retinanet, GN": (RetinaNetHead, dict(num_anchors=3, norm="GN")),
    "retinanet, BN per level": (RetinaNetHead, dict(num_anchors=3, norm="BN")),
    "fcos": (FCOSHead, dict(norm="GN")),
}


def dense_head(name, convs=4):
    kind, options = DENSE[name]
    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=32)] * 3
    head = kind(input_shape=shapes, num_classes=2, conv_dims=[32] * convs, **options)
    for p in head.parameters():  # far from the start, where all outputs are almost alike
        torch.nn.init.normal_(p, std=0.2)
    return head.eval(), [torch.randn(2, 32, n, n + 1) for n in (5, 3, 1)]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("cut", ["input", "conv1", "conv2", "conv3", "conv4"])
def test_towers_split_at_any_layer_and_joined_are_the_dense_head(name, cut):
    head, levels = dense_head(name)
    towers = {t: TowerLayers(getattr(head, f"{t}_subnet")) for t in ("cls", "bbox")}
    assert towers["cls"].names == ["input", "conv1", "conv2", "conv3", "conv4"]
    with torch.no_grad():
        outputs = {}
        for t, tower in towers.items():
            middle = [tower.run(x, "input", cut) for x in levels]
            outputs[t] = [tower.run(x, cut) for x in middle]
        expected = head(levels)
        for level, (a, b) in enumerate(zip(outputs["cls"], outputs["bbox"])):
            assert torch.equal(head.cls_score(a), expected[0][level])
            assert torch.equal(head.bbox_pred(b), expected[1][level])


def test_the_outputs_of_a_tower_are_rectified_and_have_its_channels():
    head, levels = dense_head("retinanet, GN", convs=2)
    trace = TowerLayers(head.cls_subnet).trace(levels[0])
    assert list(trace) == ["input", "conv1", "conv2"]
    assert all((trace[n] >= 0).all() and trace[n].shape[1] == 32 for n in ("conv1", "conv2"))


@pytest.mark.parametrize("modules", [[], [torch.nn.Conv2d(3, 3, 1)], [torch.nn.Linear(3, 3)]])
def test_a_tower_of_other_modules_is_refused(modules):
    with pytest.raises(TypeError, match="no known layers"):
        TowerLayers(torch.nn.Sequential(*modules))
