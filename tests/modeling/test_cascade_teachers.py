"""A Cascade R-CNN as the teacher of a plain student."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import pair
from test_lazy_teachers import NARROW

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.distillation.teacher import TeacherPass
from crosskd_ifc.weights.strict import StrictReader

T = "MODEL.CROSSKD.TEACHER."
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    # No stage encodes boxes as the plain head does.
    *("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", tuple((x,) * 4 for x in (11.0, 20.0, 30.0))),
)
OWN = ("MODEL.CROSSKD.MIMIC", "student_head")
stages = pytest.mark.parametrize("stage", [1, 2, 3])


def cascade(*opts, seed=2):
    return tiny_model(tiny_cfg(*CASCADE, *opts), seed=seed).eval()


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


def test_by_default_the_mean_of_all_stages_teaches():
    found, wanted = (
        train_losses(distilling(*opts, teacher=cascade())[0], tiny_batch())[0]
        for opts in ((), (T + "STAGE", "mean"))
    )
    assert set(found) == set(wanted) and "loss_cls_kd" in found
    assert all(torch.equal(found[key], wanted[key]) for key in found)


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
@pytest.mark.parametrize("box_type", ["l1", "giou"])
def test_boxes_are_compared_as_the_students_transform_encodes_them(stage, box_type):
    teacher = cascade()
    opts = (T + "STAGE", stage, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    cfg = tiny_cfg(*OWN, *opts, "MODEL.CROSSKD.LOSS.BOX_TYPE", box_type)
    student = tiny_model(cfg, seed=5)
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    heads = teacher.roi_heads
    student.roi_heads.box_head.load_state_dict(heads.box_head[stage - 1].state_dict())
    predictor = heads.box_predictor[stage - 1]
    student.roi_heads.box_predictor.load_state_dict(predictor.state_dict())
    own = student.roi_heads.box_predictor
    ratio = torch.tensor(own.box2box_transform.weights) / predictor.box2box_transform.weights[0]
    with torch.no_grad():  # the same boxes in the student's encoding
        own.bbox_pred.weight *= ratio.view(-1, 1)
        own.bbox_pred.bias *= ratio
    attach_teacher(student, cfg, teacher=teacher)
    assert train_losses(student.train(), tiny_batch())[0]["loss_box_reg_kd"] <= 1e-5


@pytest.mark.parametrize("opts", [(), ("MODEL.CROSSKD.MIMIC", "both")])
def test_the_mean_of_all_stages_is_that_of_their_losses(opts):
    def losses(stage):
        student, _ = distilling(T + "STAGE", stage, *opts, teacher=cascade())
        found = train_losses(student, tiny_batch())[0]
        return {k: v for k, v in found.items() if k.endswith("_kd")}

    found, single = losses("mean"), [losses(stage) for stage in (1, 2, 3)]
    assert set(found) == {"loss_cls_kd", "loss_box_reg_kd"}
    for key, value in found.items():
        torch.testing.assert_close(value, sum(x[key] for x in single) / 3)


def test_the_students_own_scores_learn_the_mean_of_the_stages_scores():
    student, teacher = distilling(T + "STAGE", "mean", *OWN, teacher=cascade())
    batch = tiny_batch()
    loss = train_losses(student, batch)[0]["loss_cls_kd"]
    predictor = student.roi_heads.box_predictor.cls_score.weight
    (found,) = torch.autograd.grad(loss, predictor)
    torch.manual_seed(0)
    with EventStorage(), student.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    (seen,), run = heads.stages, TeacherPass(student.teacher, batch)
    parts = student.distiller.box.parts
    answers = [part.predict(run, seen.boxes)[0].logits for part in parts]
    mean = torch.stack([(x / 3).softmax(dim=1) for x in answers]).mean(dim=0)
    divergence = (mean * (mean.log() - (seen.logits / 3).log_softmax(dim=1))).sum()
    (wanted,) = torch.autograd.grad(0.5 * 9 * divergence / len(seen.logits), predictor)
    torch.testing.assert_close(found, wanted)


def test_all_stages_read_one_pooled_map_and_learn_adapters_of_their_own():
    student, teacher = distilling(
        *(T + "STAGE", "mean", "MODEL.CROSSKD.FUSION.NAME", "mean"),
        *("MODEL.CROSSKD.FUSION.IN_FEATURES", ("pool", "fc2")),
        teacher=cascade(),
    )
    calls = []
    teacher.roi_heads.box_pooler.register_forward_hook(lambda *_: calls.append(1))
    sum(train_losses(student, tiny_batch())[0].values()).backward()
    assert len(calls) == 1
    for k in range(3):
        adapter = student.get_parameter(f"fusion.stage{k}.adapters.pool.1.weight")
        assert adapter.grad.abs().sum() > 0


def test_a_cascade_mask_rcnn_teaches_masks_too():
    mask = (
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    )
    student, _ = distilling(*mask, teacher=cascade(*mask))
    assert train_losses(student, tiny_batch(masks=True))[0]["loss_mask_kd"] > 0


def test_the_cross_head_detects():
    for stage in (3, "mean"):
        student, _ = distilling(T + "STAGE", stage, teacher=cascade())
        assert len(student.eval().cross_head_inference(tiny_batch())) == 2


def lazy_cascade():
    """The model node of detectron2's LazyConfig of a Cascade Mask R-CNN, narrowed."""
    cfg = LazyConfig.load(model_zoo.get_config_file("common/models/cascade_rcnn.py"))
    widths = [x for x in NARROW if ".box_" not in x]
    LazyConfig.apply_overrides(cfg, [*widths, "model.roi_heads.mask_head.input_shape.channels=32"])
    for head, predictor in zip(cfg.model.roi_heads.box_heads, cfg.model.roi_heads.box_predictors):
        head.input_shape.channels, head.fc_dims = 32, [16, 16]
        predictor.input_shape.channels = 16
    return cfg.model


