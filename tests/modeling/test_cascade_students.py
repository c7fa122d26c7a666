"""A Cascade R-CNN as the student: every stage learns from the teacher's."""

import copy

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from helpers import tiny_batch, tiny_cfg, tiny_model, train_losses
from test_cascade_teachers import CASCADE, OWN, T, cascade, lazy_cascade
from test_rcnn import assert_same_detector, assert_same_predictions, fusion, gradients

from crosskd_ifc import ConfigError, CrossKDCascadeROIHeads, CrossKDRCNN, attach_teacher
from crosskd_ifc.distillation import losses
from crosskd_ifc.distillation.teacher import TeacherPass
from crosskd_ifc.modeling import summary
from crosskd_ifc.weights.stock import stock_config

HEADS = ("MODEL.ROI_HEADS.NAME", "CrossKDCascadeROIHeads")
MASK = (
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
)
KEYS = [f"loss_{x}_stage{k}" for k in range(3) for x in ("cls", "box_reg")]
KD_KEYS = [f"{key}_kd" for key in KEYS]
# Learned adapters for each stage.
POOL_AND_FC1 = fusion("mean", ("pool", "fc1"), "fc2")


def student_cfg(*opts):
    return tiny_cfg(*CASCADE, *HEADS, *opts)


def stock():
    return tiny_model(tiny_cfg(*CASCADE, architecture="GeneralizedRCNN"), seed=1)


def pair(*opts, teacher=None):
    cfg = student_cfg(*opts)
    student = tiny_model(cfg, seed=1)
    teacher = cascade() if teacher is None else teacher
    attach_teacher(student, cfg, teacher=teacher)
    return student.train(), teacher


def twin(*opts):
    """A student that is its own teacher."""
    cfg = student_cfg(*opts)
    student = tiny_model(cfg, seed=1)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    return student.train()


def recorded(student, batch):
    torch.manual_seed(0)
    with EventStorage(), student.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    return heads.stages


@pytest.mark.parametrize(
    "opts",
    [
        fusion("none", ("fc2",)),
        fusion("none", ("pool",), "pool"),
        fusion("mean", ("pool", "fc1", "fc2"), route="through"),
        OWN,
        (*OWN, "MODEL.CROSSKD.LOSS.BOX_TYPE", "giou"),
    ],
)
def test_a_student_that_is_its_own_teacher_has_no_loss_in_any_stage(opts):
    found, _ = train_losses(twin(*opts), tiny_batch())
    assert [k for k in found if k.endswith("_kd")] == KD_KEYS
    assert all(abs(found[key]) <= 1e-5 for key in KD_KEYS)


def test_without_a_teacher_the_model_is_stock_cascade_bit_for_bit():
    assert_same_detector(stock(), tiny_model(student_cfg(), seed=1))


def test_with_distillation_disabled_the_model_is_stock_cascade_bit_for_bit():
    student, _ = pair("MODEL.CROSSKD.ENABLED", False)
    assert_same_detector(stock(), student)


def test_with_a_teacher_evaluation_is_stock_cascade_bit_for_bit():
    student, _ = pair()
    assert_same_predictions(stock(), student)


def test_zero_weights_give_the_stock_gradient_and_zeros_on_the_adapters_of_each_stage():
    off = ("MODEL.CROSSKD.LOSS.CLS_WEIGHT", 0.0, "MODEL.CROSSKD.LOSS.BOX_WEIGHT", 0.0)
    student, _ = pair(*off, *POOL_AND_FC1)
    ours, theirs = (gradients(m, tiny_batch()) for m in (student, stock().train()))
    for name, gradient in theirs.items():
        assert torch.equal(ours.pop(name), gradient), name
    assert {name.split(".")[1] for name in ours} == {"stage0", "stage1", "stage2"}
    assert all(torch.count_nonzero(g) == 0 for g in ours.values())


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("boxes, rois", [((0, 0), 16), ((2, 3), 16), ((2, 3), 0)])
@pytest.mark.parametrize("teacher", [cascade, lambda: tiny_model(seed=2)], ids=["cascade", "plain"])
def test_every_trainable_parameter_gets_a_finite_gradient(teacher, boxes, rois, factor):
    student, _ = pair(*POOL_AND_FC1, teacher=teacher())
    student.kd_factor, student.roi_heads.batch_size_per_image = factor, rois
    found, _ = train_losses(student, tiny_batch(boxes_per_image=boxes))
    assert [k for k in found if k.endswith("_kd")] == KD_KEYS
    assert rois and factor or all(found[key] == 0 for key in KD_KEYS)
    for name, gradient in gradients(student, tiny_batch(boxes_per_image=boxes)).items():
        assert gradient is not None and torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("is_plain", [False, True], ids=["cascade", "plain"])
