"""Loading, checking, freezing and feeding the teacher."""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.structures import BitMasks, Instances
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_cascade_students import KD_KEYS, pair

from crosskd_ifc import ConfigError, Teacher, attach_teacher
from crosskd_ifc.common.config_files import find_config, merge_from_file
from crosskd_ifc.weights.strict import StrictReader

T = "MODEL.CROSSKD.TEACHER."


@pytest.fixture
def teacher_files(tmp_path):
    """(config file, weights file, model) of a trained teacher."""
    cfg = tiny_cfg(architecture="GeneralizedRCNN")
    model = tiny_model(cfg, seed=7)
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    DetectionCheckpointer(model, str(tmp_path)).save("teacher")
    return str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pth"), model


def student_cfg(files, *opts):
    return tiny_cfg(T + "CONFIG_FILE", files[0], T + "WEIGHTS", files[1], *opts)


def attach(cfg):
    student = build_model(cfg)
    return student, attach_teacher(student, cfg)


def rewrite(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["model"])
    torch.save(checkpoint, path)


def test_the_teacher_is_built_from_its_own_config_with_its_own_weights(teacher_files):
    _, teacher = attach(student_cfg(teacher_files, "MODEL.FPN.OUT_CHANNELS", 12))
    expected = teacher_files[2].state_dict()
    assert list(teacher.model.state_dict()) == list(expected)
    for k, v in teacher.model.state_dict().items():
        assert torch.equal(v, expected[k])


def test_opts_override_the_teachers_config(teacher_files):
    opts = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.33)
    _, teacher = attach(student_cfg(teacher_files, T + "OPTS", opts))
    assert teacher.model.roi_heads.box_predictor.test_score_thresh == 0.33


def test_a_distilled_student_can_be_a_teacher(teacher_files):
    # Its checkpoint also holds adapters, which a teacher doesn't need.
    rewrite(teacher_files[1], lambda m: m.update({"fusion.adapters.fc1.weight": torch.zeros(2, 2)}))
    attach(student_cfg(teacher_files))


def test_weights_that_another_config_has_trained_are_told(teacher_files, caplog):
    file, content = teacher_files[1], torch.load(teacher_files[1], weights_only=True)
    cfg = tiny_cfg(architecture="GeneralizedRCNN")
    torch.save({**content, "config": {"yaml": cfg.dump(), "processes": 1}}, file)
    attach(student_cfg(teacher_files, T + "OPTS", ("TEST.DETECTIONS_PER_IMAGE", 7)))
    assert "were trained with" not in caplog.text
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = [1.0, 2.0, 3.0], 2
    cfg.MODEL.BACKBONE.NAME = "build_mmdet_resnet_fpn_backbone"
    torch.save({**content, "config": {"yaml": cfg.dump(), "processes": 1}}, file)
    attach(student_cfg(teacher_files))
    keys = "MODEL.BACKBONE.NAME, MODEL.PIXEL_MEAN, MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"
    assert f"were trained with other values of {keys} than TEACHER.CONFIG_FILE" in caplog.text


