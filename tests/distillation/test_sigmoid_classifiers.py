"""Two-stage detectors that score each class by itself (USE_SIGMOID_CE, federated loss)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_cascade_students import student_cfg
from torchvision.ops import generalized_box_iou

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.distillation.teacher import TeacherPass

K = "MODEL.CROSSKD."
SIGMOID = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
OWN = (K + "MIMIC", "student_head")
MEAN = (K + "FUSION.NAME", "mean")
LAST = (K + "FUSION.NAME", "none", K + "FUSION.IN_FEATURES", ("fc2",))
KEYS = ("loss_cls_kd", "loss_box_reg_kd")


@pytest.mark.parametrize("opts", [LAST, OWN])
def test_a_student_that_is_its_own_teacher_has_no_loss(opts):
    cfg = tiny_cfg(*SIGMOID, *opts)
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    found, storage = train_losses(student.train(), tiny_batch(), iteration=19)
    assert all(found[key] <= 1e-5 for key in KEYS)
    assert storage.latest()["crosskd/agreement_student"][0] == 1


@pytest.mark.parametrize("opts", [LAST, OWN])
def test_the_stages_of_a_cascade_score_so_too(opts):
    cfg = student_cfg(*SIGMOID, *opts)
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    found, _ = train_losses(student.train(), tiny_batch())
    assert all(found[f"loss_cls_stage{k}_kd"] <= 1e-5 for k in range(3))
    student, _ = distilling("MODEL.CROSSKD.TEACHER.STAGE", "mean", teacher=student.teacher.model)
    assert train_losses(student, tiny_batch())[0]["loss_cls_kd"] > 0


@pytest.mark.parametrize("opts", [MEAN, (*SIGMOID, *OWN)], ids=["cross-head", "student's head"])
@pytest.mark.parametrize("box_type", ["l1", "giou"])
def test_the_losses_are_quality_focal_and_boxes_weighted_by_the_best_sigmoid(opts, box_type):
    student, _ = distilling(*opts, K + "LOSS.BOX_TYPE", box_type, teacher_opts=SIGMOID)
    batch = tiny_batch()
    torch.manual_seed(0)
    with EventStorage(), student.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    (seen,), box = heads.stages, student.distiller.box
    t, layers = box.predict(TeacherPass(student.teacher, batch), seen.boxes)
    z = seen if OWN[0] in opts else box.mimic.predict(seen, layers)
    p, q = (x.logits[:, :3].sigmoid() for x in (z, t))
    focal = ((p - q).abs() * F.binary_cross_entropy(p, q, reduction="none")).sum() / len(p)
    found, _ = train_losses(student, batch)
    torch.testing.assert_close(found["loss_cls_kd"], 0.5 * focal)
    (confidence, classes), rows = q.max(dim=1), torch.arange(len(q))
    deltas = [x.deltas for x in (z, t)]
    if box_type == "l1":
        a, b = (x.view(-1, 3, 4)[rows, classes] for x in deltas)
        distances = (a - b).abs().mean(dim=1)
    else:
        decode = student.roi_heads.box_predictor.box2box_transform.apply_deltas
        boxes = [decode(x, Boxes.cat(seen.boxes).tensor) for x in deltas]
        a, b = (x.view(-1, 3, 4)[rows, classes] for x in boxes)
        distances = 1 - generalized_box_iou(a, b).diagonal()
    expected = (confidence * distances).sum() / confidence.sum()
    torch.testing.assert_close(found["loss_box_reg_kd"], expected)
    assert expected > 0


@pytest.mark.parametrize("opts", [(), (*SIGMOID, *OWN)], ids=["cross-head", "student's head"])
def test_the_column_of_background_which_is_never_trained_does_not_matter(opts):
    results = []
    for bias in (0.0, 50.0):
        teacher = tiny_model(tiny_cfg(*SIGMOID), seed=2)
        with torch.no_grad():
            teacher.roi_heads.box_predictor.cls_score.bias[-1] = bias
        results.append(train_losses(distilling(*opts, teacher=teacher)[0], tiny_batch())[0])
    for key in KEYS:
        assert torch.equal(results[0][key], results[1][key])


def test_a_federated_teachers_classes_are_all_compared():
    meta = MetadataCatalog.get("federated_for_test")
    meta.class_image_count = [{"id": i + 1, "image_count": 10**i} for i in range(3)]
    federated = (
        *("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, "DATASETS.TRAIN", ("federated_for_test",)),
        *("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", 2, *SIGMOID),
    )
    try:
        results = []
        for opts in (SIGMOID, federated):
            teacher = tiny_model(tiny_cfg(*SIGMOID), seed=2)
            student = tiny_model(cfg := tiny_cfg(*opts, *OWN), seed=1)
            assert student.roi_heads.box_predictor.use_fed_loss == (opts is federated)
            attach_teacher(student, cfg, teacher=teacher)
            results.append(train_losses(student.train(), tiny_batch())[0])
        for key in KEYS:
            assert torch.equal(results[0][key], results[1][key])
        student, _ = distilling(teacher_opts=federated)
        assert train_losses(student, tiny_batch())[0]["loss_cls_kd"] > 0
    finally:
        MetadataCatalog.pop("federated_for_test")


def test_a_class_without_a_teacher_class_is_left_out():
    pairs = (K + "TEACHER.CLASS_MAP", ((0, 2), (1, ""), (2, 0)))
    student, _ = distilling(*SIGMOID, *OWN, *pairs, teacher_opts=SIGMOID)
    batch = tiny_batch()
    torch.manual_seed(0)
    with EventStorage(), student.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    (seen,) = heads.stages
    t, _ = student.distiller.box.predict(TeacherPass(student.teacher, batch), seen.boxes)
    p, q = seen.logits[:, [0, 2]].sigmoid(), t.logits[:, [2, 0]].sigmoid()
    focal = ((p - q).abs() * F.binary_cross_entropy(p, q, reduction="none")).sum() / len(p)
    found, _ = train_losses(student, batch)
    torch.testing.assert_close(found["loss_cls_kd"], 0.5 * focal)


@pytest.mark.parametrize("boxes, rois", [((0, 0), 16), ((2, 3), 0)])
def test_every_parameter_gets_a_gradient_without_boxes_or_rois(boxes, rois):
    taps = (K + "FUSION.IN_FEATURES", ("pool", "fc1", "fc2"))
    student, _ = distilling(*taps, teacher_opts=SIGMOID)
    student.roi_heads.batch_size_per_image = rois
    sum(train_losses(student, tiny_batch(boxes_per_image=boxes))[0].values()).backward()
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_own_predictions_of_another_kind_of_score_are_refused(whose):
    ours, theirs = (SIGMOID if x == whose else () for x in ("student", "teacher"))
    with pytest.raises(ConfigError, match="USE_SIGMOID_CE is .*can't be compared.*'cross_head'"):
        distilling(*OWN, *ours, teacher_opts=theirs)


@pytest.mark.parametrize("key, value", [("CLS_TYPE", "dist"), ("TEMPERATURE", 2.0)])
def test_settings_of_softmax_scores_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"LOSS.{key} is .*sigmoids.*quality focal"):
        distilling(K + f"LOSS.{key}", value, teacher_opts=SIGMOID)
