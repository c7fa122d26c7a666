"""RetinaNet and FCOS: identities of student, teacher and cross-head; the models' contracts."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import FPN, META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS as StockFCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from helpers import tiny_batch, train_losses

from crosskd_ifc import ConfigError, add_crosskd_ifc_config, attach_teacher, standardize_like
from crosskd_ifc.config import class_count, distillation_requested
from crosskd_ifc.distillation import losses
from crosskd_ifc.distillation.teacher import TeacherPass
from crosskd_ifc.distillation.traces import DenseTrace
from crosskd_ifc.modeling import fcos
from crosskd_ifc.weights.export import export_student

K = "MODEL.CROSSKD."
KEYS = ("loss_cls_kd", "loss_box_reg_kd")
DENSE = ("RetinaNet", "FCOS")
dense = pytest.mark.parametrize("kind", DENSE)


def dense_cfg(kind, *opts, stock=False, convs=4, norm=""):
    """A tiny dense detector without layers that use batch statistics."""
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    builder = {"RetinaNet": "build_retinanet_resnet_fpn_backbone"}
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": kind if stock else f"CrossKD{kind}",
        "MODEL.BACKBONE.NAME": builder.get(kind, "build_crosskd_fcos_resnet_fpn_backbone"),
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [48], [64]],
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "MODEL.RETINANET.NUM_CONVS": convs,
        "MODEL.RETINANET.NORM": norm,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
        "MODEL.FCOS.NUM_CLASSES": 3,
        "MODEL.FCOS.NUM_CONVS": convs,
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
    }
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    cfg.merge_from_list(list(opts))
    return cfg


def telling(model, seed):
    """Towers and predictors far from their start, where all outputs are almost alike."""
    torch.manual_seed(seed)
    with torch.no_grad():
        levels = model.backbone(model.preprocess_image(tiny_batch()).tensor)
        for i in (3, 4, 5):
            output = model.backbone.get_submodule(f"fpn_output{i}")
            output.weight /= levels[f"p{i}"].std()
    for name, p in model.head.named_parameters():
        if p.dim() == 4:
            torch.nn.init.normal_(p, std=0.08 if "subnet" in name else 0.03)
    return model


def pair(kind, *opts, teacher_opts=(), seed=1, **settings):
    """(student in training mode, teacher) attached."""
    cfg = dense_cfg(kind, *opts, **settings)
    torch.manual_seed(seed)
    student = telling(build_model(cfg), seed)
    torch.manual_seed(9)
    teacher = telling(build_model(dense_cfg(kind, *teacher_opts, stock=True, **settings)), 9)
    attach_teacher(student, cfg, teacher=teacher)
    return student.train(), teacher


class BareFPN(FPN):
    """Says of its padding what a backbone of one's own does: nothing but ``size_divisibility``."""

    padding_constraints = {}


class CoarseFPN(FPN):
    padding_constraints = {"size_divisibility": 64}


def test_backbones_that_pad_alike_fit_however_they_say_it():
    cfg = dense_cfg("RetinaNet")
    student, teacher = build_model(cfg), build_model(dense_cfg("RetinaNet", stock=True))
    student.backbone.__class__ = BareFPN
    attach_teacher(student, cfg, teacher=teacher)
    other = build_model(cfg)
    teacher.backbone.__class__ = CoarseFPN
    with pytest.raises(ConfigError, match="multiples of 32 pixels .* to multiples of 64 pixels"):
        attach_teacher(other, cfg, teacher=teacher)


def fusion(name, taps, entry=""):
    prefix = K + "FUSION."
    return (prefix + "NAME", name, prefix + "IN_FEATURES", taps, prefix + "ENTRY", entry)


def twin_losses(kind, *opts, **settings):
    cfg = dense_cfg(kind, *opts, **settings)
    torch.manual_seed(1)
    student = telling(build_model(cfg), 1)
    teacher = copy.deepcopy(student)
    attach_teacher(student, cfg, teacher=teacher)
    result, _ = train_losses(student.train(), tiny_batch())
    return [result[k].item() for k in KEYS]


@dense
@pytest.mark.parametrize("name", ["none", "sum", "mean", "weighted", "attention", "concat"])
@pytest.mark.parametrize("tap", ["conv1", "conv3", "conv4"])
def test_teacher_equal_to_student_gives_zero_loss_where_the_tap_is_the_entry(kind, name, tap):
    for loss in twin_losses(kind, *fusion(name, (tap,))):
        assert 0 <= loss <= 1e-5


