"""torchvision's ResNets as detectron2 backbones."""

import logging
import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_resnet_backbone

from crosskd_ifc.weights import convert
from crosskd_ifc.weights.reading import save_safetensors

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"
ARCHITECTURES = {
    "fpn": ("GeneralizedRCNN", "build_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"]),
    "retinanet": ("RetinaNet", "build_retinanet_resnet_fpn_backbone", ["res3", "res4", "res5"]),
    "c4": ("GeneralizedRCNN", "build_resnet_backbone", ["res4"]),
}


def torchvision_model(depth):
    """A model in which nothing, running statistics neither, is at its initial value."""
    torch.manual_seed(depth)
    model = getattr(torchvision.models, f"resnet{depth}")().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@torch.no_grad()
def torchvision_features(model, picture, size):
    """The stages' outputs for an RGB picture (uint8, C x H x W), padded as detectron2 pads."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (picture / 255 - mean) / std
    padding = (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])
    x = torch.nn.functional.pad(x, padding)[None]
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = {}
    for i in range(1, 5):
        x = features[f"res{i + 1}"] = getattr(model, f"layer{i}")(x)
    return features


def detector(config, kind="fpn", opts=()):
    """A detector with narrow heads, of the keys that the conversion says the weights need."""
    cfg = get_cfg()
    architecture, backbone, features = ARCHITECTURES[kind]
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = architecture, backbone
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    if kind != "c4":
        cfg.MODEL.FPN.IN_FEATURES = features
        cfg.MODEL.FPN.OUT_CHANNELS = 8
    if kind == "fpn":
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.RPN.IN_FEATURES = ["p2"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    cfg.merge_from_other_cfg(config)
    cfg.merge_from_list(opts)
    return build_model(cfg)


def load(model, path):
    """Load as training does; returns what the checkpointer finds missing and unexpected."""

    class Recorder(DetectionCheckpointer):
        def _load_model(self, checkpoint):
            self.incompatible = super()._load_model(checkpoint)
            return self.incompatible

    checkpointer = Recorder(model)
    checkpointer.load(str(path))
    return checkpointer.incompatible


@pytest.fixture
def source(tmp_path):
    """Returns a function that writes a torchvision model and returns (model, path)."""

    def write(depth):
        model = torchvision_model(depth)
        torch.save(model.state_dict(), tmp_path / "torchvision.pth")
        return model, str(tmp_path / "torchvision.pth")

    return write


@pytest.mark.parametrize("depth", [18, 50])
def test_features_are_those_of_torchvision(source, tmp_path, depth):
    original, path = source(depth)
    # Not a multiple of 32: padding must stay exact, too.
    rgb = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    wanted = torchvision_features(original, rgb, size=(64, 96))
    assert all(feature.std() > 0.01 for feature in wanted.values())
    done = convert.convert_file(path, str(tmp_path / "out.pth"))
    assert done.depth == depth and done.config.INPUT.FORMAT == "RGB"
    model = detector(done.config).eval()
    incompatible = load(model, tmp_path / "out.pth")
    assert not [k for k in incompatible.missing_keys if "bottom_up" in k]
    with torch.no_grad():
        found = model.backbone.bottom_up(model.preprocess_image([{"image": rgb}]).tensor)
    assert found.keys() == wanted.keys()
    for name, feature in wanted.items():
        assert (found[name] - feature).abs().max() / feature.abs().max() < 1e-5, name


@pytest.mark.parametrize("kind", ["retinanet", "c4"])
def test_one_file_fills_other_architectures_without_a_warning(source, tmp_path, kind, monkeypatch):
    # A C4 model's res5 is part of the ROI heads, and always made of bottlenecks.
    original, path = source(50 if kind == "c4" else 18)
    done = convert.convert_file(path, str(tmp_path / "out.pth"))
    model = detector(done.config, kind)
    warnings = []
    logger = logging.getLogger("detectron2.checkpoint.c2_model_loading")
    monkeypatch.setattr(logger, "warning", warnings.append)
    incompatible = load(model, done.config.MODEL.WEIGHTS)
    assert not warnings
    assert not incompatible.unexpected_keys and not incompatible.incorrect_shapes
    assert not [k for k in incompatible.missing_keys if "stem." in k or ".res" in k]
    res5 = model.roi_heads.res5 if kind == "c4" else model.backbone.bottom_up.res5
    assert torch.equal(res5[1].conv2.weight, original.layer4[1].conv2.weight)
    assert torch.equal(res5[1].conv2.norm.running_var, original.layer4[1].bn2.running_var)


def test_training_batchnorm_takes_the_file_too(source, tmp_path):
    _, path = source(18)
    done = convert.convert_file(path, str(tmp_path / "out.pth"))
    model = detector(done.config, opts=["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0])
    incompatible = load(model, done.config.MODEL.WEIGHTS)
    assert not [k for k in incompatible.missing_keys if "bottom_up" in k]


@pytest.mark.parametrize("depth", convert.DEPTHS)
def test_depth_is_recognised_and_every_shape_fits(depth):
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).state_dict()
    found, weights = convert.convert_resnet(state)
    assert found == depth
    with torch.device("meta"):
        cfg = get_cfg()
        cfg.merge_from_other_cfg(convert.required_config(depth))
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert not convert.describe_mismatch(weights, backbone.state_dict())


def test_means_and_stds_are_torchvisions_on_the_scale_of_bytes():
    rgb = convert.required_config(18)
    assert rgb.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert rgb.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_other_networks_are_refused_with_the_differences():
    with torch.device("meta"):
        resnext = torchvision.models.resnext50_32x4d().state_dict()
        shorter = torchvision.models.resnet34().state_dict()
    with pytest.raises(ValueError, match=r"ResNet-50; of another shape: layer1.0.conv1.weight"):
        convert.convert_resnet(resnext)
    del shorter["layer3.5.bn2.bias"]
    shorter["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"-34; missing: layer3.5.bn2.bias; unexpected: extra"):
        convert.convert_resnet(shorter)
    with pytest.raises(ValueError, match="not a state dict"):
        convert.convert_resnet({"model": shorter})


def test_unreadable_files_are_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "out.pth"
    (tmp_path / "junk.pth").write_bytes(b"not torch")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    for name in ("junk.pth", "module.pth"):
        with pytest.raises(ValueError, match=f"{name}: torch can't read it"):
            convert.convert_file(str(tmp_path / name), str(out))
    with pytest.raises(FileNotFoundError, match="missing.pth: no such file"):
        convert.convert_file(str(tmp_path / "missing.pth"), str(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junk.pth", "module.pth"]


def test_nothing_is_overwritten_unless_forced(source, tmp_path):
    _, path = source(18)
    out = tmp_path / "out.pth"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        convert.convert_file(path, str(out))
    assert out.read_text() == "mine"
    with pytest.raises(FileExistsError, match="the input"):
        convert.convert_file(path, path, force=True)
    with pytest.raises(ValueError, match="must end in .pth"):
        convert.convert_file(path, str(tmp_path / "out.pkl"))
    convert.convert_file(path, str(out), force=True)
    assert torch.load(out, weights_only=True)["matching_heuristics"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pth", "torchvision.pth"]


@pytest.mark.parametrize("held_as", ["safetensors", "model", "state_dict"])
def test_weights_held_by_another_file_are_those_of_the_state_dict(held_as, tmp_path):
    state = torchvision_model(18).state_dict()
    sources = str(tmp_path / "alone.pth"), str(tmp_path / f"held.{held_as}")
    torch.save(state, sources[0])
    if held_as == "safetensors":
        save_safetensors(state, sources[1])
    else:
        torch.save({held_as: state, "epoch": 3}, sources[1])
    outs = [str(tmp_path / name) for name in ("a.pth", "b.pth")]
    done = [convert.convert_file(source, out) for source, out in zip(sources, outs)]
    assert done[0].found == done[1].found and set(done[0].dropped) == set(done[1].dropped)
    wanted, found = (torch.load(out, weights_only=True)["model"] for out in outs)
    assert list(found) and all(torch.equal(found[k], v) for k, v in wanted.items())


def test_script_prints_depth_and_the_keys_to_set(source, tmp_path, capsys):
    _, path = source(18)
    main = runpy.run_path(str(SCRIPT))["main"]
    out = tmp_path / "new" / "R-18.pth"
    assert main([path, str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Found a torchvision ResNet-18" in printed and str(out) in printed
    (tmp_path / "keys.yaml").write_text(printed[printed.index("INPUT:") :])
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "keys.yaml"), allow_unsafe=False)
    assert cfg.MODEL.RESNETS.RES2_OUT_CHANNELS == 64 and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert (cfg.INPUT.FORMAT, cfg.MODEL.WEIGHTS) == ("RGB", str(out))
    assert main([path, str(out)]) == 1
    assert capsys.readouterr().err.startswith("convert_weights: ")