def test_the_channel_order_is_that_of_the_teachers_config_where_its_model_does_not_keep_it(
    teacher_files,
):
    class ForgetsFormat(GeneralizedRCNN):
        @classmethod
        def from_config(cls, cfg):
            return {**super().from_config(cfg), "input_format": None}

    META_ARCH_REGISTRY._do_register("ForgetsFormat", ForgetsFormat)
    try:
        opts = ("MODEL.META_ARCHITECTURE", "ForgetsFormat", "INPUT.FORMAT", "RGB")
        _, teacher = attach(student_cfg(teacher_files, T + "OPTS", opts))
    finally:
        META_ARCH_REGISTRY._obj_map.pop("ForgetsFormat")
    assert teacher.input_format == "RGB"
    image = torch.arange(3).view(3, 1, 1).expand(3, 4, 4)
    (turned,) = teacher.inputs([{"image": image}])
    assert turned["image"][:, 0, 0].tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.pop("backbone.fpn_lateral2.weight"), "missing: .*fpn_lateral2"),
        (lambda m: m.update({"roi_heads.extra": torch.zeros(1)}), "unexpected: .*extra"),
        (
            lambda m: m.update({"roi_heads.box_head.fc2.bias": torch.zeros(5)}),
            r"of another shape: .*fc2\.bias \(5,\) instead of \(16,\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_naming_the_key(teacher_files, change, reason):
    rewrite(teacher_files[1], change)
    with pytest.raises(ConfigError, match=f"(?s)TEACHER.WEIGHTS.*{reason}"):
        attach(student_cfg(teacher_files))


def test_missing_weights_are_an_error_never_a_random_teacher(teacher_files):
    os.remove(teacher_files[1])
    with pytest.raises(ConfigError, match="TEACHER.WEIGHTS.*there is no file"):
        attach(student_cfg(teacher_files))
    with pytest.raises(ConfigError, match="TEACHER.WEIGHTS is empty.*no model-zoo name"):
        attach(student_cfg(teacher_files, T + "WEIGHTS", ""))


@pytest.mark.parametrize("content", [b"", b"not weights at all"], ids=["empty", "foreign"])
def test_a_file_that_holds_no_weights_is_refused_naming_the_key(teacher_files, content):
    with open(teacher_files[1], "wb") as f:
        f.write(content)
    with pytest.raises(ConfigError, match="TEACHER.WEIGHTS.*can't be read as weights"):
        attach(student_cfg(teacher_files))


@pytest.mark.parametrize("opts", [("MODEL.META_ARCHITECTURE", "Typo"), ("MODEL.RESNETS.DEPTH", 18)])
def test_a_config_that_builds_no_model_is_refused_naming_the_keys(teacher_files, opts):
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE.*TEACHER.OPTS.*builds no model"):
        attach(student_cfg(teacher_files, T + "OPTS", opts))


def test_a_config_that_is_nowhere_lists_what_was_tried(teacher_files):
    cfg = student_cfg(teacher_files, T + "CONFIG_FILE", "no/such.yaml")
    with pytest.raises(ConfigError, match="(?s)TEACHER.CONFIG_FILE.*Tried.*configs.*model zoo"):
        attach(cfg)


def test_a_broken_config_or_override_names_its_key(teacher_files):
    with pytest.raises(ConfigError, match="TEACHER.OPTS.*NO_SUCH"):
        attach(student_cfg(teacher_files, T + "OPTS", ("MODEL.NO_SUCH", 1)))
    with pytest.raises(ConfigError, match="TEACHER.OPTS"):
        attach(student_cfg(teacher_files, T + "OPTS", (3, 4)))
    with open(teacher_files[0], "a") as f:
        f.write("NO_SUCH_KEY: 1\n")
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE.*NO_SUCH_KEY"):
        attach(student_cfg(teacher_files))


def test_a_config_file_cannot_run_code(teacher_files, tmp_path):
    with open(teacher_files[0], "a") as f:
        f.write(f"OWNED: !!python/object/apply:os.mkdir ['{tmp_path}/owned']\n")
    with pytest.raises(ConfigError, match="(?s)TEACHER.CONFIG_FILE.*python/object"):
        attach(student_cfg(teacher_files))
    assert not (tmp_path / "owned").exists()


def test_only_the_zoos_own_configs_may_compute_values(tmp_path):
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    path, zoo_name = find_config(name, key="KEY")
    cfg = tiny_cfg()
    merge_from_file(cfg, path, key="KEY")
    assert zoo_name == name and len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 5
    with open(model_zoo.get_config_file("Base-RetinaNet.yaml")) as f:
        (tmp_path / "copy.yaml").write_text(f.read())
    with pytest.raises(ConfigError, match="(?s)KEY.*copy.yaml.*python/object"):
        merge_from_file(tiny_cfg(), str(tmp_path / "copy.yaml"), key="KEY")


def test_a_zoo_name_finds_config_and_trained_checkpoint(tmp_path, monkeypatch):
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    narrow = {
        k: v
        for k, v in _flat(tiny_cfg(architecture="GeneralizedRCNN").MODEL, "MODEL.")
        if k.split(".")[1] in ("RESNETS", "FPN", "ROI_BOX_HEAD") or k.endswith("NUM_CLASSES")
    }
    opts = tuple(x for pair in narrow.items() for x in pair if pair[1] is not None)
    cfg = tiny_cfg(T + "CONFIG_FILE", name, T + "OPTS", opts)
    # The zoo's file, where detectron2's downloader would have put it.
    made = tiny_model(tiny_cfg(architecture="GeneralizedRCNN"), seed=3)
    path = "detectron2/COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    target = tmp_path / "cache" / path
    target.parent.mkdir(parents=True)
    import pickle

    weights = {k: v.numpy() for k, v in made.state_dict().items()}
    target.write_bytes(pickle.dumps({"model": weights, "__author__": "made for this test"}))
    _, teacher = attach(cfg)
    for k, v in teacher.model.state_dict().items():
        assert torch.equal(v, made.state_dict()[k])


def _flat(node, prefix):
    for k, v in node.items():
        if hasattr(v, "items"):
            yield from _flat(v, f"{prefix}{k}.")
        else:
            yield prefix + k, v


def test_the_teacher_is_outside_of_everything_that_belongs_to_the_student():
    student, teacher = distilling()
    ours = {id(p) for p in teacher.parameters()} | {id(m) for m in teacher.modules()}
    assert not ours & {id(p) for p in student.parameters()}
    assert not ours & {id(m) for m in student.modules()}
    assert not any("teacher" in k for k in student.state_dict())
    assert isinstance(student.teacher, Teacher) and student.teacher.model is teacher


def test_the_teacher_stays_in_eval_mode_and_unchanged_bit_for_bit_through_training():
    norm = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    student, teacher = distilling(*norm, teacher_opts=norm)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.001)
    for mode in (True, False, True):
        student.train(mode)
        assert not any(m.training for m in teacher.modules())
    for _ in range(2):
        losses, _ = train_losses(student, tiny_batch())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_the_teacher_follows_the_students_device_and_keeps_its_precision():
    student, teacher = distilling()
    student.double()
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    student.float().to("meta")
    assert all(p.device.type == "meta" for p in teacher.parameters())


