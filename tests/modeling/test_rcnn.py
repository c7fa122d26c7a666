"""Two-stage distillation: identities of student, teacher and cross-head; the model's contracts."""

import copy
import itertools

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from torchvision.ops import generalized_box_iou

from crosskd_ifc import FEATURE_FUSION_REGISTRY, ConfigError, CrossKDROIHeads, attach_teacher
from crosskd_ifc.distillation import losses
from crosskd_ifc.distillation.teacher import TeacherPass

KD_KEYS = ("loss_cls_kd", "loss_box_reg_kd")
CONV_HEAD = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 2)
NORM_HEAD = (*CONV_HEAD, "MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_BOX_HEAD.CONV_DIM", 32)
FUSION = "MODEL.CROSSKD.FUSION."


def fusion(name="sum", taps=(), entry="", route="direct", align=""):
    keys = ("NAME", "IN_FEATURES", "ENTRY", "ROUTE", "ALIGN")
    values = (name, taps, entry, route, align)
    return tuple(itertools.chain(*((FUSION + k, v) for k, v in zip(keys, values))))


def kd_losses(student, batch=None):
    result, _ = train_losses(student, batch or tiny_batch())
    return [result[k] for k in KD_KEYS]


def twin_losses(*opts):
    """KD losses of a student that is its own teacher."""
    cfg = tiny_cfg(*opts)
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    return kd_losses(student.train())


LAYERS = ("pool", "conv1", "conv2", "fc1", "fc2")


@pytest.mark.parametrize("head", [CONV_HEAD, NORM_HEAD], ids=["plain", "norm"])
@pytest.mark.parametrize("name", ["none", "sum", "mean", "weighted", "attention", "concat"])
@pytest.mark.parametrize("entry", LAYERS)
def test_teacher_equal_to_student_gives_zero_loss_where_the_tap_is_the_entry(head, name, entry):
    for loss in twin_losses(*head, *fusion(name, (entry,), entry)):
        assert 0 <= loss.item() <= 1e-5


@pytest.mark.parametrize("entry", ["conv2", "fc1", "fc2"])
@pytest.mark.parametrize("align", ["none", "standardize"])
def test_teacher_equal_to_student_gives_zero_loss_through_any_taps_with_mean(entry, align):
    below = LAYERS[: LAYERS.index(entry) + 1]
    for n in (1, 2, len(below)):
        for taps in itertools.combinations(below, n):
            for loss in twin_losses(*CONV_HEAD, *fusion("mean", taps, entry, "through", align)):
                assert loss.item() <= 1e-5, taps


@pytest.mark.parametrize("name", ["weighted", "attention"])
def test_teacher_equal_to_student_gives_zero_loss_through_all_taps_with_weights(name):
    for loss in twin_losses(*fusion(name, ("pool", "fc1", "fc2"), route="through")):
        assert loss.item() <= 1e-5


@pytest.mark.parametrize("name", ["weighted", "attention", "concat"])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_learned_fusions_get_a_gradient_in_every_step(name, factor):
    student, _ = distilling(*fusion(name, ("fc1", "fc2")))
    student.kd_factor = factor
    learned = {k: g for k, g in gradients(student, tiny_batch()).items() if "combine" in k}
    assert learned and all(g is not None for g in learned.values())
    student.roi_heads.batch_size_per_image = 0
    for name_, gradient in gradients(student, tiny_batch()).items():
        assert gradient is not None and torch.isfinite(gradient).all(), name_


def test_teacher_equal_to_student_through_sum_is_zero_only_with_standardize():
    taps = ("pool", "fc1", "fc2")
    for loss in twin_losses(*fusion("sum", taps, route="through", align="standardize")):
        assert loss.item() <= 1e-5
    assert max(twin_losses(*fusion("sum", taps, route="through"))) > 1e-3


def test_direct_with_several_taps_is_not_zero_even_for_equal_models():
    assert max(twin_losses(*fusion("sum", ("fc1", "fc2")))) > 1e-3


