"""Students that learn by the losses of other methods: LOSS.FEATURE_TYPE and LOSS.CLS_TYPE."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import distilling, tiny_batch, tiny_cfg, train_losses
from test_dense import pair

from crosskd_ifc import (
    BOX_LOSS_REGISTRY,
    CLS_LOSS_REGISTRY,
    FEATURE_LOSS_REGISTRY,
    ConfigError,
    decoupled_kl,
    dist,
    gap_giou,
)
from crosskd_ifc.common.config_files import flat
from crosskd_ifc.distillation.feature import FeatureDistiller
from crosskd_ifc.distillation.loss_types.levels import build_level_loss
from crosskd_ifc.distillation.traces import StepTrace
from crosskd_ifc.experiments.runs import Run
from crosskd_ifc.trainer import set_fusion_weight_decay

DOCS = os.path.join(os.path.dirname(__file__), "..", "..", "docs")
K = "MODEL.CROSSKD."
L = K + "LOSS."
TYPES = ("pkd", "cwd", "mgd", "fgd")
LEARNED = ("mgd", "fgd")
FEATURE = (L + "FEATURE_WEIGHT", 0.1, L + "FEATURE_COMBINE", False)
STUDENT_HEAD = (K + "MIMIC", "student_head")
MEAN = (K + "FUSION.NAME", "mean")
WIDE = ("MODEL.FPN.OUT_CHANNELS", 12)


def student_of(kind, *opts, teacher_opts=()):
    found = distilling if kind == "RCNN" else lambda *o, **more: pair(kind, *o, **more)
    return found(*opts, teacher_opts=teacher_opts)[0]


def learned(student):
    return {n: p for n, p in student.named_parameters() if n.startswith("fusion.")}


@pytest.mark.parametrize("factor", [1.0, 0.0])
@pytest.mark.parametrize("more", [(), STUDENT_HEAD], ids=["cross_head", "student_head"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", ["RCNN", "RetinaNet", "FCOS"])
def test_all_that_a_feature_loss_learns_gets_a_gradient_in_every_step(kind, name, more, factor):
    wide = WIDE if kind == "RCNN" else ()
    student = student_of(kind, *FEATURE, L + "FEATURE_TYPE", name, *more, teacher_opts=wide)
    assert bool([n for n in learned(student) if ".loss." in n]) == (name in LEARNED)
    student.kd_factor = factor
    found, _ = train_losses(student, tiny_batch())
    assert torch.isfinite(found["loss_feature_kd"])
    assert bool(found["loss_feature_kd"] > 0) == (factor > 0)
    sum(found.values()).backward()
    for n, p in learned(student).items():
        assert p.grad is not None and torch.isfinite(p.grad).all(), n


def test_what_a_feature_loss_learns_stands_beside_the_fusions_and_shares_their_settings():
    taps = (K + "FUSION.NAME", "weighted", K + "FUSION.WEIGHT_DECAY", 0.25)
    student = student_of("RCNN", *FEATURE, *taps, L + "FEATURE_TYPE", "mgd")
    names = set(learned(student))
    assert "fusion.combine.scores" in names
    assert "fusion.feature.p6.loss.generator.0.weight" in names
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    cfg = tiny_cfg(*taps)
    set_fusion_weight_decay(optimizer, cfg, student)
    group = next(g for g in optimizer.param_groups if g["weight_decay"] == 0.25)
    assert len(group["params"]) == len(names)


def test_without_a_cross_head_its_weight_decay_is_set_too():
    decay = (K + "FUSION.WEIGHT_DECAY", 0.25)
    student = student_of("RCNN", *FEATURE, L + "FEATURE_TYPE", "mgd", *STUDENT_HEAD, *decay)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, weight_decay=0.5)
    set_fusion_weight_decay(optimizer, tiny_cfg(*decay), student)
    (group,) = (g for g in optimizer.param_groups if g["weight_decay"] == 0.25)
    assert set(group["params"]) == set(learned(student).values())
    with pytest.raises(ConfigError, match="FUSION.WEIGHT_DECAY is 0.25, but MIMIC 'student_head'"):
        student_of("RCNN", *STUDENT_HEAD, *decay)  # nothing is learned


def test_a_feature_loss_without_learned_parameters_adds_none():
    assert not learned(student_of("RCNN", *FEATURE, L + "FEATURE_TYPE", "cwd"))


def test_a_feature_type_of_ones_own_takes_ten_lines():
    @FEATURE_LOSS_REGISTRY.register(name="boxes_for_test")
    class Boxes(torch.nn.Module):
        def __init__(self, channels, *, scale=1.0):
            super().__init__()
            self.channels, self.scale = channels, scale

        def forward(self, student, teacher, boxes):
            assert student.shape == teacher.shape and student.shape[1] == self.channels
            return student.sum() * 0 + self.scale * torch.cat(boxes).sum()

    opts = (L + "FEATURE_TYPE", "boxes_for_test", L + "FEATURE_OPTS", ("scale", 3.0))
    found, _ = train_losses(student_of("RCNN", *FEATURE, *opts, teacher_opts=WIDE), tiny_batch())
    boxes = torch.cat([x["instances"].gt_boxes.tensor for x in tiny_batch()])
    wanted = sum(0.1 * 3.0 * boxes.sum() / stride for stride in (4, 8, 16, 32, 64))
    torch.testing.assert_close(found["loss_feature_kd"], wanted)


def test_a_feature_loss_gets_its_boxes_where_the_features_are():
    class Boxes(torch.nn.Module):
        def forward(self, student, teacher, boxes):
            assert {x.device for x in boxes} == {student.device}
            return student.sum()

    levels = torch.nn.ModuleDict({"p2": Boxes()})
    maps = {"p2": torch.zeros(2, 3, 4, 4, device="meta")}  # stands for a GPU
    step = StepTrace(SimpleNamespace(features=maps), tiny_batch(), 1.0, False, maps)
    FeatureDistiller(levels=levels, sources=(), weight=1.0).losses(step)


@pytest.fixture
def seen():
    """What a classification loss is given."""
    given = []
    if "spy_for_test" not in CLS_LOSS_REGISTRY:

        @CLS_LOSS_REGISTRY.register(name="spy_for_test")
        def spy(cross_logits, teacher_logits, *, targets, temperature, scale=1.0):
            spy.given.append((cross_logits, teacher_logits, targets, temperature))
            return cross_logits.sum() * 0 + scale

    CLS_LOSS_REGISTRY.get("spy_for_test").given = given
    return given


SPY = (L + "CLS_TYPE", "spy_for_test")


@pytest.mark.parametrize("more", [MEAN, STUDENT_HEAD], ids=["cross_head", "student_head"])
def test_dkd_and_dist_are_the_losses_of_the_logits_and_the_ground_truth(more, seen):
    found, _ = train_losses(
        student_of("RCNN", *SPY, L + "CLS_OPTS", ("scale", 8.0), *more), tiny_batch()
    )
    assert found["loss_cls_kd"] == 0.5 * 8  # CLS_WEIGHT, CLS_OPTS
    cross, teacher, targets, temperature = seen[0]
    assert temperature == 3.0 and set(targets.tolist()) == {0, 1, 2, 3}
    dkd = (L + "CLS_TYPE", "dkd", L + "CLS_OPTS", ("beta", 2.0), L + "TEMPERATURE", 2.0)
    found, _ = train_losses(student_of("RCNN", *dkd, *more), tiny_batch())
    settings = {"temperature": 2.0, "alpha": 1.0, "beta": 2.0, "normalizer": len(cross)}
    wanted = 0.5 * decoupled_kl(cross, teacher, targets, **settings)
    torch.testing.assert_close(found["loss_cls_kd"], wanted)
    found, _ = train_losses(student_of("RCNN", L + "CLS_TYPE", "dist", *more), tiny_batch())
    wanted = 0.5 * dist(cross, teacher, temperature=3.0, inter=1.0, intra=1.0)
    torch.testing.assert_close(found["loss_cls_kd"], wanted)


def test_targets_are_columns_of_the_teachers_classes_or_of_those_that_are_compared(seen):
    # Student class 0 is the teacher's 2, 1 has none, 2 is the teacher's 4.
    classes = (K + "TEACHER.CLASS_MAP", ((0, 2), (1, ""), (2, 4)))
    wide = ("MODEL.ROI_HEADS.NUM_CLASSES", 5)
    plain = student_of("RCNN", *SPY)
    train_losses(plain, tiny_batch())
    truth = seen.pop()[2]
    for more, columns in (((), [2, 5, 4, 5]), (STUDENT_HEAD, [0, 2, 1, 2])):
        train_losses(student_of("RCNN", *SPY, *classes, *more, teacher_opts=wide), tiny_batch())
        cross, teacher, targets, _ = seen.pop()
        assert cross.shape == teacher.shape == (len(truth), max(columns) + 1)
        assert targets.tolist() == [columns[i] for i in truth.tolist()]


def test_with_no_box_in_the_batch_dkd_and_dist_are_finite():
    batch = tiny_batch(boxes_per_image=(0, 0))
    for name in ("dkd", "dist"):
        for more in ((), STUDENT_HEAD):
            found, _ = train_losses(student_of("RCNN", L + "CLS_TYPE", name, *more), batch)
            assert torch.isfinite(found["loss_cls_kd"]) and found["loss_cls_kd"] > 0
    found, _ = train_losses(student_of("RCNN", *FEATURE, L + "FEATURE_TYPE", "fgd"), batch)
    assert torch.isfinite(found["loss_feature_kd"])


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            (L + "FEATURE_TYPE", "cwd", L + "FEATURE_COMBINE", True),
            "FEATURE_COMBINE is True, but cwd compares each level .*; set it to False",
        ),
        ((L + "FEATURE_TYPE", "cvd"), "LOSS.FEATURE_TYPE is 'cvd'; possible values: .*'cwd'"),
        ((L + "CLS_TYPE", "kld"), "LOSS.CLS_TYPE is 'kld'; possible values: .*'kl'"),
        ((L + "FEATURE_OPTS", ("tau", 1.0)), r"FEATURE_OPTS \(of .*'pkd'\).* no 'tau'.*: none"),
        (
            (L + "FEATURE_TYPE", "cwd", L + "FEATURE_OPTS", ("temperature",)),
            r"FEATURE_OPTS .* NAME VALUE pairs; possible .*: temperature \[1.0\]",
        ),
        (
            (L + "FEATURE_TYPE", "mgd", L + "FEATURE_OPTS", ("mask_ratio", 1.5)),
            "FEATURE_OPTS .*mask_ratio must be .* less than 1, not 1.5",
        ),
        ((L + "CLS_OPTS", ("alpha", 1.0)), r"CLS_OPTS \(of CLS_TYPE 'kl'\).* no 'alpha'"),
        (
            (L + "CLS_TYPE", "dkd", L + "CLS_OPTS", ("alpha", "one")),
            r"CLS_OPTS .*alpha must be a number; .* alpha \[1.0\], beta \[0.25\]",
        ),
        (
            (L + "CLS_TYPE", "dkd", L + "CLS_OPTS", ("alpha", 1, "alpha", 2)),
            "CLS_OPTS .* a name stands in it twice",
        ),
        *(
            (
                (L + "CLS_TYPE", name, L + "CLS_OPTS", (option, -1.0)),
                rf"CLS_OPTS \(of .*'{name}'\) is \('{option}', -1.0\): no weight may be less",
            )
            for name, option in (*(("dkd", x) for x in ("alpha", "beta")), ("dist", "intra"))
        ),
        (
            (L + "CLS_TYPE", "dkd", K + "TEACHER.CLASS_MAP", ("teacher",)),
            r"CLASS_MAP.*nothing in common, but MODEL.CROSSKD.LOSS.CLS_TYPE 'dkd' compares",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(opts, message):
    with pytest.raises(ConfigError, match=message):
        student_of("RCNN", *FEATURE, *opts)


def test_a_loss_of_the_ground_truths_class_without_a_weight_needs_no_class_map():
    teacher = (K + "TEACHER.CLASS_MAP", ("teacher",))
    found, _ = train_losses(
        student_of("RCNN", L + "CLS_TYPE", "dkd", L + "CLS_WEIGHT", 0.0, *teacher), tiny_batch()
    )
    plain, _ = train_losses(student_of("RCNN"), tiny_batch())
    assert found["loss_cls_kd"] == 0
    assert torch.equal(found["loss_box_reg_kd"], plain["loss_box_reg_kd"])


def test_a_feature_type_without_a_weight_is_refused():
    message = "LOSS.FEATURE_TYPE is 'mgd', but LOSS.FEATURE_WEIGHT is 0"
    with pytest.raises(ConfigError, match=message):
        student_of("RCNN", L + "FEATURE_TYPE", "mgd")


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_dense_detectors_refuse_losses_of_softmax_scores(kind):
    message = "LOSS.CLS_TYPE is 'dkd', but CrossKD.* is a dense detector, .*quality focal"
    with pytest.raises(ConfigError, match=message):
        student_of(kind, L + "CLS_TYPE", "dkd")


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_bckd_compares_boxes_where_the_students_own_scores_differ_from_the_teachers(kind):
    seen = []
    if "gap_for_test" not in BOX_LOSS_REGISTRY:

        @BOX_LOSS_REGISTRY.register(name="gap_for_test")
        def spy(cross_boxes, teacher_boxes, gap, *, normalizer):
            spy.seen.append(gap)
            return gap_giou(cross_boxes, teacher_boxes, gap, normalizer=normalizer)

    BOX_LOSS_REGISTRY.get("gap_for_test").seen = seen
    own = (*STUDENT_HEAD, L + "BOX_WEIGHT", 4.0, L + "BOX_TYPE")
    student, teacher = pair(kind, *own, "gap_for_test")
    found, _ = train_losses(student, tiny_batch())
    scores = []
    with torch.no_grad():
        for model in (student, teacher):
            images = model.preprocess_image(tiny_batch())
            features = model.backbone(images.tensor)
            maps = model.head([features[name] for name in model.head_in_features])[0]
            maps = [x.unflatten(1, (-1, 3)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in maps]
            scores.append(torch.cat(maps, dim=1).sigmoid().flatten(0, 1))
    wanted = (scores[0] - scores[1]).abs().amax(dim=1)
    counts = seen[0] > 0  # others are ignored, or have no box to learn from
    assert counts.float().mean() > 0.5
    torch.testing.assert_close(seen[0][counts], wanted[counts])
    again, _ = train_losses(pair(kind, *own, "bckd")[0], tiny_batch())
    assert again["loss_box_reg_kd"] > 0
    torch.testing.assert_close(again["loss_box_reg_kd"], found["loss_box_reg_kd"])
    sum(again.values()).backward()


def test_bckd_is_for_dense_detectors():
    with pytest.raises(ConfigError, match="LOSS.BOX_TYPE 'bckd' is for dense detectors"):
        student_of("RCNN", L + "BOX_TYPE", "bckd")


def test_the_losses_that_the_docs_show_work_and_take_ten_lines():
    with open(os.path.join(DOCS, "extending.md")) as f:
        section = f.read().split("## A loss\n")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    lengths = [len([line for line in code.splitlines() if line]) for code in examples]
    assert len(lengths) == 3 and max(lengths) <= 10
    found = {}
    for code in examples:
        (name,) = re.findall(r"name=\"(\w+)\"", code)
        if not any(
            name in r for r in (FEATURE_LOSS_REGISTRY, CLS_LOSS_REGISTRY, BOX_LOSS_REGISTRY)
        ):
            exec(code, {})
        kind = "RCNN" if "BOX_LOSS" not in code else "RetinaNet"
        key = re.findall("(FEATURE|CLS|BOX)_LOSS_REGISTRY", code)[0]
        settings = FEATURE if key == "FEATURE" else ()
        losses, _ = train_losses(student_of(kind, *settings, f"{L}{key}_TYPE", name), tiny_batch())
        loss = {"FEATURE": "feature", "CLS": "cls", "BOX": "box_reg"}[key]
        found[name] = losses[f"loss_{loss}_kd"]
    assert set(found) == {"l1", "mse", "corners"}
    assert all(torch.isfinite(value) and value > 0 for value in found.values())


def test_the_table_of_costs_is_what_the_configs_say():
    with open(os.path.join(DOCS, "methods.md")) as f:
        rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \| (\d+) \|", f.read())
    assert len(rows) == 9
    for config, parameters, settings in rows:
        plain = "retinanet" if "retinanet" in config else "faster_rcnn"
        ours, theirs = (
            Run("", f"COCO-Detection/{name}.yaml", "").cfg()
            for name in (config, f"{plain}_R_18_FPN_1x")
        )
        before = dict(flat(theirs))
        changed = [k for k, v in flat(ours) if v != before[k] and k != "OUTPUT_DIR"]
        assert len(changed) == int(settings), (config, changed)
        level, loss = 0, ours.MODEL.CROSSKD.LOSS
        if loss.FEATURE_WEIGHT:
            level = sum(p.numel() for p in build_level_loss(loss, 256, 256, 8).parameters())
        levels = len(loss.FEATURE_LEVELS) or 5
        assert levels * level == int(parameters.replace(",", "")), config


def test_the_time_and_memory_of_each_method_are_the_measured_ones():
    with open(os.path.join(DOCS, "methods.md")) as f:
        rows = dict(re.findall(r"\| `(\w+)_R_18_FPN_1x` \| [\d,]+ \| \d+ \| (.*) \|", f.read()))
    assert len(rows) == 9
    for method, told in rows.items():
        path = os.path.join(DOCS, "..", "benchmarks", "step_cost", f"method_{method}_cpu.json")
        with open(path) as f:
            found = json.load(f)
        ratio, peak = found["ratios"]["c/a"], found["peak_bytes"]
        cells = [f"{ratio['median']:.2f}", "{:.2f} to {:.2f}".format(*ratio["quartiles"])]
        cells += [f"{(peak['distillation'] - peak['student']) / 2**20:.0f}"]
        assert told == " | ".join(cells), method
