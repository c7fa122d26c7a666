"""timm networks as backbones: the same features, weights, frozen stages, students that learn."""

import os
import sys

import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from helpers import tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import dense_cfg, telling

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.modeling.timm_backbones import TimmBackbone, timm_input
from crosskd_ifc.weights.stock import stock_config

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "tools"))
import timm_weights as tool  # noqa: E402

PRESETS = ("mobilenetv3_large_100", "efficientnet_b0", "convnext_atto")
LEVELS = ["res2", "res3", "res4", "res5"]


def timm_opts(name, *, levels=LEVELS, dense=False):
    builder = "build_timm_p6p7_fpn_backbone" if dense else "build_timm_fpn_backbone"
    config = timm_input(name)
    return (
        *("MODEL.BACKBONE.NAME", builder, "MODEL.TIMM.NAME", name, "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.FPN.IN_FEATURES", levels, "INPUT.FORMAT", "RGB"),
        *("MODEL.PIXEL_MEAN", config.MODEL.PIXEL_MEAN, "MODEL.PIXEL_STD", config.MODEL.PIXEL_STD),
    )


def trained(name, seed=0):
    """timm's classifier with random weights and statistics."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False).eval()
    for key, x in model.state_dict().items():
        if key.endswith("running_mean"):
            x.normal_(std=0.1)
        elif key.endswith("running_var"):
            x.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    "name, kind", [*((name, "pth") for name in PRESETS), ("resnet18", "safetensors")]
)
def test_its_features_with_weights_from_a_file_are_timms(name, kind, tmp_path, capsys):
    classifier, file = trained(name), str(tmp_path / f"timm.{kind}")
    if kind == "pth":
        torch.save(classifier.state_dict(), file)
    else:
        from safetensors.torch import save_file

        save_file(classifier.state_dict(), file)
    out = str(tmp_path / "weights.pth")
    assert tool.main([name, out, "--file", file]) == 0
    assert f"NAME: {name}" in capsys.readouterr().out
    model = build_model(tiny_cfg(*timm_opts(name))).eval()
    DetectionCheckpointer(model).load(out)
    batch = tiny_batch()
    images = torch.stack([x["image"] for x in batch]).float() / 255
    stats = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (stats.mean, stats.std))
    with torch.no_grad():
        found = model.backbone.bottom_up(model.preprocess_image(batch).tensor)
        wanted = classifier.forward_intermediates((images - mean) / std, intermediates_only=True)
    wanted = {2 ** (64 // x.shape[-1]).bit_length() // 2: x for x in wanted}
    assert list(found) == LEVELS
    for level, x in found.items():
        other = wanted[2 ** int(level[3:])]
        scale = other.abs().max()
        assert x.shape == other.shape and (x - other).abs().max() <= 1e-6 * max(scale, 1)


def test_weights_of_another_network_are_refused(tmp_path, capsys):
    torch.save(trained("resnet18").state_dict(), tmp_path / "r18.pth")
    out = str(tmp_path / "w.pth")
    assert tool.main(["resnet34", out, "--file", str(tmp_path / "r18.pth")]) == 1
    assert "not the weights of timm's resnet34" in capsys.readouterr().err
    assert not os.path.exists(out)
    assert tool.main(["no_such_net", out, "--file", str(tmp_path / "r18.pth")]) == 1
    assert "timm.list_models" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, freeze_at", [*((name, 2) for name in PRESETS), ("convnext_atto", 1), (PRESETS[0], 5)]
)
def test_frozen_stages_neither_learn_nor_change_their_statistics(name, freeze_at):
    torch.manual_seed(0)
    backbone = TimmBackbone(name=name, out_features=LEVELS, freeze_at=freeze_at).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features = backbone(torch.rand(2, 3, 64, 64))
    loss = sum(x.square().mean() for x in features.values())
    learns = [n for n, p in backbone.named_parameters() if p.requires_grad]
    if learns:
        loss.backward()
        torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    after = backbone.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    for i, level in enumerate(LEVELS):
        frozen = freeze_at >= i + 2
        assert features[level].requires_grad != frozen, level
    assert bool(changed) == (freeze_at < 5)
    assert not any("stem" in k for k in changed)
    if freeze_at == 5:
        assert not learns


@pytest.mark.parametrize("freeze_at", [1, 2, 3])
def test_as_much_is_frozen_where_a_dense_detector_takes_no_res2(freeze_at):
    frozen = []
    for levels in (LEVELS, LEVELS[1:]):
        backbone = TimmBackbone(name="resnet18", out_features=levels, freeze_at=freeze_at)
        frozen.append({n for n, p in backbone.named_parameters() if not p.requires_grad})
    assert frozen[0] == frozen[1]


def test_exactly_what_no_feature_comes_from_does_not_learn():
    backbone = TimmBackbone(name="hrnet_w18_small", out_features=LEVELS[1:])
    learns = {n for n, p in backbone.named_parameters() if p.requires_grad}
    backbone.requires_grad_(True)
    sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    assert learns == {n for n, p in backbone.named_parameters() if p.grad is not None}


def test_frozen_norms_keep_the_activation_that_timm_builds_into_them():
    torch.manual_seed(0)
    name = "mobilenetv3_large_100"
    plain = TimmBackbone(name=name, out_features=LEVELS).eval()
    frozen = TimmBackbone(name=name, out_features=LEVELS, norm="FrozenBN", freeze_at=2).train()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    kinds = {type(m).__name__ for m in frozen.modules() if "BatchNorm" in type(m).__name__}
    assert all("Frozen" in kind for kind in kinds)
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(plain(x).values(), frozen(x).values()):
        torch.testing.assert_close(a, b)


def test_every_parameter_gets_a_gradient_also_where_the_last_stage_is_not_used():
    backbone = TimmBackbone(name="efficientnet_b0", out_features=["res2", "res3", "res4"]).train()
    sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    assert backbone.features.blocks[4][0].conv_pw.weight.requires_grad


@pytest.mark.parametrize("name", PRESETS)
def test_a_two_stage_student_learns_from_a_teacher(name):
    cfg = tiny_cfg(*timm_opts(name))
    torch.manual_seed(0)
    student = build_model(cfg)
    attach_teacher(student, cfg, teacher=tiny_model(seed=2))
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    with torch.no_grad():
        assert len(student.eval()(tiny_batch())) == 2


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_a_dense_student_learns_from_a_teacher(kind):
    cfg = dense_cfg(kind, *timm_opts("convnext_atto", levels=LEVELS[1:], dense=True))
    torch.manual_seed(0)
    student = build_model(cfg)
    assert list(student.backbone.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    teacher = telling(build_model(dense_cfg(kind, stock=True)), 9)
    attach_teacher(student, cfg, teacher=teacher)
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


REFUSED = {
    "no name": ({"NAME": ""}, "MODEL.TIMM.NAME is empty"),
    "unknown": ({"NAME": "no_such_net"}, "MODEL.TIMM.NAME is 'no_such_net'.*list_models"),
    "one size": ({"NAME": "swin_tiny_patch4_window7_224"}, "can't read images of any size"),
    "multiples of 64": ({"NAME": "mobilevitv2_050"}, "mobilevitv2_050' gives res.* as .*, not"),
    "one scale": ({"NAME": "vit_tiny_patch16_224"}, "FPN.IN_FEATURES.*gives res4"),
    "a norm": ({"NAME": "resnet18", "NORM": "BN"}, "MODEL.TIMM.NORM is 'BN'.*'FrozenBN'"),
    "frozen": ({"NAME": "hrnet_w18_small", "FREEZE": 2}, "FREEZE_AT is 2.*set it to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_a_backbone_is_refused_with_the_key(case):
    settings, message = REFUSED[case]
    cfg = tiny_cfg(*timm_opts("resnet18"))
    cfg.MODEL.TIMM.NAME = settings["NAME"]
    cfg.MODEL.TIMM.NORM = settings.get("NORM", "")
    cfg.MODEL.BACKBONE.FREEZE_AT = settings.get("FREEZE", 0)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_backbone(cfg, ShapeSpec(channels=3))


def test_without_timm_there_is_one_clear_error(monkeypatch):
    cfg = tiny_cfg(*timm_opts("resnet18"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs timm.*pip install timm"):
        build_backbone(cfg)


def test_another_input_than_the_weights_were_trained_on_is_told(caplog):
    build_backbone(tiny_cfg(*timm_opts("resnet18")))
    assert not caplog.records
    build_backbone(tiny_cfg(*timm_opts("resnet18"), "INPUT.FORMAT", "BGR"))
    assert "timm's weights of resnet18 are for INPUT.FORMAT RGB" in caplog.text


def test_there_is_no_stock_config_of_it_to_export():
    with pytest.raises(ConfigError, match="TIMM.NAME is 'resnet18': stock detectron2 has no timm"):
        stock_config(tiny_cfg(*timm_opts("resnet18")), "w.pth")