def recorded(student, batch):
    """The student's trace and what the distiller makes of it."""
    torch.manual_seed(0)
    with EventStorage(), student.roi_heads.record() as heads:
        GeneralizedRCNN.forward(student, batch)
    (trace,) = heads.stages
    box = student.distiller.box
    targets, layers = box.predict(TeacherPass(student.teacher, batch), trace.boxes)
    return trace, targets, layers, box.mimic.predict(trace, layers)


def test_cross_head_predictions_equal_the_students_for_its_last_layer_and_equal_predictors():
    student, teacher = distilling(*fusion("none", ("fc2",), "fc2"))
    teacher.roi_heads.box_predictor.load_state_dict(student.roi_heads.box_predictor.state_dict())
    trace, _, _, cross = recorded(student, tiny_batch())
    assert torch.equal(cross.logits, trace.logits) and torch.equal(cross.deltas, trace.deltas)


@pytest.mark.parametrize("entry", ["pool", "conv1", "fc1", "fc2"])
def test_through_from_pool_is_the_teachers_head_on_the_pooled_feature(entry):
    student, teacher = distilling(
        *CONV_HEAD, *fusion("none", ("pool",), entry, "through"), teacher_opts=CONV_HEAD
    )
    trace, _, _, cross = recorded(student, tiny_batch())
    heads = teacher.roi_heads
    logits, deltas = heads.box_predictor(heads.box_head(trace.layers["pool"]))
    assert torch.equal(cross.logits, logits) and torch.equal(cross.deltas, deltas)


def test_targets_are_the_teachers_own_predictions_on_the_students_boxes():
    student, teacher = distilling()
    batch = tiny_batch()
    trace, targets, layers, _ = recorded(student, batch)
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(batch).tensor)
        heads = teacher.roi_heads
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], trace.boxes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
    torch.testing.assert_close(targets.logits, logits)
    torch.testing.assert_close(targets.deltas, deltas)
    assert not targets.logits.requires_grad and not layers["fc2"].requires_grad


def test_losses_are_the_documented_functions_of_the_predictions():
    student, _ = distilling("MODEL.CROSSKD.LOSS.TEMPERATURE", 2.0, *fusion("mean", ("fc1", "fc2")))
    batch = tiny_batch()
    trace, t, _, z = recorded(student, batch)
    loss_cls, loss_box = kd_losses(student, batch)
    kl = losses.kl_divergence(z.logits, t.logits, temperature=2.0, normalizer=len(t.logits))
    torch.testing.assert_close(loss_cls, 0.5 * kl)
    torch.testing.assert_close(loss_box, losses.confident_l1(z.deltas, t.deltas, t.logits))


def test_giou_box_loss_compares_decoded_boxes():
    cfg = ("MODEL.CROSSKD.LOSS.BOX_TYPE", "giou")
    student, teacher = distilling(*cfg, *fusion("mean", ("fc1", "fc2")))
    batch = tiny_batch()
    trace, t, _, z = recorded(student, batch)
    boxes = Boxes.cat(trace.boxes).tensor
    p, c = t.logits.softmax(1)[:, :3].max(1)
    rows = torch.arange(len(c))
    decoded = [
        teacher.roi_heads.box_predictor.box2box_transform.apply_deltas(x, boxes).view(-1, 3, 4)
        for x in (z.deltas, t.deltas)
    ]
    giou = generalized_box_iou(decoded[0][rows, c], decoded[1][rows, c]).diagonal()
    expected = (p * (1 - giou)).sum() / p.sum()
    torch.testing.assert_close(kd_losses(student, batch)[1], expected, rtol=1e-4, atol=1e-6)
    assert twin_losses(*cfg, *fusion("none", ("fc2",)))[1] <= 1e-5