def test_each_stage_learns_on_its_own_rois_from_the_teachers_head_of_the_same_stage(is_plain):
    teacher = tiny_model(seed=2) if is_plain else cascade()
    student, _ = pair(*fusion("none", ("fc2",)), teacher=teacher)
    batch, heads = tiny_batch(), teacher.roi_heads
    found, _ = train_losses(student, batch)
    with torch.no_grad():
        levels = teacher.backbone(teacher.preprocess_image(batch).tensor)
        levels = [levels[name] for name in heads.box_in_features]
    stages = recorded(student, batch)
    rois = [torch.cat([b.tensor for b in seen.boxes]) for seen in stages]
    assert not any(torch.equal(rois[0], x) for x in rois[1:])
    for k, seen in enumerate(stages):
        head, predictor = heads.box_head, heads.box_predictor
        if not is_plain:
            head, predictor = head[k], predictor[k]
        with torch.no_grad():
            t, b = predictor(head(heads.box_pooler(levels, seen.boxes)))
        z, d = predictor(seen.layers["fc2"])
        kl = losses.kl_divergence(z, t, temperature=3.0, normalizer=len(t))
        torch.testing.assert_close(found[f"loss_cls_stage{k}_kd"], 0.5 * kl)
        wanted = losses.confident_l1(d, b, t)
        torch.testing.assert_close(found[f"loss_box_reg_stage{k}_kd"], wanted)


def test_the_gradient_reaches_each_stages_head_but_no_predictor_and_not_the_teacher():
    student, teacher = pair(*POOL_AND_FC1)
    found, _ = train_losses(student, tiny_batch())
    sum(found[key] for key in KD_KEYS).backward()
    touched = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    for k in range(3):
        assert f"roi_heads.box_head.{k}.fc1.weight" in touched
        assert f"fusion.stage{k}.adapters.pool.1.weight" in touched
    assert not any(n.startswith(("roi_heads.box_predictor", "proposal_generator")) for n in touched)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_pooled_map_brings_the_pyramid_a_third_of_its_gradient_as_stock_cascade_has_it():
    student, _ = pair(*fusion("none", ("pool",), "pool"))
    batch = tiny_batch()
    torch.manual_seed(0)
    pooled = []
    student.roi_heads.box_pooler.register_forward_hook(lambda m, i, output: pooled.append(output))
    with EventStorage(), student.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    for x, seen in zip(pooled, heads.stages):
        (gradient,) = torch.autograd.grad(seen.layers["pool"].sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.full_like(x, 1 / 3))


def test_one_pooling_and_one_head_pass_for_each_stage_of_each_network():
    student, teacher = pair(*fusion("none", ("fc2",)), "MODEL.CROSSKD.MIMIC", "both")
    calls = []
    for model in (student, teacher):
        heads = model.roi_heads
        for part in (heads.box_pooler, *(head.fc1 for head in heads.box_head)):
            part.register_forward_hook(lambda module, *_: calls.append(module))
    train_losses(student, tiny_batch())
    for model in (student, teacher):
        assert sum(x is model.roi_heads.box_pooler for x in calls) == 3
    assert len(calls) == 12


def test_what_the_cross_head_of_a_twin_detects_is_what_the_cascade_detects():
    student = twin(*fusion("none", ("fc2",))).eval()
    batch = tiny_batch()
    with torch.no_grad():
        for a, b in zip(student.cross_head_inference(batch), student(batch)):
            a, b = a["instances"], b["instances"]
            assert len(a) == len(b) > 0
            torch.testing.assert_close(a.scores, b.scores)
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_a_cascade_mask_rcnn_learns_masks_too():
    student, _ = pair(*MASK, teacher=cascade(*MASK))
    found, _ = train_losses(student, tiny_batch(masks=True))
    assert [k for k in found if k.endswith("_kd")] == [*KD_KEYS, "loss_mask_kd"]
    assert all(found[k] > 0 for k in found if k.endswith("_kd"))
    same = twin(*MASK, *fusion("none", ("fc2",)))
    assert train_losses(same, tiny_batch(masks=True))[0]["loss_mask_kd"] <= 1e-5