def test_attaching_restores_the_global_random_state(teacher_files):
    cfg = student_cfg(teacher_files, "MODEL.CROSSKD.FUSION.IN_FEATURES", ("pool", "fc1"))
    student = build_model(cfg)

    def draw():
        return torch.rand(3), np.random.rand(3), random.random()

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    attach_teacher(student, cfg)
    drawn = draw()
    assert torch.equal(drawn[0], expected[0]) and (drawn[1] == expected[1]).all()
    assert drawn[2] == expected[2]


def test_an_rgb_student_and_a_bgr_teacher_see_the_same_picture():
    # Asymmetric mean and std, so that normalising before the swap would show.
    mean, std = [10.0, 50.0, 120.0], [1.0, 2.0, 4.0]
    rgb = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", mean[::-1], "MODEL.PIXEL_STD", std[::-1])
    bgr = ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", std)
    student, teacher = distilling(*rgb, teacher_opts=bgr)
    batch = tiny_batch()  # in the student's order, RGB
    in_bgr = [{**x, "image": x["image"][[2, 1, 0]]} for x in batch]
    seen = student.teacher.preprocess(batch).tensor
    assert torch.equal(seen, teacher.preprocess_image(in_bgr).tensor)
    assert torch.equal(seen.flip(1), student.preprocess_image(batch).tensor)
    with torch.no_grad():
        found, wanted = student.teacher.detect(batch), teacher(in_bgr)
    for one, other in zip(found, wanted):
        assert torch.equal(one["instances"].scores, other["instances"].scores)
    same, _ = distilling(*bgr, teacher_opts=bgr)
    assert torch.equal(same.teacher.preprocess(in_bgr).tensor, seen)


def test_channel_orders_that_are_no_permutation_are_refused():
    with pytest.raises(ConfigError, match="INPUT.FORMAT.*'L'.*'BGR'"):
        distilling("INPUT.FORMAT", "L")


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_precision_covers_the_teachers_own_forward_also_under_autocast(precision):
    student, _ = distilling(T + "PRECISION", precision)
    batch = tiny_batch()
    dtype = getattr(torch, precision)
    assert student.teacher.features(batch)["p2"].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student.teacher.features(batch)["p2"].dtype == dtype
    losses, _ = train_losses(student, batch)
    assert losses["loss_cls_kd"].dtype == torch.float32