def test_without_a_teacher_the_model_is_stock_detectron2_bit_for_bit():
    stock_cfg = tiny_cfg(architecture="GeneralizedRCNN")
    stock, ours = tiny_model(stock_cfg), tiny_model(tiny_cfg())
    assert_same_detector(stock, ours)


def test_with_distillation_disabled_the_model_is_stock_detectron2_bit_for_bit():
    stock = tiny_model(tiny_cfg(architecture="GeneralizedRCNN"))
    cfg = tiny_cfg("MODEL.CROSSKD.ENABLED", False)
    ours = tiny_model(cfg)
    attach_teacher(ours, cfg, teacher=tiny_model(seed=5))
    assert_same_detector(stock, ours)


def test_with_a_teacher_evaluation_is_stock_detectron2_bit_for_bit():
    stock = tiny_model(tiny_cfg(architecture="GeneralizedRCNN"), seed=1)
    ours, _ = distilling()
    assert_same_predictions(stock, ours)


def assert_same_detector(stock, ours):
    """Same keys, weights, losses, gradients and predictions."""
    a, b = stock.state_dict(), ours.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    batch = tiny_batch()
    results = [train_losses(m.train(), batch)[0] for m in (stock, ours)]
    assert list(results[0]) == list(results[1])
    for k in results[0]:
        assert torch.equal(results[0][k], results[1][k])
    for m, r in zip((stock, ours), results):
        sum(r.values()).backward()
    for (name, p), (_, q) in zip(stock.named_parameters(), ours.named_parameters()):
        assert p.grad is None and q.grad is None or torch.equal(p.grad, q.grad), name
    assert_same_predictions(stock, ours)


def assert_same_predictions(stock, ours):
    batch = tiny_batch()
    with torch.no_grad():
        for x, y in zip(stock.eval()(batch), ours.eval()(batch)):
            x, y = x["instances"], y["instances"]
            assert len(x) == len(y) > 0
            assert torch.equal(x.pred_boxes.tensor, y.pred_boxes.tensor)
            assert torch.equal(x.scores, y.scores)


def gradients(student, batch):
    student.zero_grad()
    result, _ = train_losses(student, batch)
    sum(result.values()).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.requires_grad}


def test_zero_weights_give_the_stock_gradient_and_zeros_on_adapters():
    weights = ("MODEL.CROSSKD.LOSS.CLS_WEIGHT", 0.0, "MODEL.CROSSKD.LOSS.BOX_WEIGHT", 0.0)
    student, _ = distilling(*weights, *fusion("mean", ("pool", "fc1"), "fc2"))
    stock = tiny_model(tiny_cfg(architecture="GeneralizedRCNN"), seed=1).train()
    ours, theirs = gradients(student, tiny_batch()), gradients(stock, tiny_batch())
    for name, gradient in theirs.items():
        assert torch.equal(ours.pop(name), gradient), name
    assert ours and all(n.startswith("fusion.") for n in ours)
    assert all(torch.count_nonzero(g) == 0 for g in ours.values())