def test_it_is_zero_with_a_norm_in_the_towers_too():
    for loss in twin_losses("RetinaNet", *fusion("none", ("conv3",)), norm="GN"):
        assert 0 <= loss <= 1e-5


@dense
@pytest.mark.parametrize("norm", ["", "GN"])
def test_it_is_zero_for_any_taps_that_run_through_the_teachers_layers(kind, norm):
    through = (K + "FUSION.ROUTE", "through")
    for loss in twin_losses(
        kind, *fusion("mean", ("conv1", "conv2", "conv3")), *through, norm=norm
    ):
        assert 0 <= loss <= 1e-5


@dense
def test_several_taps_are_not_zero_even_for_equal_models(kind):
    assert max(twin_losses(kind)) > 1e-4


def traced(student, batch):
    """The student's trace, as its own forward has recorded it."""
    with EventStorage(), student.record() as trace:
        student.stock_class.forward(student, batch)
    return trace


def narrow_second_image(batch):
    """The second image is 64 x 20: alone it would be padded to 64 x 32, here it is to 64 x 64."""
    image, instances = batch[1]["image"], batch[1]["instances"]
    batch[1]["image"] = image[:, :, :20]
    narrow = Instances((64, 20), gt_boxes=instances.gt_boxes, gt_classes=instances.gt_classes)
    narrow.gt_boxes.clip((64, 20))
    batch[1]["instances"] = narrow[narrow.gt_boxes.nonempty()]
    return batch


@pytest.mark.parametrize("padded", [False, True], ids=["one size", "padded"])
@dense
def test_the_losses_are_the_documented_functions_of_the_predictions(kind, padded):
    student, teacher = pair(kind)
    batch, box = tiny_batch(boxes_per_image=(9, 12)), student.distiller.box
    if padded:
        batch = narrow_second_image(batch)
    trace = traced(student, batch)
    theirs, wanted = box.run_teacher(TeacherPass(student.teacher, batch))
    found = box.mimic.maps(trace.layers, theirs)
    (z, d), (t, b) = (teacher._transpose_dense_predictions(x[:2], [3, 4]) for x in (found, wanted))
    z, d, t, b = (torch.cat(x, dim=1) for x in (z, d, t, b))
    anchors = Boxes.cat(trace.anchors).tensor
    positive = (trace.labels >= 0) & (trace.labels < 3)
    valid = trace.labels >= 0
    if kind == "RetinaNet" and padded:  # anchors of the second image's right half are left out
        centers = Boxes.cat(trace.anchors).get_centers()[:, 0].round().int()
        assert (centers >= 32).sum() == 3 * (8 * 4 + 4 * 2 + 2 * 1)
        valid[1] &= centers < 32
    if kind == "RetinaNet":
        assert (~valid).any()  # some anchors are ignored
        n = sum(max(int(p.sum()), 1) for p in positive)
    else:
        targets = student.compute_ctrness_targets(trace.anchors, trace.boxes)
        n = max(targets[positive].sum(), 1)
    cls = losses.quality_focal(z[valid], t[valid], beta=1.0, normalizer=n)
    confidence = t.sigmoid().max(dim=2).values
    decode = teacher.box2box_transform.apply_deltas
    each = [
        (decode(d[i][valid[i]], anchors[valid[i]]), decode(b[i][valid[i]], anchors[valid[i]]))
        for i in range(2)
    ]
    measure = losses.confident_giou if kind == "RetinaNet" else losses.confident_iou
    box = 0
    for i, (ours, other) in enumerate(each):
        kept = Boxes(other).area() > 0
        weight = confidence[i][valid[i]][kept]
        box = box + measure(ours[kept], other[kept], weight, normalizer=n)
    result, _ = train_losses(student, batch)
    torch.testing.assert_close(result["loss_cls_kd"], 0.5 * cls)
    torch.testing.assert_close(result["loss_box_reg_kd"], box)
    assert cls > 1e-3 and box > 1e-3


@dense
def test_the_teachers_own_predictions_are_those_of_its_forward(kind):
    student, teacher = pair(kind)
    batch = tiny_batch()
    _, wanted = student.distiller.box.run_teacher(TeacherPass(student.teacher, batch))
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(batch).tensor)
        expected = teacher.head([features[f] for f in teacher.head_in_features])
    for ours, theirs in zip(wanted, expected):
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)


