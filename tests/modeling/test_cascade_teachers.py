"""A Cascade R-CNN as the teacher of a plain student."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import pair
from test_lazy_teachers import NARROW

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.distillation.teacher import TeacherPass
from crosskd_ifc.weights.reading import StrictReader

T = "MODEL.CROSSKD.TEACHER."
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    # No stage encodes boxes as the plain head does.
    *("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", tuple((x,) * 4 for x in (11.0, 20.0, 30.0))),
)
stages = pytest.mark.parametrize("stage", [1, 2, 3])


def cascade(*opts, seed=2):
    torch.manual_seed(seed)
    model = build_model(tiny_cfg(*CASCADE, *opts))
    plain = tiny_model(seed=seed)
    model.backbone.load_state_dict(plain.backbone.state_dict())
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    return model.eval()


@stages
def test_the_stage_that_teaches_is_the_stock_models_and_gets_no_gradient(stage):
    teacher = cascade()
    student, _ = distilling(T + "STAGE", stage, teacher=teacher)
    batch = tiny_batch()
    boxes = [x["instances"].gt_boxes for x in batch]
    found, _ = student.distiller.box.predict(TeacherPass(student.teacher, batch), boxes)
    heads = teacher.roi_heads
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(batch).tensor)
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
        wanted = heads.box_predictor[stage - 1](heads.box_head[stage - 1](pooled))
    assert torch.equal(found.logits, wanted[0]) and torch.equal(found.deltas, wanted[1])
    losses, _ = train_losses(student, batch)
    assert losses["loss_cls_kd"] > 0 and losses["loss_box_reg_kd"] > 0
    sum(losses.values()).backward()
    assert student.roi_heads.box_head.fc1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


@stages
@pytest.mark.parametrize("taps, entry", [(("fc2",), "fc2"), (("pool",), "pool")])
def test_a_student_with_the_stages_own_head_has_no_loss(stage, taps, entry):
    teacher = cascade()
    prefix = "MODEL.CROSSKD.FUSION."
    cfg = tiny_cfg(
        *(T + "STAGE", stage, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        *(prefix + "NAME", "none", prefix + "IN_FEATURES", taps, prefix + "ENTRY", entry),
    )
    student = tiny_model(cfg, seed=5)
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    heads = teacher.roi_heads
    student.roi_heads.box_head.load_state_dict(heads.box_head[stage - 1].state_dict())
    attach_teacher(student, cfg, teacher=teacher)
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] <= 1e-5 and losses["loss_box_reg_kd"] <= 1e-5


@stages
def test_the_students_own_boxes_are_compared_decoded(stage):
    agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    own = (T + "STAGE", stage, "MODEL.CROSSKD.MIMIC", "student_head", *agnostic)
    student, _ = distilling(*own, "MODEL.CROSSKD.LOSS.BOX_TYPE", "giou", teacher=cascade())
    assert train_losses(student, tiny_batch())[0]["loss_box_reg_kd"] > 0
    with pytest.raises(ConfigError, match="BBOX_REG_WEIGHTS is .*use 'giou'"):
        distilling(*own, teacher=cascade())


def test_a_cascade_mask_rcnn_teaches_masks_too():
    mask = (
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    )
    student, _ = distilling(*mask, teacher=cascade(*mask))
    assert train_losses(student, tiny_batch(masks=True))[0]["loss_mask_kd"] > 0


def test_the_cross_head_detects():
    student, _ = distilling(T + "STAGE", 3, teacher=cascade())
    assert len(student.eval().cross_head_inference(tiny_batch())) == 2


def test_a_cascade_from_lazyconfig_teaches():
    cfg = LazyConfig.load(model_zoo.get_config_file("common/models/cascade_rcnn.py"))
    widths = [x for x in NARROW if ".box_" not in x]
    LazyConfig.apply_overrides(cfg, [*widths, "model.roi_heads.mask_head.input_shape.channels=32"])
    for head, predictor in zip(cfg.model.roi_heads.box_heads, cfg.model.roi_heads.box_predictors):
        head.input_shape.channels, head.fc_dims = 32, [16, 16]
        predictor.input_shape.channels = 16
    torch.manual_seed(0)
    student, _ = distilling(T + "STAGE", 2, teacher=instantiate(cfg.model))
    assert train_losses(student, tiny_batch())[0]["loss_cls_kd"] > 0


def test_a_stage_that_is_not_there_is_refused_before_the_download(monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(StrictReader, "load", no_download)
    name = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
    cfg = tiny_cfg(T + "CONFIG_FILE", name, T + "STAGE", 4, T + "CLASS_MAP", ("teacher",))
    with pytest.raises(ConfigError, match="TEACHER.STAGE is 4.*the stages 1 to 3"):
        attach_teacher(build_model(cfg), cfg)


@pytest.mark.parametrize("stage", [0, -1, 2])
def test_a_teacher_with_one_head_has_stage_1_only(stage):
    with pytest.raises(ConfigError, match=f"TEACHER.STAGE is {stage}.*set it to 1"):
        distilling(T + "STAGE", stage)


def test_a_dense_student_has_no_stage():
    with pytest.raises(ConfigError, match="TEACHER.STAGE is 2, but.*dense"):
        pair("FCOS", T + "STAGE", 2)


def test_its_heads_are_not_a_plain_students_to_inherit():
    with pytest.raises(ConfigError, match="INHERIT.*the teacher has none"):
        distilling("MODEL.CROSSKD.INHERIT", ("roi_heads.box_predictor",), teacher=cascade())