def test_a_cascade_from_lazyconfig_teaches():
    torch.manual_seed(0)
    student, _ = distilling(T + "STAGE", 2, teacher=instantiate(lazy_cascade()))
    assert train_losses(student, tiny_batch())[0]["loss_cls_kd"] > 0


def test_a_stage_that_is_not_there_is_refused_before_the_download(monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(StrictReader, "load", no_download)
    name = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
    cfg = tiny_cfg(T + "CONFIG_FILE", name, T + "STAGE", 4, T + "CLASS_MAP", ("teacher",))
    with pytest.raises(ConfigError, match="TEACHER.STAGE is 4.*the stages 1 to 3"):
        attach_teacher(build_model(cfg), cfg)


@pytest.mark.parametrize("stage", [0, -1, 2, "mean", True])
def test_a_teacher_with_one_head_has_stage_1_only(stage):
    with pytest.raises(ConfigError, match=f"TEACHER.STAGE is {stage!r}.*one box head: 1"):
        distilling(T + "STAGE", stage)


@pytest.mark.parametrize("stage", ["median", 0, 4, 1.0])
def test_a_stage_is_a_number_or_mean(stage):
    with pytest.raises(ConfigError, match=f"TEACHER.STAGE is {stage!r}.*1 to 3, and 'mean'"):
        distilling(T + "STAGE", stage, teacher=cascade())


def test_a_dense_student_has_no_stage():
    with pytest.raises(ConfigError, match="TEACHER.STAGE is 2, but.*dense"):
        pair("FCOS", T + "STAGE", 2)


def test_its_heads_are_not_a_plain_students_to_inherit():
    with pytest.raises(ConfigError, match="INHERIT.*the teacher has none"):
        distilling("MODEL.CROSSKD.INHERIT", ("roi_heads.box_predictor",), teacher=cascade())