@dense
def test_plain_crosskd_standardizes_one_tap_and_runs_the_teachers_remaining_layers(kind):
    student, teacher = pair(kind, *fusion("none", ("conv2",)))
    batch = tiny_batch()
    trace = traced(student, batch)
    theirs, _ = student.distiller.box.run_teacher(TeacherPass(student.teacher, batch))
    found = student.distiller.box.mimic.maps(trace.layers, theirs)
    for level in range(5):
        s = trace.layers["cls"]["conv2"][level]
        x = standardize_like(s, theirs["cls"][level]).relu()
        blocks = teacher.head.cls_subnet
        half = len(blocks) // 2
        for module in blocks[half:]:
            x = module(x)
        torch.testing.assert_close(found[0][level], teacher.head.cls_score(x))


@dense
def test_without_a_teacher_it_is_stock_detectron2_bit_for_bit(kind):
    torch.manual_seed(0)
    ours = build_model(dense_cfg(kind))
    torch.manual_seed(0)
    stock = build_model(dense_cfg(kind, stock=True))
    assert isinstance(stock, {"RetinaNet": RetinaNet, "FCOS": StockFCOS}[kind])
    assert_same(stock, ours)


def assert_same(stock, ours):
    a, b = stock.state_dict(), ours.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    batch = tiny_batch()
    results = [train_losses(m.train(), batch)[0] for m in (stock, ours)]
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    with torch.no_grad():
        for x, y in zip(stock.eval()(batch), ours.eval()(batch)):
            assert len(x["instances"]) == len(y["instances"]) > 0
            assert torch.equal(x["instances"].scores, y["instances"].scores)


@dense
def test_a_distilled_checkpoint_loads_in_the_stock_model_and_evaluates_the_same(kind):
    student, _ = pair(kind)
    stock = build_model(dense_cfg(kind, stock=True))
    stock.load_state_dict(student.state_dict())
    with torch.no_grad():
        for x, y in zip(stock.eval()(tiny_batch()), student.eval()(tiny_batch())):
            assert torch.equal(x["instances"].scores, y["instances"].scores)
            assert torch.equal(x["instances"].pred_boxes.tensor, y["instances"].pred_boxes.tensor)


@dense
def test_the_moving_average_of_positives_is_updated_once_per_step(kind):
    student, _ = pair(kind)
    stock = build_model(dense_cfg(kind, stock=True))
    stock.load_state_dict(student.state_dict())
    for _ in range(2):
        train_losses(student, tiny_batch())
        train_losses(stock.train(), tiny_batch())
    assert student.loss_normalizer == stock.loss_normalizer


def test_an_exported_retinanet_is_a_stock_model_with_the_same_detections(tmp_path):
    learned = fusion("weighted", ("conv1", "conv2"))
    student, _ = pair("RetinaNet", *learned)
    DetectionCheckpointer(student, str(tmp_path)).save("model_final")
    (tmp_path / "config.yaml").write_text(dense_cfg("RetinaNet", *learned).dump())
    done = export_student(str(tmp_path / "model_final.pth"), str(tmp_path / "student"))
    assert done.architecture == ("CrossKDRetinaNet", "RetinaNet") and done.detections > 0
    assert any(name.startswith("fusion.cls") for name in done.dropped)
    cfg = get_cfg()
    cfg.merge_from_file(done.config, allow_unsafe=False)
    stock = build_model(cfg)
    DetectionCheckpointer(stock).load(done.weights)
    assert type(stock) is RetinaNet
    with torch.no_grad():
        for x, y in zip(stock.eval()(tiny_batch()), student.eval()(tiny_batch())):
            assert torch.equal(x["instances"].scores, y["instances"].scores)


def gradients(student, batch):
    student.zero_grad()
    result, _ = train_losses(student, batch)
    sum(result.values()).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.requires_grad}


@dense
def test_the_gradient_reaches_the_taps_and_not_the_students_predictors_or_the_teacher(kind):
    student, teacher = pair(kind)
    result, _ = train_losses(student, tiny_batch())
    (result["loss_cls_kd"] + result["loss_box_reg_kd"]).backward()
    depth = student.kd_depth
    for tower in ("cls_subnet", "bbox_subnet"):
        blocks = [m for m in student.head.get_submodule(tower) if isinstance(m, torch.nn.Conv2d)]
        for i, conv in enumerate(blocks):
            assert (conv.weight.grad is not None and conv.weight.grad.any()) == (i < depth)
    assert student.head.cls_score.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


@dense
@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("boxes", [(0, 0), (0, 2), (2, 3)])
def test_every_parameter_gets_a_finite_gradient_adapters_included(kind, factor, boxes):
    learned = fusion("attention", ("conv1", "conv2"))
    student, _ = pair(kind, *learned, teacher_opts=("MODEL.FPN.OUT_CHANNELS", 64))
    student.kd_factor = factor
    found = gradients(student, tiny_batch(boxes_per_image=boxes))
    assert any(n.startswith("fusion.cls.adapters") for n in found)
    assert any(n.startswith("fusion.bbox.combine") for n in found)
    for name, gradient in found.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name


