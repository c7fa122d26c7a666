"""Gradients of a step that runs its images in parts."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import pair

from crosskd_ifc import ConfigError, Teacher
from crosskd_ifc.training.accumulation import accumulating
from crosskd_ifc.training.non_finite import LastStepRecorder
from crosskd_ifc.training.preflight import check_training_config

L = "MODEL.CROSSKD.LOSS."
# All anchors and proposals are taken, equally many in each image: nothing is drawn at random.
EVEN = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**5, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", -1000),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
)
RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "CrossKDRPN", L + "RPN_WEIGHT", 100.0)
BATCH = tiny_batch(images=4, boxes_per_image=(2,))


def step(model, batch, parts):
    """(gradients, logged losses) of a trainer's step, whose learning rate is 0."""
    trainer = SimpleTrainer(model, [batch], torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.iter, trainer.max_iter = 0, 1
    torch.manual_seed(0)
    with EventStorage(0) as storage, accumulating(trainer, parts):
        trainer.run_step()
    assert trainer.model is model
    losses = {k: v for k, (v, _) in storage.latest().items() if "loss" in k}
    return gradients(model), losses


def gradients(model):
    named = getattr(model, "module", model).named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


def difference(a, b):
    """Norm of the difference, relative to that of the gradient."""
    assert a.keys() == b.keys()
    norms = [sum(x.double().square().sum() for x in y) ** 0.5 for y in (b.values(), _minus(a, b))]
    return float(norms[1] / norms[0])


def _minus(a, b):
    return [a[n] - b[n] for n in b]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_faster_rcnns_gradient_is_that_of_the_whole_batch(parts):
    model = tiny_model(tiny_cfg(*EVEN, architecture="GeneralizedRCNN")).train()
    (found, losses), (whole, others) = step(model, BATCH, parts), step(model, BATCH, 1)
    assert difference(found, whole) < 1e-6
    assert losses == pytest.approx(others, rel=1e-5) and losses["total_loss"] > 0.1


def test_so_it_is_with_the_losses_of_classes_and_of_the_rpn_distilled():
    student, _ = distilling(*EVEN, *RPN, L + "BOX_WEIGHT", 0.0)
    (found, losses), (whole, others) = step(student, BATCH, 2), step(student, BATCH, 1)
    assert difference(found, whole) < 1e-6
    assert losses["loss_cls_kd"] > 0 < losses["loss_rpn_kd"]
    assert losses == pytest.approx(others, rel=1e-5)


@pytest.mark.parametrize("kind", ["RCNN", "RetinaNet", "FCOS"])
def test_for_every_detector_and_loss_it_is_the_mean_of_the_parts(kind):
    def build():
        return distilling(*EVEN)[0] if kind == "RCNN" else pair(kind)[0]

    alone = build()
    for part in (BATCH[:2], BATCH[2:]):
        losses, _ = train_losses(alone, part)
        (sum(losses.values()) / 2).backward()
    student = build()
    assert difference(step(student, BATCH, 2)[0], gradients(alone)) < 1e-6
    normalizers = [getattr(x, "loss_normalizer", None) for x in (student, alone)]
    assert normalizers[0] == normalizers[1] and (normalizers[0] is None) == (kind == "RCNN")


def test_one_part_is_the_step_without_accumulation():
    model = tiny_model(tiny_cfg(*EVEN, architecture="GeneralizedRCNN")).train()
    trainer = SimpleTrainer(model, [BATCH], torch.optim.SGD(model.parameters(), lr=0.0))
    with accumulating(trainer, 1):
        assert trainer.model is model and not trainer.zero_grad_before_forward


def test_under_mixed_precision_every_part_is_scaled():
    model = tiny_model(tiny_cfg(*EVEN, architecture="GeneralizedRCNN")).train()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    plain, _ = step(model, BATCH, 2)
    first_parts = []
    model.register_forward_hook(lambda *_: first_parts.append(gradients(model)))
    trainer = SimpleTrainer(model, [BATCH], torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.grad_scaler = scaler
    torch.manual_seed(0)
    with EventStorage(0), accumulating(trainer, 2):  # as detectron2's AMPTrainer, which needs CUDA
        trainer.optimizer.zero_grad()
        scaler.scale(sum(trainer.model(BATCH).values())).backward()
    assert difference({n: g / 8 for n, g in gradients(model).items()}, plain) < 1e-6
    assert not first_parts[0] and first_parts[1]


def test_a_loss_that_is_not_finite_is_told_with_the_images_of_its_part():
    model = tiny_model(tiny_cfg(*EVEN, architecture="GeneralizedRCNN")).train()
    watch = LastStepRecorder(model, passes=2)
    batch = [{**x, "file_name": f"{i}.png"} for i, x in enumerate(BATCH)]
    model.roi_heads.register_forward_hook(_spoil_first())
    with pytest.raises(FloatingPointError) as caught:
        step(model, batch, 2)
    told = watch.explain(model, 0, caught.value)
    assert "loss_cls" in told and "0.png, 1.png" in told and "2.png" not in told


@pytest.mark.parametrize("spoilt, told", [(None, "are finite"), (1, "not finite: teacher_2/p2")])
def test_of_several_teachers_the_one_that_is_not_finite_is_named(spoilt, told):
    teachers = [Teacher(tiny_model(seed=i), student_format="BGR") for i in range(2)]
    model = torch.nn.Identity()
    model.forward = lambda batch: {"loss_cls_kd": torch.tensor(float("nan"))}
    model.teachers, model.teacher = teachers, teachers[0]
    if spoilt is not None:
        with torch.no_grad():
            teachers[spoilt].model.backbone.fpn_output2.bias.fill_(float("nan"))
    watch = LastStepRecorder(model)
    model(BATCH)
    assert told in watch.explain(model, 0, FloatingPointError("x"))


def _spoil_first():
    calls = []

    def spoil(module, inputs, output):
        calls.append(output)
        if len(calls) == 1:
            output[1]["loss_cls"] = output[1]["loss_cls"] * float("nan")

    return spoil


@pytest.mark.parametrize("parts, images", [(3, 4), (0, 4), (8, 4)])
def test_parts_that_are_not_equal_are_refused(parts, images):
    cfg = tiny_cfg("SOLVER.ACCUMULATE", parts, "SOLVER.IMS_PER_BATCH", images)
    cfg.MODEL.CROSSKD.ENABLED = False
    with pytest.raises(ConfigError, match=f"SOLVER.ACCUMULATE is {parts}.*divide the {images}"):
        check_training_config(cfg)
