"""Students that were built without a yacs config."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from helpers import tiny_batch, tiny_cfg, tiny_model, train_losses
from omegaconf import OmegaConf
from test_dense import dense_cfg, telling
from test_lazy_teachers import NARROW, SIDES, TWO_FC

from crosskd_ifc import (
    ConfigError,
    CrossKDFCOS,
    CrossKDRCNN,
    CrossKDRetinaNet,
    CrossKDROIHeads,
    attach_teacher,
)

FUSION = {"NAME": "weighted", "IN_FEATURES": ["pool", "fc1"], "ROUTE": "through"}


@pytest.mark.parametrize("as_omegaconf", [False, True])
def test_settings_alone_do_what_the_config_does(as_omegaconf):
    prefix = "MODEL.CROSSKD."
    opts = [x for k, v in FUSION.items() for x in (f"{prefix}FUSION.{k}", v)]
    cfg = tiny_cfg(*opts, prefix + "LOSS.CLS_WEIGHT", 2.0)
    settings = {"FUSION": FUSION, "LOSS": {"CLS_WEIGHT": 2.0}}
    results = []
    for given in (cfg, OmegaConf.create(settings) if as_omegaconf else settings):
        student = tiny_model(tiny_cfg(), seed=1)
        attach_teacher(student, given, teacher=tiny_model(seed=2))
        results.append(train_losses(student.train(), tiny_batch())[0])
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def lazy_student(kind):
    name = {
        "RCNN": "common/models/mask_rcnn_fpn.py",
        "RetinaNet": "common/models/retinanet.py",
        "FCOS": "common/models/fcos.py",
    }[kind]
    model = LazyConfig.load(model_zoo.get_config_file(name)).model
    if kind == "RCNN":
        model._target_, model.roi_heads._target_ = CrossKDRCNN, CrossKDROIHeads
        overrides = [x.replace("model.", "", 1) for x in (*TWO_FC, *NARROW)]
        LazyConfig.apply_overrides(model, overrides)
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            model.roi_heads.pop(key)
        return model
    model._target_ = {"RetinaNet": CrossKDRetinaNet, "FCOS": CrossKDFCOS}[kind]
    model.num_classes = 3
    model.input_format = "BGR"
    return model


def stock_teacher(kind):
    if kind == "RCNN":
        return tiny_model(seed=2)
    sizes = [[x * 2 ** (i / 3) for i in range(3)] for x in SIDES]
    cfg = dense_cfg(kind, "MODEL.ANCHOR_GENERATOR.SIZES", sizes, stock=True)
    return telling(build_model(cfg), 9)


@pytest.mark.parametrize("kind", ["RCNN", "RetinaNet", "FCOS"])
def test_a_lazyconfig_student_distils(kind):
    torch.manual_seed(0)
    student = instantiate(lazy_student(kind))
    attach_teacher(student, {}, teacher=stock_teacher(kind))
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0
    sum(losses.values()).backward()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"FUSION": {"NAME": "no_such"}}, "^FUSION.NAME is 'no_such'"),
        ({"FUSION": {"NAMES": "mean"}}, "settings of the distillation: .*NAMES"),
        ({"LOSS": {"CLS_WEIGHT": "much"}}, "settings of the distillation"),
        ({"LOSS": 3}, "LOSS"),
        ({"FUSION": {"IN_FEATURES": ["fc9"]}}, "^FUSION.IN_FEATURES.*no layer 'fc9'"),
        ({"IMPORTS": ["own.py"]}, "IMPORTS is for YAML configs"),
        ({}, "^TEACHER.CONFIG_FILE is empty"),
    ],
)
def test_mistakes_name_the_setting_as_it_was_given(settings, message):
    teacher = tiny_model(seed=2) if settings else None
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        attach_teacher(tiny_model(), settings, teacher=teacher)


def test_a_student_without_a_channel_order_is_refused():
    student = tiny_model()
    student.input_format = None
    with pytest.raises(ConfigError, match="no input_format"):
        attach_teacher(student, {}, teacher=tiny_model())