@dense
def test_a_level_of_one_pixel_and_a_dead_channel_give_finite_losses(kind):
    plain = ("MODEL.FCOS.NORM", "")  # GN needs more than one number per group
    student, teacher = pair(kind, *plain, teacher_opts=plain)
    with torch.no_grad():  # one channel of the first layer is 0 everywhere
        student.head.cls_subnet[0].weight[0] = 0
        student.head.cls_subnet[0].bias[0] = -1
    batch = tiny_batch(images=1)
    batch[0]["image"] = batch[0]["image"][:, :32, :32]
    for gradient in gradients(student, batch).values():
        assert torch.isfinite(gradient).all()


@dense
def test_factor_zero_does_not_run_the_teacher(kind):
    student, teacher = pair(kind)
    student.kd_factor = 0.0
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    result, _ = train_losses(student, tiny_batch())
    assert not calls and all(result[k] == 0 for k in KEYS)


@dense
def test_the_cross_head_detects(kind):
    student, teacher = pair(kind)
    detections = student.eval().cross_head_inference(tiny_batch())
    assert all(len(x["instances"]) for x in detections)


@dense
def test_the_box_loss_has_its_weight(kind):
    one, quarter = (
        train_losses(pair(kind, K + "LOSS.BOX_WEIGHT", weight)[0], tiny_batch())[0]
        for weight in (1.0, 0.25)
    )
    torch.testing.assert_close(4 * quarter["loss_box_reg_kd"], one["loss_box_reg_kd"])
    assert torch.equal(quarter["loss_cls_kd"], one["loss_cls_kd"])


LOWER = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64), (20, 64)])  # alone the second is 32 x 64
LEVELS = [torch.zeros(2, 1, side, side) for side in (8, 4, 2, 1, 1)]


def test_places_below_a_lower_image_are_left_out():
    found = build_model(dense_cfg("RetinaNet")).inside(LOWER, LEVELS)
    assert found[0].all() and found.shape[1] == 3 * (64 + 16 + 4 + 1 + 1)
    assert torch.equal(found[1, :192], torch.arange(192) < 96)
    assert found[1].sum() == 3 * (32 + 8 + 2 + 1 + 1)


def test_a_backbone_that_pads_to_a_square_sees_all_places_in_every_batch():
    student = build_model(dense_cfg("RetinaNet"))
    student.backbone._square_pad = 64
    assert student.inside(LOWER, LEVELS) is None


def test_retinanets_divisor_counts_one_for_an_image_without_positives():
    student = build_model(dense_cfg("RetinaNet"))
    labels = torch.tensor([[0, 1, 3, -1], [3, 3, -1, 3]])  # 3: background, -1: ignored
    assert student.kd_normalizer(DenseTrace({}, 3, labels=labels)) == 2 + 1


def test_fcos_divisor_is_at_least_one_after_the_mean_over_processes(monkeypatch):
    monkeypatch.setattr(fcos, "mean_over_processes", lambda x: x / 2)
    student = build_model(dense_cfg("FCOS"))
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    background = torch.tensor([[3]])
    trace = DenseTrace({}, 1, anchors=[Boxes(box)], labels=background, boxes=[box])
    assert student.kd_normalizer(trace) == 1


@dense
def test_a_twin_agrees_everywhere(kind):
    cfg = dense_cfg(kind, *fusion("none", ("conv3",)))
    student = telling(build_model(cfg), 1)
    attach_teacher(student, cfg, teacher=copy.deepcopy(student))
    _, storage = train_losses(student.train(), tiny_batch(), iteration=19)
    for name in ("agreement_cross_head", "agreement_student"):
        assert storage.latest()[f"crosskd/{name}"][0] == pytest.approx(1)


@dense
def test_statistics_are_logged(kind):
    student, _ = pair(kind)
    _, storage = train_losses(student, tiny_batch(), iteration=19)
    found = {k[8:]: v for k, (v, _) in storage.latest().items() if k.startswith("crosskd/")}
    names = {"factor", "teacher_seconds", "teacher_confidence", "cross_head_confidence"}
    shares = {"agreement_cross_head", "agreement_student", "disagreement_truth_foreground"}
    assert set(found) == names | shares
    assert all(0 <= found[name] <= 1 for name in shares)


