"""The block in the log that says what will be distilled."""

import re

import pytest
import torch
from helpers import distilling, tiny_cfg, tiny_model
from test_dense import dense_cfg, pair

from crosskd_ifc import CrossKDTrainer
from crosskd_ifc.modeling.summary import count_flops, count_parameters, describe_distillation

K = "MODEL.CROSSKD."


def described(*opts, **kwargs):
    student, _ = distilling(*opts, **kwargs)
    text = describe_distillation(student, tiny_cfg(*opts))
    return student, {line.split()[0]: line for line in text.splitlines()[1:]}, text


def test_taps_route_combination_and_entry_are_named_with_shapes():
    student, lines, _ = described(
        *(K + "FUSION.IN_FEATURES", ("pool", "fc2"), K + "FUSION.ENTRY", "fc1"),
        *(K + "FUSION.NAME", "mean"),
        teacher_opts=("MODEL.ROI_BOX_HEAD.FC_DIM", 24),
    )
    assert "pool (8x7x7), fc2 (16) -> direct -> MeanFusion -> the teacher's fc1 (24)" in (
        lines["cross-head"]
    )
    assert lines["cross-head"].endswith("-> its fc2, predictor")
    pool, fc2 = (count_parameters(student.fusion.adapters[tap]) for tap in ("pool", "fc2"))
    assert f"adapter of pool {pool}, adapter of fc2 {fc2} parameters" in lines["adapters"]
    assert f"{count_parameters(student.teacher.model) / 1e6:.2f} M" in lines["teacher"]
    assert "GFLOPs" in lines["student"] and "not counted" not in lines["student"]


def test_taps_with_a_loss_each_are_told_and_one_tap_is_not_combined():
    _, lines, _ = described()
    assert lines["cross-head"].endswith(
        "pool (8x7x7), fc1 (16), fc2 (16) -> each through -> the teacher's fc2 (16) -> its "
        "predictor"
    )
    assert lines["terms"].endswith("1 x pool, 0.5 x fc1, 0.5 x fc2")
    one = (K + "FUSION.IN_FEATURES", ("pool",), K + "FUSION.ENTRY", "pool")
    _, lines, _ = described(*one, K + "FUSION.ALIGN", "standardize")
    assert lines["cross-head"].endswith(
        "pool (8x7x7) -> standardize -> the teacher's pool (8x7x7) -> its fc1, fc2, predictor"
    )
    assert lines["terms"].endswith("1 x pool")


def test_losses_schedule_and_classes_are_told():
    _, lines, _ = described(
        *(K + "LOSS.FEATURE_WEIGHT", 2.0, K + "LOSS.CLS_WEIGHT", 0.0, K + "LOSS.BOX_TYPE", "giou"),
        *(K + "SCHEDULE.START_ITER", 5, K + "SCHEDULE.WARMUP_ITERS", 7),
        *(K + "SCHEDULE.STOP_ITER", 50),
    )
    assert (
        lines["losses"].split("losses")[1].strip()
        == "box 1 (giou), feature 2 (pkd, all levels added)"
    )
    assert lines["schedule"].endswith("from iteration 5, rising over 7 iterations, to iteration 50")
    assert "the student's 3, the teacher's 3, in the same order" in lines["classes"]
    assert lines["adapters"].endswith("none: the shapes agree")


def test_what_kinds_of_losses_there_are_is_told():
    feature = (K + "LOSS.FEATURE_WEIGHT", 2.0, K + "LOSS.FEATURE_TYPE", "fgd")
    feature += (K + "LOSS.FEATURE_COMBINE", False)
    _, lines, _ = described(*feature, K + "LOSS.CLS_TYPE", "dkd")
    losses = lines["losses"].split("losses")[1].strip()
    assert losses == "cls 0.5 (dkd, temperature 3), box 1 (l1), feature 2 (fgd, level with level)"
    _, lines, text = described(*feature, K + "LOSS.CLS_WEIGHT", 0.0, K + "LOSS.BOX_WEIGHT", 0.0)
    assert lines["losses"].endswith("losses       feature 2 (fgd, level with level)")
    assert "not compared" in lines["predictions"] and "terms" not in lines and "pool" not in text


def test_the_students_own_head_has_no_cross_head():
    _, lines, text = described(K + "MIMIC", "student_head")
    assert "student's own predictions" in lines["own"] and "cross-head" not in text


def test_terms_and_detached_taps_are_told():
    _, lines, _ = described(
        *(K + "LOSS.FUSED_WEIGHT", 0.5, K + "LOSS.TAP_WEIGHTS", (0.0, 0.25)),
        *(K + "FUSION.DETACH", ("fc1",), K + "FUSION.NAME", "mean", K + "MIMIC", "both"),
    )
    assert "fc1 (16, detached), fc2 (16)" in lines["cross-head"]
    assert lines["terms"].endswith("0.5 x combined, 0.25 x fc2") and "own" in lines
    assert "fused" not in lines["losses"]


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_a_dense_detector_has_a_line_for_each_tower(kind):
    student, _ = pair(kind)
    text = describe_distillation(student, dense_cfg(kind))
    assert "cls tower" in text and "bbox tower" in text and "standardize" in text
    assert re.search(r"conv1 \(\d+ channels\)", text) and "not counted" not in text


def test_nothing_is_changed_by_counting():
    student, teacher = distilling()
    student.backbone.eval()  # a mode of its own
    modes = [m.training for m in student.modules()]
    for model in (student, teacher):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        assert count_flops(model) > 0
        assert torch.equal(torch.rand(3), expected)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in student.modules()] == modes
    assert not any(m.training for m in teacher.modules())


def test_flops_are_those_of_the_layers():
    small, big = (distilling(teacher_opts=("MODEL.ROI_BOX_HEAD.FC_DIM", d))[1] for d in (16, 64))
    assert count_flops(big) > count_flops(small)


def test_a_network_that_cannot_be_traced_is_still_described(monkeypatch):
    student, _ = distilling()
    monkeypatch.setattr(student, "inference", lambda *_: 1 / 0)
    assert "FLOPs not counted (ZeroDivisionError)" in describe_distillation(student, tiny_cfg())


def test_a_training_starts_with_it(tmp_path, caplog):
    stock = tiny_cfg(architecture="GeneralizedRCNN")
    (tmp_path / "teacher.yaml").write_text(stock.dump())
    torch.save({"model": tiny_model(stock).state_dict()}, tmp_path / "teacher.pth")
    cfg = tiny_cfg(
        *(K + "TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")),
        *(K + "TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")),
    )
    caplog.set_level("INFO", logger="crosskd_ifc")
    model = CrossKDTrainer.build_model(cfg)
    assert "What will be distilled:\n  student" in caplog.text
    assert model.training  # as detectron2's trainer wants it