def test_a_teacher_in_bfloat16_gives_nearly_the_same_losses():
    results = []
    for precision in ("float32", "bfloat16"):
        student, _ = distilling(T + "PRECISION", precision)
        losses, _ = train_losses(student, tiny_batch())
        results.append(losses["loss_cls_kd"].item())
    assert results[0] != results[1] and results[1] == pytest.approx(results[0], rel=0.2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_teacher_in_low_precision_pools_at_the_boxes_own_coordinates(precision):
    masks, calls = ("MODEL.MASK_ON", True), []
    rounding = torch.finfo(getattr(torch, precision)).eps
    student, teacher = distilling(*masks, T + "PRECISION", precision, teacher_opts=masks)
    poolers = teacher.roi_heads.box_pooler, teacher.roi_heads.mask_pooler
    for pooler in poolers:
        pooler.register_forward_hook(lambda *call: calls.append(call))
    train_losses(student, _far_to_the_right(tiny_batch(masks=True)))
    assert {id(pooler) for pooler, *_ in calls} == set(map(id, poolers))
    for pooler, (levels, boxes), pooled in calls:
        expected = pooler.forward([x.float() for x in levels], boxes)
        assert any((x.tensor[:, 0] > 1024).any() for x in boxes)
        torch.testing.assert_close(pooled.float(), expected, rtol=rounding, atol=rounding)


def _far_to_the_right(batch, pixels=1216):
    """Where neighbouring numbers of bfloat16 are 8 pixels apart, those of float16 one."""
    for x in batch:
        old, (height, width) = x["instances"], x["image"].shape[-2:]
        x["image"], x["width"] = F.pad(x["image"], (pixels, 0)), pixels + width
        x["instances"] = Instances((height, pixels + width), **old.get_fields())
        x["instances"].gt_boxes.tensor[:, ::2] += pixels
        x["instances"].gt_masks = BitMasks(F.pad(old.gt_masks.tensor, (pixels, 0)))
    return batch


def test_a_stock_student_cannot_be_attached_to():
    cfg = tiny_cfg(architecture="GeneralizedRCNN")
    with pytest.raises(ConfigError, match="META_ARCHITECTURE.*CrossKDRCNN"):
        attach_teacher(build_model(cfg), cfg, teacher=tiny_model())


def test_a_teacher_that_shares_parameters_with_the_student_is_refused():
    """It would freeze the student."""
    cfg = tiny_cfg()
    student, teacher = build_model(cfg), tiny_model()
    teacher.backbone = student.backbone
    for given in (student, teacher):
        with pytest.raises(ConfigError, match="shares parameters with the student.*give a copy"):
            attach_teacher(student, cfg, teacher=given)
    assert all(p.requires_grad for p in student.backbone.fpn_output2.parameters())


def test_a_teacher_that_shares_batch_norms_with_the_student_is_refused():
    """The student's training would change their statistics, though their parameters are frozen."""
    cfg = tiny_cfg("MODEL.RESNETS.NORM", "BN")
    student, teacher = build_model(cfg), tiny_model()
    teacher.backbone = student.backbone.requires_grad_(False)
    with pytest.raises(ConfigError, match="shares BatchNorm layers with the student.*give a copy"):
        attach_teacher(student, cfg, teacher=teacher)


def test_a_students_own_module_called_fusion_is_not_replaced():
    cfg = tiny_cfg("MODEL.CROSSKD.FUSION.NAME", "weighted")
    cfg.MODEL.CROSSKD.FUSION.IN_FEATURES = ("fc1", "fc2")
    student = build_model(cfg)
    student.fusion = own = torch.nn.Identity()
    with pytest.raises(ConfigError, match="CrossKDRCNN.fusion: this name is for what the distill"):
        attach_teacher(student, cfg, teacher=tiny_model())
    assert student.fusion is own and student.distiller is None
    own_head = tiny_cfg("MODEL.CROSSKD.MIMIC", "student_head")  # without a fusion
    attach_teacher(student, own_head, teacher=tiny_model())
    assert student.fusion is own


def test_a_second_teacher_replaces_what_was_learned_for_the_first():
    cfg = tiny_cfg("MODEL.CROSSKD.FUSION.IN_FEATURES", ("pool", "fc1"))
    student = build_model(cfg)
    attach_teacher(student, cfg, teacher=tiny_model(seed=1))
    first = student.fusion
    attach_teacher(student, cfg, teacher=tiny_model(seed=2))
    assert student.fusion is not first


def test_a_teacher_that_only_proposes_is_refused_with_the_reason():
    cfg = tiny_cfg()
    teacher = build_model(tiny_cfg("MODEL.META_ARCHITECTURE", "ProposalNetwork"))
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE.*ProposalNetwork.*GeneralizedRCNN"):
        attach_teacher(build_model(cfg), cfg, teacher=teacher)


C4 = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 32]]),
)
DC5 = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res5"]),
    *("MODEL.RESNETS.RES5_DILATION", 2),
    *("MODEL.RPN.IN_FEATURES", ["res5"], "MODEL.ROI_HEADS.IN_FEATURES", ["res5"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 32]]),
)