REFUSED = {
    "classes": (
        (),
        ("MODEL.RETINANET.NUM_CLASSES", 5),
        "CLASS_MAP: the student has 3 classes and the teacher 5.*RETINANET.NUM_CLASSES 3",
    ),
    "anchors": (
        (),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[9], [16], [32], [48], [64]]),
        "other anchors than the student: MODEL.ANCHOR_GENERATOR.SIZES",
    ),
    "a tap": (fusion("none", ("conv9",)), (), "IN_FEATURES.*'conv9'.*conv1, conv2, conv3, conv4"),
    "an entry": (
        fusion("none", ("conv4",)),
        ("MODEL.RETINANET.NUM_CONVS", 2),
        "ENTRY.*teacher's.*'conv4'; it has conv1, conv2",
    ),
    "the input as a tap": (fusion("none", ("input",)), (), "IN_FEATURES.*no layer 'input'"),
    "taps behind the entry": (
        (*fusion("mean", ("conv1", "conv4"), "conv2"), K + "FUSION.ROUTE", "through"),
        (),
        "IN_FEATURES.*'conv4'.*deeper than ENTRY 'conv2'",
    ),
    "a route through norms that count levels": (
        (K + "FUSION.ROUTE", "through"),
        ("MODEL.RETINANET.NORM", "BN"),
        "FUSION.ROUTE 'through'.*BatchNorm for each level",
    ),
    "align": ((K + "FUSION.ALIGN", "none"), (), "FUSION.ALIGN is 'none'.*always standardized"),
    "l1": ((K + "LOSS.BOX_TYPE", "l1"), (), "BOX_TYPE is 'l1'.*'giou', 'iou'"),
    "RPN mimicking": ((K + "LOSS.RPN_WEIGHT", 1.0), (), "RPN_WEIGHT"),
    "no map for student_head": (
        (K + "MIMIC", "student_head", K + "TEACHER.CLASS_MAP", ("teacher",)),
        (),
        "CLASS_MAP.*MIMIC 'student_head' compares them",
    ),
    "temperature": ((K + "LOSS.TEMPERATURE", 1.0), (), "TEMPERATURE is 1.0, but.*dense"),
    "a two-stage teacher": (
        (),
        ("MODEL.META_ARCHITECTURE", "FCOS", "MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5"]),
        "is a FCOS; this student needs a RetinaNet",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_when_the_teacher_is_attached(case):
    opts, teacher_opts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        pair("RetinaNet", *opts, teacher_opts=teacher_opts)


class ScaledHead(RetinaNetHead):
    def forward(self, features):
        logits, deltas = super().forward(features)
        return logits, [3 * x for x in deltas]


@pytest.mark.parametrize("mimic", ["cross_head", "student_head"])
@pytest.mark.parametrize(
    "whose, message",
    [
        ("student", "META_ARCHITECTURE: the student's head ScaledHead has a forward of its own"),
        ("teacher", "TEACHER.CONFIG_FILE: .*can't be entered: head ScaledHead has a forward of"),
    ],
)
def test_a_head_that_computes_more_than_its_layers_is_refused(whose, message, mimic):
    cfg = dense_cfg("RetinaNet", K + "MIMIC", mimic)
    models = {"student": build_model(cfg), "teacher": build_model(dense_cfg("RetinaNet"))}
    models[whose].head.__class__ = ScaledHead
    with pytest.raises(ConfigError, match=message):
        attach_teacher(models["student"], cfg, teacher=models["teacher"])


@dense
def test_a_student_derived_from_ours_has_the_same_settings(kind):
    """By its class: its name says nothing."""
    ours = build_model(dense_cfg(kind))
    name = f"Own{len(META_ARCH_REGISTRY._obj_map)}"
    META_ARCH_REGISTRY._do_register(name, type(name, (type(ours),), {}))
    try:
        cfg = dense_cfg(kind)
        student, teacher = build_model(cfg), build_model(dense_cfg(kind, stock=True))
        attach_teacher(student, cfg, teacher=teacher)
        cfg.MODEL.META_ARCHITECTURE = name
        own = build_model(cfg)
        attach_teacher(own, cfg, teacher=copy.deepcopy(teacher))
        fusions = [x.distiller.box.mimic.fusion["cls"] for x in (student, own)]
        assert fusions[0].taps == fusions[1].taps and len(fusions[0].taps) > 1
        assert [class_count(cfg), class_count(dense_cfg(kind))] == [class_count(cfg)] * 2
        cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE = "t.yaml"
        assert distillation_requested(cfg)
    finally:
        META_ARCH_REGISTRY._obj_map.pop(name)