def test_kd_gradient_reaches_taps_and_adapters_but_neither_predictor_nor_teacher():
    student, teacher = distilling(*fusion("mean", ("pool", "fc1", "fc2")))
    result, _ = train_losses(student, tiny_batch())
    (result["loss_cls_kd"] + result["loss_box_reg_kd"]).backward()
    for name, p in student.named_parameters():
        touched = p.grad is not None and bool(p.grad.abs().sum() > 0)
        if name.startswith(("fusion.", "roi_heads.box_head.", "backbone.fpn_output2")):
            assert touched, name
        if name.startswith(("roi_heads.box_predictor.", "proposal_generator.")):
            assert not touched, name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    "opts, boxes",
    [((), (0, 0)), (("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False), (0, 2))],
    ids=["no boxes", "a picture without boxes"],
)
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_every_trainable_parameter_gets_a_finite_gradient(opts, boxes, factor):
    student, _ = distilling(*opts, *fusion("mean", ("pool", "fc1", "fc2")))
    student.kd_factor = factor
    for name, gradient in gradients(student, tiny_batch(boxes_per_image=boxes)).items():
        assert gradient is not None and torch.isfinite(gradient).all(), name


def test_no_sampled_roi_gives_connected_zeros():
    student, _ = distilling(*fusion("mean", ("pool", "fc1", "fc2")))
    student.roi_heads.batch_size_per_image = 0
    result, _ = train_losses(student, tiny_batch())
    assert result["loss_cls_kd"] == 0 and result["loss_box_reg_kd"] == 0
    for name, gradient in gradients(student, tiny_batch()).items():
        assert gradient is not None and torch.isfinite(gradient).all(), name


def test_factor_zero_does_not_run_the_teacher_and_keeps_the_keys():
    student, teacher = distilling()
    student.kd_factor = 0.0
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    result, _ = train_losses(student, tiny_batch())
    assert not calls and all(result[k] == 0 for k in KD_KEYS)
    student.kd_factor = 0.5
    half = kd_losses(student)
    student.kd_factor = 1.0
    for a, b in zip(half, kd_losses(student)):
        torch.testing.assert_close(2 * a, b)
    assert len(calls) == 2


def test_one_pooling_and_one_head_pass_for_each_network_in_a_step():
    student, teacher = distilling(*fusion("mean", ("fc1", "fc2"), "fc2"))
    counts = {}

    def count(name):
        def hook(*_):
            counts[name] = counts.get(name, 0) + 1

        return hook

    for prefix, model in (("student", student), ("teacher", teacher)):
        for part in ("backbone", "roi_heads.box_pooler", "roi_heads.box_head.fc1"):
            model.get_submodule(part).register_forward_hook(count(f"{prefix}.{part}"))
    train_losses(student, tiny_batch())
    assert set(counts.values()) == {1} and len(counts) == 6


def test_distilled_boxes_are_those_from_before_train_on_pred_boxes():
    results = []
    for rewrite in (False, True):
        student, _ = distilling("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", rewrite)
        results.append(kd_losses(student))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_a_teacher_with_other_classes_is_refused_unless_accepted_and_then_distils():
    more = ("MODEL.ROI_HEADS.NUM_CLASSES", 7)
    with pytest.raises(ConfigError, match="TEACHER.CLASS_MAP.*3 classes.*7.*NUM_CLASSES"):
        distilling(teacher_opts=more)
    accept = ("MODEL.CROSSKD.TEACHER.CLASS_MAP", ("teacher",))
    with pytest.raises(ConfigError, match="TEACHER.EVAL_AT_START.*3.*7"):
        distilling(*accept, "MODEL.CROSSKD.TEACHER.EVAL_AT_START", True, teacher_opts=more)
    student, _ = distilling(*accept, teacher_opts=more)
    trace, targets, _, cross = recorded(student, tiny_batch())
    assert cross.logits.shape == targets.logits.shape == (len(trace.logits), 8)
    assert cross.deltas.shape == (len(trace.logits), 28)
    assert all(loss > 0 for loss in kd_losses(student))


@pytest.mark.parametrize("agnostic", ["student", "teacher"])
def test_class_agnostic_and_class_specific_heads_work_together(agnostic):
    option = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    student, _ = distilling(
        *(option if agnostic == "student" else ()),
        teacher_opts=option if agnostic == "teacher" else (),
    )
    assert all(torch.isfinite(loss) and loss > 0 for loss in kd_losses(student))


@pytest.mark.parametrize("route", ["direct", "through"])
@pytest.mark.parametrize(
    "teacher_opts",
    [
        ("MODEL.ROI_BOX_HEAD.FC_DIM", 24),
        ("MODEL.FPN.OUT_CHANNELS", 12),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", 3),
        (*CONV_HEAD, "MODEL.ROI_BOX_HEAD.CONV_DIM", 12),
    ],
    ids=lambda o: o[-2].split(".")[-1],
)
def test_unlike_heads_are_bridged_by_learned_adapters(route, teacher_opts):
    student, _ = distilling(
        *fusion("mean", ("pool", "fc1", "fc2"), "fc2", route), teacher_opts=teacher_opts
    )
    assert any(n.startswith("fusion.adapters.") for n, _ in student.named_parameters()) == (
        route == "direct" or not set(teacher_opts) & {"MODEL.ROI_BOX_HEAD.NUM_FC", *CONV_HEAD}
    )
    for name, gradient in gradients(student, tiny_batch()).items():
        assert gradient is not None, name


def test_equal_heads_need_no_adapter_and_add_no_key():
    student, _ = distilling(*fusion("sum", ("fc1", "fc2")))
    assert list(student.state_dict()) == list(tiny_model(tiny_cfg()).state_dict())


def test_a_user_can_register_a_fusion():
    @FEATURE_FUSION_REGISTRY.register(name="max_for_test")
    class MaxFusion(torch.nn.Module):
        def __init__(self, taps, shape):
            super().__init__()

        def forward(self, features):
            return torch.stack(features).amax(dim=0)

    student, _ = distilling(*fusion("max_for_test", ("fc1", "fc2")))
    trace, _, layers, cross = recorded(student, tiny_batch())
    heads = student.teacher.model.roi_heads
    expected = heads.box_predictor(torch.maximum(trace.layers["fc1"], trace.layers["fc2"]))
    assert torch.equal(cross.logits, expected[0])


@pytest.mark.parametrize("opts", [(), fusion("mean", ("fc1", "fc2"))])
def test_statistics_go_to_the_event_storage_every_twenty_steps_only(opts):
    combined = {"agreement_cross_head", "fused_length", "fused_cosine"}
    by_tap = {f"agreement_{tap}" for tap in ("pool", "fc1", "fc2")}
    student, _ = distilling(*opts)
    names = {"num_rois", "teacher_seconds", "factor", "teacher_confidence", "agreement_student"}
    names |= {"disagreement_truth", "disagreement_truth_foreground"}
    names |= combined if opts else by_tap
    result, storage = train_losses(student, tiny_batch(), iteration=19)
    latest = {k[8:]: v for k, (v, _) in storage.latest().items() if k.startswith("crosskd/")}
    assert set(latest) == names
    assert latest["num_rois"] == 32 and 0 < latest["teacher_confidence"] < 1
    assert all("loss" in k and v.dim() == 0 for k, v in result.items())
    _, storage = train_losses(student, tiny_batch(), iteration=18)
    assert not any(k.startswith("crosskd/") for k in storage.latest())


def test_agreement_with_itself_is_complete():
    cfg = tiny_cfg(*fusion("none", ("fc2",)))
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    _, storage = train_losses(student.train(), tiny_batch(), iteration=19)
    assert storage.latest()["crosskd/agreement_cross_head"][0] == 1
    assert storage.latest()["crosskd/agreement_student"][0] == 1


@pytest.mark.parametrize("name, length", [("mean", 1), ("sum", 3)])
def test_a_sum_of_three_equal_features_is_three_times_as_long_as_the_teachers(name, length):
    cfg = tiny_cfg(*fusion(name, ("pool", "fc1", "fc2"), route="through"))
    student = tiny_model(cfg)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    _, storage = train_losses(student.train(), tiny_batch(), iteration=19)
    assert storage.latest()["crosskd/fused_length"][0] == pytest.approx(length, rel=1e-4)
    assert storage.latest()["crosskd/fused_cosine"][0] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_under_autocast_the_losses_are_float32_and_close_to_full_precision(dtype):
    student, _ = distilling()
    full = kd_losses(student)
    with torch.autocast("cpu", dtype=dtype):
        mixed = kd_losses(student)
    for a, b in zip(mixed, full):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.2, atol=0.02)


def test_under_autocast_every_loss_is_float32_and_finite():
    opts = (
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.CROSSKD.LOSS.FEATURE_WEIGHT", 1.0),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "CrossKDRPN", "MODEL.CROSSKD.LOSS.RPN_WEIGHT", 1.0),
    )
    for precision in ("float32", "bfloat16"):
        student, _ = distilling(
            *opts, "MODEL.CROSSKD.TEACHER.PRECISION", precision, teacher_opts=opts
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result, _ = train_losses(student, tiny_batch(masks=True))
        ours = {k: v for k, v in result.items() if k.endswith("_kd")}
        assert len(ours) == 5
        for name, loss in ours.items():
            assert loss.dtype == torch.float32 and torch.isfinite(loss), name


def test_learning_reduces_the_distillation_loss():
    student, _ = distilling(*fusion("mean", ("fc1", "fc2")))
    optimizer = torch.optim.SGD(student.roi_heads.box_head.parameters(), lr=0.01)
    history = []
    for _ in range(40):
        result, _ = train_losses(student, tiny_batch())
        loss = sum(result[k] for k in KD_KEYS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]


def test_a_distilled_checkpoint_has_stock_keys_plus_fusion_only():
    student, _ = distilling(*fusion("mean", ("pool", "fc1"), "fc2"))
    stock = build_model(tiny_cfg(architecture="GeneralizedRCNN"))
    missing, unexpected = stock.load_state_dict(student.state_dict(), strict=False)
    assert not missing and unexpected and all(k.startswith("fusion.") for k in unexpected)


def test_a_refused_teacher_leaves_the_student_as_it_was():
    cfg = tiny_cfg("MODEL.CROSSKD.INHERIT", ("nothing",))
    student = tiny_model(cfg)
    with pytest.raises(ConfigError):
        attach_teacher(student, cfg, teacher=tiny_model(seed=2))
    assert not any("kd" in k for k in train_losses(student.train(), tiny_batch())[0])
    assert student.teacher is None and not student.has_cross_head


def test_a_second_teacher_replaces_the_first_with_all_that_it_had_learned():
    student, teacher = distilling(*fusion("attention", ("fc1", "fc2")))
    cfg = tiny_cfg("MODEL.CROSSKD.MIMIC", "student_head")
    attach_teacher(student, cfg, teacher=teacher)
    assert not any(n.startswith("fusion.") for n, _ in student.named_parameters())
    for name, gradient in gradients(student, tiny_batch()).items():
        assert gradient is not None, name


@pytest.mark.parametrize("taps, told", [(("pool",), True), (("pool", "fc1"), False)])
def test_a_distillation_that_reaches_nothing_is_told_once(taps, told, caplog):
    student, _ = distilling("MODEL.CROSSKD.FUSION.IN_FEATURES", taps)
    student.backbone.requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            train_losses(student, tiny_batch())
    assert "changes nothing" not in caplog.text
    for _ in range(2):
        train_losses(student, tiny_batch())
    assert caplog.text.count("The distillation changes nothing") == told


def test_adapters_that_learn_alone_are_told_as_well(caplog):
    opts, wide = ("MODEL.CROSSKD.FUSION.IN_FEATURES", ("pool",)), ("MODEL.FPN.OUT_CHANNELS", 12)
    student, _ = distilling(*opts, teacher_opts=wide)
    train_losses(student, tiny_batch())
    assert "changes nothing" not in caplog.text
    student, _ = distilling(*opts, teacher_opts=wide)
    student.backbone.requires_grad_(False)
    train_losses(student, tiny_batch())
    assert "The distillation changes nothing" in caplog.text


def test_heads_whose_boxes_arent_seen_are_refused_naming_the_method():
    class Own(CrossKDROIHeads):
        def _forward_box(self, features, proposals):
            return StandardROIHeads._forward_box(self, features, proposals)

    student, _ = distilling()
    student.roi_heads.__class__ = Own
    with pytest.raises(ConfigError, match="_forward_box .* that doesn't call super"):
        train_losses(student, tiny_batch())
