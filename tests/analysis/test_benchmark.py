"""What the benchmark measures; no time is asserted."""

import gzip
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import tiny_cfg, tiny_model
from test_cascade_teachers import CASCADE
from test_dense import dense_cfg

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.analysis.benchmark.instruments import peak_on_cpu
from crosskd_ifc.analysis.benchmark.step import (
    PARTS,
    Case,
    StepBenchmark,
    make_batch,
    summarize_times,
)
from crosskd_ifc.analysis.benchmark.sweep import draw_sweep, sweep
from crosskd_ifc.analysis.benchmark.trace import gpu_use

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
SMALL = Case(48, 64, boxes=3)
KINDS = ("RCNN", "RetinaNet", "FCOS")


def student_cfg(folder, kind, *opts):
    """A student's config; of its teacher there is a config, but no weights."""
    teacher = tiny_cfg(*(CASCADE if kind == "Cascade" else ()), architecture="GeneralizedRCNN")
    if kind in ("RetinaNet", "FCOS"):
        teacher = dense_cfg(kind, stock=True)
    (folder / "teacher.yaml").write_text(teacher.dump())
    names = ("MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(folder / "teacher.yaml"))
    names += ("MODEL.CROSSKD.TEACHER.WEIGHTS", "none.pth")
    if kind == "Cascade":
        names += (*CASCADE, "MODEL.ROI_HEADS.NAME", "CrossKDCascadeROIHeads")
    two_stage = kind in ("RCNN", "Cascade")
    return tiny_cfg(*names, *opts) if two_stage else dense_cfg(kind, *names, *opts)


@pytest.mark.parametrize("kind", [*KINDS, "Cascade"])
def test_every_part_runs_in_every_round_and_changes_no_weight(kind, tmp_path):
    bench = StepBenchmark(student_cfg(tmp_path, kind), SMALL)
    before = {k: v.clone() for k, v in bench.student.state_dict().items()}
    seconds = bench.measure(2, warmup=0)
    assert tuple(seconds) == PARTS and all(len(v) == 2 and min(v) > 0 for v in seconds.values())
    after = bench.student.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert set(before) == set(bench.plain.state_dict())
    pieces = bench.breakdown(1)
    assert {"student backbone", "teacher backbone", "rest of the forward", "backward"} <= set(
        pieces
    )
    assert min(pieces.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_give_activations_of_ordinary_size(kind, tmp_path):
    bench = StepBenchmark(student_cfg(tmp_path, kind), SMALL)
    for model in (bench.plain, bench.student, bench.stock_teacher, bench.student.teacher.model):
        with torch.no_grad():
            features = model.backbone.bottom_up(model.preprocess_image(bench.batch).tensor)
        assert all(0.1 < x.std() < 10 for x in features.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_distillation_step_holds_no_less_memory_than_a_plain_one(kind, tmp_path):
    memory = StepBenchmark(student_cfg(tmp_path, kind), Case(96, 128)).peak_memory()
    assert set(memory) == set(PARTS) and min(memory.values()) > 0
    assert memory["distillation"] >= memory["student"]


# What makes the host wait for a GPU; indexing with a mask calls nonzero.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


def waits(part):
    part()  # caches are filled, TorchScript is compiled
    torch.manual_seed(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        part()
    return Counter(event.name for event in profile.events() if event.name in WAITS)


K = "MODEL.CROSSKD."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "opts",
    [
        (),
        (K + "MIMIC", "student_head", K + "FUSION.NAME", "mean"),
        (K + "LOSS.BOX_TYPE", "giou", K + "LOSS.FEATURE_WEIGHT", 1.0),
        (K + "FUSION.NAME", "attention", K + "FUSION.ALIGN", "standardize"),
    ],
    ids=["default", "student_head", "giou_and_features", "attention_and_standardize"],
)
def test_a_step_makes_the_host_wait_only_where_detectron2s_own_code_does(kind, opts, tmp_path):
    parts = StepBenchmark(student_cfg(tmp_path, kind, *opts), SMALL).parts
    plain, teacher, both = (waits(parts[name]) for name in ("student", "teacher", "distillation"))
    assert plain and both == plain + teacher


def test_memory_is_counted_to_the_byte():
    def part():
        a = torch.zeros(1000)
        del a
        b = torch.zeros(3000)
        b += torch.ones(500).sum()

    assert 4 * 3500 <= peak_on_cpu(part) <= 4 * 3500 + 256


def test_attaching_a_teacher_copies_no_tensor_twice(tmp_path):
    """What the file holds, the model that it goes into, and nothing of that size besides."""
    stock = tiny_cfg(architecture="GeneralizedRCNN")
    weights = tiny_model(stock).state_dict()
    torch.save({"model": weights}, tmp_path / "teacher.pth")
    student_cfg(tmp_path, "RCNN")  # writes the teacher's config
    cfg = tiny_cfg(
        *(K + "TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")),
        *(K + "TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")),
    )
    peak = peak_on_cpu(lambda student=tiny_model(cfg): attach_teacher(student, cfg))
    size = sum(x.numel() * x.element_size() for x in weights.values())
    assert 2 * size <= peak <= 2.5 * size


def test_a_students_own_head_needs_no_cross_head_pass(tmp_path):
    bench = StepBenchmark(
        student_cfg(tmp_path, "RCNN", "MODEL.CROSSKD.MIMIC", "student_head"), SMALL
    )
    assert "cross_head" not in bench.measure(1, warmup=0)


def test_ratios_are_taken_within_each_round():
    seconds = {"student": [1.0, 2.0], "teacher": [1.0, 2.0], "cross_head": [0.5, 1.0]}
    found = summarize_times({**seconds, "distillation": [3.0, 5.0]})
    assert found["ratios"]["c/a"]["median"] == 2.75
    assert found["ratios"]["c/(a+b)"]["median"] == 1.375
    assert found["ratios"]["c/floor"]["median"] == 1.1
    assert found["ratios"]["(a+b)/a"] == {"median": 2.0, "quartiles": [2.0, 2.0]}
    assert found["seconds"]["student"]["median"] == 1.5


def test_a_teacher_of_a_lazyconfig_is_refused(tmp_path):
    cfg = student_cfg(tmp_path, "RCNN")
    (tmp_path / "teacher.py").write_text("model = dict()")
    cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.py")
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE is a LazyConfig; the benchmark"):
        StepBenchmark(cfg, SMALL)


def test_several_teachers_are_refused():
    cfg = tiny_cfg("MODEL.CROSSKD.TEACHERS", [{"WEIGHTS": "a.pth"}, {"WEIGHTS": "b.pth"}])
    with pytest.raises(
        ConfigError, match="TEACHERS has 2 teachers, but the benchmark times .* one"
    ):
        StepBenchmark(cfg, SMALL)


def test_a_batch_is_what_detectron2s_loader_gives():
    batch = make_batch(Case(40, 60, images=3, boxes=5), num_classes=2, has_masks=True)
    assert len(batch) == 3
    for one in batch:
        truth = one["instances"]
        assert one["image"].shape == (3, 40, 60) and one["image"].dtype == torch.uint8
        assert len(truth) == 5 and truth.gt_boxes.nonempty().all()
        assert truth.gt_classes.max() < 2 and truth.gt_masks.tensor.shape == (5, 40, 60)


def test_the_tool_prints_ratios_and_writes_numbers(tmp_path, capsys):
    (tmp_path / "student.yaml").write_text(student_cfg(tmp_path, "RCNN").dump())
    tool = runpy.run_path(str(TOOL))
    out = tmp_path / "out" / "cost.json"
    words = ["--config-file", tmp_path / "student.yaml", "--device", "cpu", "--rois", 16]
    words += ["--image-size", 48, 64, "--rounds", 2, "--output", out]
    words += ["--profile", tmp_path / "trace" / "step.json"]
    tool["main"](tool["parse_args"](list(map(str, words))))
    printed = capsys.readouterr().out
    assert "c/(a+b)" in printed
    assert "cpu: 2 images of 48 x 64 pixels (height x width), 8 boxes each" in printed
    found = json.loads(out.read_text())
    assert {"command", "versions", "hardware", "seconds", "ratios", "peak_bytes"} <= set(found)
    assert found["case"] == {"height": 48, "width": 64, "images": 2, "boxes": 8}
    seconds, speed = found["seconds"]["distillation"], found["images_per_second"]["distillation"]
    assert speed == pytest.approx(2 / seconds["median"], rel=0.02)
    trace = json.loads((tmp_path / "trace" / "step.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::conv2d", "ConvolutionBackward0"} <= names
    assert found["profiled_step"] is None  # there is no GPU in it


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, the profiler's errors are errors"
)
def test_on_a_cpu_the_profiler_reports_no_error(tmp_path):
    (tmp_path / "student.yaml").write_text(student_cfg(tmp_path, "RetinaNet").dump())
    words = ["--config-file", tmp_path / "student.yaml", "--device", "cpu", "--rounds", 1]
    words += ["--image-size", 48, 64, "--profile", tmp_path / "step.json"]
    command = [sys.executable, "-W", "ignore", str(TOOL), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1] / "projects")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "c/a" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["step.json", "step.json.gz"])