def test_a_cascade_from_lazyconfig_learns():
    model = lazy_cascade()
    torch.manual_seed(0)
    teacher = instantiate(model)
    model._target_, model.roi_heads._target_ = CrossKDRCNN, CrossKDCascadeROIHeads
    student = instantiate(model)
    attach_teacher(student, {"FUSION": {"IN_FEATURES": ("pool", "fc1")}}, teacher=teacher)
    found, _ = train_losses(student.train(), tiny_batch(masks=True))
    assert [k for k in found if k.endswith("_kd")] == [*KD_KEYS, "loss_mask_kd"]
    assert all(found[k] > 0 for k in found if k.endswith("_kd"))


def test_statistics_are_of_each_stage():
    _, storage = train_losses(twin(*fusion("none", ("fc2",))), tiny_batch(), iteration=19)
    for k in range(3):
        for name in ("agreement_cross_head", "agreement_student"):
            assert storage.latest()[f"crosskd/{name}_stage{k}"][0] == 1


def test_the_log_says_what_enters_which_stage(monkeypatch):
    monkeypatch.setattr(summary, "count_flops", lambda model: 0.0)  # which takes seconds
    text = summary.describe_distillation(pair(*POOL_AND_FC1)[0], student_cfg(*POOL_AND_FC1))
    for k in range(3):
        assert f"cross-head stage{k}  pool (8x7x7), fc1 (16) -> direct" in text
        assert f"the teacher's fc2 (16) of stage {k + 1} -> its predictor" in text


@pytest.mark.parametrize("stage", [1, "mean"])
def test_a_stage_of_the_teacher_cannot_be_chosen(stage):
    with pytest.raises(ConfigError, match=f"TEACHER.STAGE is {stage!r}.*Cascade R-CNN.*null"):
        pair(T + "STAGE", stage)


def test_a_teacher_with_another_number_of_stages_is_refused():
    two = (
        *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6)),
        *("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", ((10.0,) * 4, (20.0,) * 4)),
    )
    with pytest.raises(
        ConfigError, match="ROI_BOX_CASCADE_HEAD.IOUS.*3 stages.*2.*make them equal"
    ):
        pair(teacher=cascade(*two))


def test_a_stock_cascade_student_is_refused_naming_what_to_use():
    cfg = tiny_cfg(*CASCADE)
    with pytest.raises(ConfigError, match="ROI_HEADS.NAME.*use .*CrossKDCascadeROIHeads"):
        attach_teacher(tiny_model(cfg), cfg, teacher=cascade())


def test_heads_and_predictors_of_all_stages_can_be_inherited():
    prefixes = ("roi_heads.box_head", "roi_heads.box_predictor")
    order = (T + "CLASS_MAP", ((0, 2), (1, 0), (2, 1)))
    student, teacher = pair("MODEL.CROSSKD.INHERIT", prefixes, *order)
    student.inherit_weights()
    ours, theirs = student.roi_heads, teacher.roi_heads
    for k in range(3):
        assert torch.equal(ours.box_head[k].fc1.weight, theirs.box_head[k].fc1.weight)
        a, b = (h.box_predictor[k] for h in (ours, theirs))
        assert torch.equal(a.cls_score.weight, b.cls_score.weight[[2, 0, 1, 3]])
        assert torch.equal(a.bbox_pred.weight, b.bbox_pred.weight)


def test_predictors_of_unlike_encodings_are_not_inherited():
    other = (
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        tuple((x,) * 4 for x in (1.0, 2.0, 3.0)),
    )
    with pytest.raises(ConfigError, match="INHERIT.*box_predictor.0.bbox_pred.*BBOX_REG_WEIGHTS"):
        pair(
            "MODEL.CROSSKD.INHERIT",
            ("roi_heads.box_predictor.0.bbox_pred",),
            teacher=cascade(*other),
        )


def test_the_stock_config_of_a_student_has_stock_heads():
    assert stock_config(student_cfg(), "x.pth").MODEL.ROI_HEADS.NAME == "CascadeROIHeads"


def test_under_autocast_every_loss_is_float32_and_finite():
    student, _ = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = train_losses(student, tiny_batch())
    for key in KD_KEYS:
        assert found[key].dtype == torch.float32 and torch.isfinite(found[key])


def test_targets_have_no_gradient():
    student, _ = pair()
    batch = tiny_batch()
    for part, seen in zip(student.distiller.box.parts, recorded(student, batch)):
        found, _ = part.predict(TeacherPass(student.teacher, batch), seen.boxes)
        assert not found.logits.requires_grad and not found.deltas.requires_grad


def test_stages_that_share_a_box_head_are_refused():
    cfg = student_cfg()
    student = tiny_model(cfg, seed=1)
    student.roi_heads.box_head[1] = student.roi_heads.box_head[0]
    with pytest.raises(ConfigError, match="runs one box head in several stages"):
        attach_teacher(student, cfg, teacher=cascade())
