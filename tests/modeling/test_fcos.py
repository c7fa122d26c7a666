"""FCOS from a yacs config: the same detector as detectron2's."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.meta_arch import fcos
from helpers import tiny_batch, train_losses

from crosskd_ifc import FCOS, add_crosskd_ifc_config


def fcos_cfg(*opts):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "FCOS",
        "MODEL.BACKBONE.NAME": "build_crosskd_fcos_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    }
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    cfg.merge_from_list(list(opts))
    return cfg


TINY = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.FCOS.NUM_CLASSES", 3, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0),
)


@pytest.fixture(scope="module")
def both():
    """(from LazyConfig, from yacs with its weights), in evaluation mode."""
    lazy = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    lazy.test_score_thresh = 0.0  # random weights score low
    torch.manual_seed(0)
    theirs = instantiate(lazy).eval()
    ours = build_model(fcos_cfg("MODEL.FCOS.SCORE_THRESH_TEST", 0.0)).eval()
    assert type(ours) is FCOS and isinstance(ours, fcos.FCOS)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_weights_of_detectron2s_fcos_load_and_give_the_same_detections(both):
    batch = tiny_batch()
    with torch.no_grad():
        for a, b in zip(*(m(batch) for m in both)):
            a, b = a["instances"], b["instances"]
            assert len(a) == len(b) > 0
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_all_settings_are_those_of_detectron2s_config(both):
    theirs, ours = both
    for name, value in vars(theirs).items():
        if isinstance(value, (int, float, str, list)) and not name.startswith("_"):
            assert getattr(ours, name) == value, name


def test_the_losses_are_those_of_detectron2s_fcos(both):
    batch = tiny_batch()
    results = [train_losses(m.train(), batch)[0] for m in both]
    assert list(results[0]) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])


def test_it_learns_from_a_yacs_config_alone():
    torch.manual_seed(0)
    model = build_model(fcos_cfg(*TINY)).train()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05)
    history = []
    for _ in range(15):
        loss = sum(train_losses(model, tiny_batch())[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item() * model.loss_normalizer)  # a moving average, which falls
    assert history[-1] < 0.9 * history[0]
    model.eval()
    assert all(len(x["instances"]) for x in model(tiny_batch()))


def test_it_trains_under_mixed_precision_with_nearly_the_same_losses():
    torch.manual_seed(0)
    model = build_model(fcos_cfg(*TINY)).train()
    expected, _ = train_losses(model, tiny_batch())
    del model.loss_normalizer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = train_losses(model, tiny_batch())
    for key, value in losses.items():
        assert value.item() == pytest.approx(expected[key].item(), rel=0.05), key
    sum(losses.values()).backward()
    assert model.head.bbox_pred.weight.grad.abs().sum() > 0


def test_a_config_with_the_backbones_old_name_loads_beside_another_project_that_registers_it():
    old = "build_fcos_resnet_fpn_backbone"
    assert old not in BACKBONE_REGISTRY

    @BACKBONE_REGISTRY.register()
    def build_fcos_resnet_fpn_backbone(cfg, input_shape):
        raise AssertionError("another project's")

    try:
        model = build_model(fcos_cfg(*TINY, "MODEL.BACKBONE.NAME", old))
    finally:
        del BACKBONE_REGISTRY._obj_map[old]
    expected = build_model(fcos_cfg(*TINY)).state_dict()
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in expected.items()
    ]