def test_a_gpu_is_busy_while_any_of_its_work_runs(tmp_path, name):
    def event(category, name, start, duration):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        event("kernel", "conv", 300.0, 100.0),
        event("kernel", "conv", 1000.0, 500.0),
        event("kernel", "nms", 1200.0, 100.0),  # beside the convolution
        event("gpu_memcpy", "copy", 1400.0, 200.0),
        event("cpu_op", "aten::conv2d", 0.0, 5000.0),
        {"ph": "M", "name": "process_name"},
    ]
    write = gzip.open if name.endswith(".gz") else open
    with write(tmp_path / name, "wt") as f:
        json.dump({"traceEvents": events}, f)
    found = gpu_use(str(tmp_path / name))
    assert (found["span"], found["busy"]) == pytest.approx((1300e-6, 700e-6))
    assert list(found["kernels"]) == ["conv", "nms"]
    assert found["kernels"]["conv"] == pytest.approx(600e-6)
    assert list(gpu_use(str(tmp_path / name), top=1)["kernels"]) == ["conv"]


def test_a_sweep_varies_one_size_at_a_time_and_is_drawn(tmp_path):
    cases = []

    def build(case, *opts):
        cases.append((case, opts))
        return StepBenchmark(student_cfg(tmp_path, "RetinaNet", *opts), case)

    results = sweep(build, SMALL, rounds=2)
    assert [r["what"] for r in results] == ["image height"] * 3 + ["images"] * 3 + ["taps"] * 3
    assert all(case == SMALL for case, opts in cases if opts)
    path = draw_sweep(results, str(tmp_path / "sweep"))
    assert path == str(tmp_path / "sweep.png") and Path(path).stat().st_size > 1000