@pytest.mark.parametrize("teacher_opts", [C4, DC5], ids=["C4", "DC5"])
@pytest.mark.parametrize(
    "fusion", [("sum", ("fc1", "fc2")), ("none", ("pool",))], ids=["taps", "whole head"]
)
def test_teachers_without_a_pyramid_teach_through_their_box_head(teacher_opts, fusion):
    student = tiny_model(cfg := tiny_cfg(*_fusion(*fusion)), seed=1)
    attach_teacher(student, cfg, teacher=build_model(tiny_cfg(*teacher_opts)))
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and torch.isfinite(losses["loss_box_reg_kd"])
    losses["loss_cls_kd"].backward()
    assert student.roi_heads.box_head.fc1.weight.grad is not None or fusion[1] == ("pool",)


@pytest.mark.parametrize("teacher_opts", [C4, DC5], ids=["C4", "DC5"])
def test_teachers_without_a_pyramid_teach_every_stage_of_a_cascade(teacher_opts):
    student, _ = pair(teacher=build_model(tiny_cfg(*teacher_opts)))
    losses, _ = train_losses(student, tiny_batch())
    assert all(losses[key] > 0 and torch.isfinite(losses[key]) for key in KD_KEYS)


@pytest.mark.parametrize("student_opts", [C4, DC5], ids=["C4", "DC5"])
def test_students_without_a_pyramid_learn_from_one_with_it(student_opts):
    student = build_model(cfg := tiny_cfg(*student_opts))
    attach_teacher(student, cfg, teacher=tiny_model())
    losses, _ = train_losses(student.train(), tiny_batch())
    assert losses["loss_cls_kd"] > 0 and torch.isfinite(losses["loss_box_reg_kd"])


def _fusion(name, taps):
    entry = "pool" if taps == ("pool",) else ""
    prefix = "MODEL.CROSSKD.FUSION."
    return (prefix + "NAME", name, prefix + "IN_FEATURES", taps, prefix + "ENTRY", entry)


def test_a_c4_teacher_with_the_stock_res5_heads_is_refused_with_a_way_out():
    stock = (*C4, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
    cfg = tiny_cfg()
    with pytest.raises(ConfigError, match="Res5ROIHeads: no box head.*StandardROIHeads.*ROI_BOX_H"):
        attach_teacher(tiny_model(cfg), cfg, teacher=build_model(tiny_cfg(*stock)))


@pytest.mark.parametrize(
    "name, opts, reason",
    [
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", (), "Res5ROIHeads"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", (), "RetinaNet"),
    ],
)
def test_a_zoo_teacher_of_an_unsupported_kind_is_refused_before_its_download(
    name, opts, reason, monkeypatch
):
    def no_download(*args, **kwargs):
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(StrictReader, "load", no_download)
    cfg = tiny_cfg(T + "CONFIG_FILE", name, T + "OPTS", opts, T + "CLASS_MAP", ("teacher",))
    with pytest.raises(ConfigError, match=f"TEACHER.CONFIG_FILE.*{reason}"):
        attach(cfg)


def test_a_student_stays_without_a_teacher_whose_weights_do_not_load(teacher_files):
    os.remove(teacher_files[1])
    student = build_model(cfg := student_cfg(teacher_files))
    with pytest.raises(ConfigError, match="TEACHER.WEIGHTS"):
        attach_teacher(student, cfg)
    assert student.teacher is None and student.distiller is None


def test_a_lazyconfig_file_where_yaml_is_needed_is_said_to_be_one():
    with pytest.raises(ConfigError, match="--config-file.*fcos_R_50_FPN_1x.py.*LazyConfig"):
        name = "COCO-Detection/fcos_R_50_FPN_1x.py"
        merge_from_file(tiny_cfg(), find_config(name, key="KEY")[0], key="--config-file")
