"""tools/report.py and what it calls."""

import json
import math
import re
import runpy
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from helpers import tiny_cfg, tiny_model
from PIL import Image

from crosskd_ifc import CrossKDTrainer
from crosskd_ifc.analysis.run_record import RunRecord
from crosskd_ifc.analysis.worst_images import Errors, count_errors
from crosskd_ifc.data.shapes import CLASSES, generate

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
report = runpy.run_path(str(TOOL))["invoke_main"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
ODD = "<b>$1 & $2"
NAMES = [ODD, *CLASSES[1:]]
MAGENTA = (255, 0, 255)


def log(folder, lines):
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics():
    lines = [{"iteration": 0, "teacher/bbox/AP": 40.0, f"teacher/bbox/AP-{ODD}": 33.25}]
    for i in (19, 39, 59):
        losses = {"loss_cls": 1 / i, "loss_cls_kd": 2 / i, "total_loss": 3 / i}
        kd = {"crosskd/agreement_student": 0.5, "crosskd/fused_cosine": 0.25, "time": 0.5}
        lines.append({"iteration": i, **losses, **kd, "data_time": 0.01})
    per_class = {f"bbox/AP-{name}": float(i) for i, name in enumerate(NAMES)}
    per_class[f"bbox/AP-{NAMES[-1]}"] = float("nan")
    lines.append({"iteration": 39, "bbox/AP": 7.5, "bbox/AP50": 15.0})
    lines.append({"iteration": 60, "bbox/AP": 12.5, "bbox/AP50": 25.0, **per_class})
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The OUTPUT_DIR of a distillation of 60 iterations; one test image is magenta."""
    folder = tmp_path_factory.mktemp("report")
    generate(str(folder / "data"), num_images={"test": 4}, image_size=64, seed=3)
    image = sorted((folder / "data" / "test").iterdir())[1]
    Image.new("RGB", (64, 64), MAGENTA).save(image)
    path = folder / "data" / "annotations" / "test.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = ODD
    path.write_text(json.dumps(content))
    card = {"name": "reported", "format": "coco", "root": "data", "classes": NAMES}
    card["splits"] = {"test": {"json": "annotations/test.json", "images": "test"}}
    (folder / "card.yaml").write_text(yaml.safe_dump({**card, "evaluator": "coco"}))
    count = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))
    teacher = tiny_cfg(*count, architecture="GeneralizedRCNN")
    (folder / "teacher.yaml").write_text(teacher.dump())
    torch.save({"model": tiny_model(teacher, seed=7).state_dict()}, folder / "teacher.pth")
    out = folder / "run"
    settings = {
        "MODEL.CROSSKD.TEACHER.CONFIG_FILE": str(folder / "teacher.yaml"),
        "MODEL.CROSSKD.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
        "DATASETS.CARDS": (str(folder / "card.yaml"),),
        "DATASETS.TRAIN": ("reported_test",),
        "DATASETS.TEST": ("reported_test",),
        "SOLVER.MAX_ITER": 60,
        "OUTPUT_DIR": str(out),
    }
    cfg = tiny_cfg(*count, *(x for pair in settings.items() for x in pair))
    out.mkdir()
    (out / "config.yaml").write_text(cfg.dump())
    torch.save({"model": tiny_model(cfg, seed=8).state_dict()}, out / "model_final.pth")
    log(out, metrics())
    return out


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """A page with all sections."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    report([str(run), "--output", str(out), "--device", "cpu", "--threshold", "0.1"])
    return out


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.headings, self.words, self.tags, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "h2":
            self.headings.append(data)
            self.tags.append("")
        if self.tags and self.tags[-1] != "style":
            self.words.append(data)


def parse(path):
    found = _Text()
    found.feed(path.read_text())
    return found, " ".join(found.words)


def test_a_page_tells_curves_classes_worst_images_cost_and_settings(page):
    found, words = parse(page)
    expected = ["Evaluation", "Losses", "Distillation", "AP by class (bbox)", "Worst images"]
    assert [h for h in found.headings if h.strip()] == [*expected, "Cost", "Settings"]
    for text in ("12.5", "40.0", "60", "0.50 s", "50%", "33.2", "MODEL.CROSSKD.TEACHER.WEIGHTS"):
        assert text in words
    assert "What will be distilled" in words and "cross-head" in words
    assert re.search(r"student: \d+ right, \d+ missed, \d+ false", words)
    assert len(found.links) == 3 + 4 * 4  # curves, and four columns of each image


def test_nothing_is_fetched_and_no_script_runs(page):
    found, _ = parse(page)
    assert all(link.startswith("data:image/") for link in found.links)
    assert "script" not in found.tags and "link" not in found.tags


def test_names_are_text(page):
    found, words = parse(page)
    assert ODD in words and "b" not in found.tags[found.tags.index("table") :]


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browser_shows_the_page_with_its_pictures(page, tmp_path):
    shot = tmp_path / "shot.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1240,4000"]
    command += [f"--user-data-dir={tmp_path}", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    # The magenta photo is there, in each of the four columns.
    is_photo = (np.abs(pixels - MAGENTA).sum(axis=2) < 40).any(axis=0)
    assert np.count_nonzero(np.diff(is_photo.astype(int)) == 1) >= 4
    assert pixels.shape[1] == 1240 and is_photo[-40:].sum() == 0  # nothing sticks out


def test_the_logs_alone_make_a_page(run, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.json"):
        shutil.copy(run / name, tmp_path / "run")
    report([str(tmp_path / "run"), "--no-models"])
    found, _ = parse(tmp_path / "run" / "report.html")
    assert "Worst images" not in found.headings and "Losses" in found.headings
    with pytest.raises(SystemExit, match="^error: --output: .*report.html exists.* --force"):
        report([str(tmp_path / "run"), "--no-models"])
    report([str(tmp_path / "run"), "--no-models", "--force"])
    with pytest.raises(SystemExit, match="^error: .*there are no weights.*--no-models"):
        report([str(tmp_path / "run"), "--force"])
    report([str(tmp_path / "run"), "--no-models", "--output", str(tmp_path / "new/er/page.html")])
    assert (tmp_path / "new/er/page.html").is_file()


def test_a_plain_students_page_has_no_distillation(run, tmp_path):
    cfg = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), architecture="GeneralizedRCNN")
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ("reported_test",)
    cfg.DATASETS.CARDS = (str(run.parent / "card.yaml"),)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": tiny_model(cfg).state_dict()}, tmp_path / "model_0000019.pth")
    log(tmp_path, [{"iteration": 19, "loss_cls": 1.0, "time": 0.1}])
    report([str(tmp_path), "--device", "cpu"])
    found, words = parse(tmp_path / "report.html")
    assert "Distillation" not in found.headings and "Worst images" in found.headings
    assert "There was no evaluation yet" in words and "teacher:" not in words
    cfg.DATASETS.TEST = ()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    report([str(tmp_path), "--device", "cpu", "--force"])
    assert "DATASETS.TEST is empty" in parse(tmp_path / "report.html")[1]


def test_the_teacher_is_evaluated_on_demand(run, tmp_path):
    log(tmp_path, [line for line in metrics() if "teacher/bbox/AP" not in line])
    for name in ("config.yaml", "model_final.pth"):
        shutil.copy(run / name, tmp_path)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["OUTPUT_DIR"] = str(tmp_path / "where_it_ran")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    report([str(tmp_path), "--device", "cpu", "--evaluate-teacher", "--images", "1"])
    _, words = parse(tmp_path / "report.html")
    assert "AP (bbox), teacher" in words and "teacher wasn't evaluated" not in words
    assert not (tmp_path / "where_it_ran").exists()


def _with_teacher(run, folder, *opts):
    """A run like ``run`` whose teacher's config has these settings too, not evaluated yet."""
    teacher = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), architecture="GeneralizedRCNN")
    teacher.merge_from_list(opts)
    (folder / "teacher.yaml").write_text(teacher.dump())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["MODEL"]["CROSSKD"]["TEACHER"]["CONFIG_FILE"] = str(folder / "teacher.yaml")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy(run / "model_final.pth", folder)
    log(folder, [line for line in metrics() if "teacher/bbox/AP" not in line])


def test_the_teacher_is_evaluated_at_its_own_size(run, tmp_path, monkeypatch):
    _with_teacher(run, tmp_path, "INPUT.MIN_SIZE_TEST", 96)
    seen, test = [], CrossKDTrainer.test

    def spy(cfg, model):
        seen.append(cfg.INPUT.MIN_SIZE_TEST)
        return test(cfg, model)

    monkeypatch.setattr(CrossKDTrainer, "test", spy)
    report([str(tmp_path), "--device", "cpu", "--evaluate-teacher", "--images", "1"])
    assert seen == [96]


def test_a_teacher_of_other_classes_is_not_evaluated_on_the_students(run, tmp_path):
    MetadataCatalog.get("classes_of_the_teacher").thing_classes = list("abcdefgh")
    DatasetCatalog.register("classes_of_the_teacher", list)
    _with_teacher(run, tmp_path, "DATASETS.TRAIN", ("classes_of_the_teacher",))
    with pytest.raises(SystemExit, match="EVAL_AT_START compares class by class, but class 0"):
        report([str(tmp_path), "--device", "cpu", "--evaluate-teacher", "--images", "1"])


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "config.yaml: no such file; give the OUTPUT_DIR of a training"),
        ({"config.yaml": "VERSION: 2"}, "metrics.json: no such file"),
        ({"config.yaml": "model:\n  _target_: x\n"}, "config.yaml: a run of a LazyConfig; .*YAML"),
        ({"config.yaml": "VERSION: 2", "metrics.json": "{"}, "nothing has been logged yet"),
        ({"config.yaml": "KEY: 1", "metrics.json": ""}, "Non-existent config key: KEY"),
    ],
)
def test_a_folder_that_is_no_training_is_refused(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        report([str(tmp_path), "--no-models"])
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_went_back_counts_from_there(tmp_path):
    (tmp_path / "config.yaml").write_text(tiny_cfg("SOLVER.MAX_ITER", 100).dump())
    lines = [{"iteration": i, "loss_cls": 1.0} for i in range(19, 100, 20)]
    # Within one writing, lines come in any order.
    lines.insert(2, {"iteration": 25, "bbox/AP": 1.0})
    log(tmp_path, lines)
    assert [i for i, _ in RunRecord(str(tmp_path)).series("loss_cls")] == [19, 39, 59, 79, 99]
    assert RunRecord(str(tmp_path)).evaluations("bbox") == [(26, 1.0)]
    lines += [{"iteration": i, "loss_cls": 2.0} for i in (39, 59)]
    log(tmp_path, lines)
    record = RunRecord(str(tmp_path))
    assert record.series("loss_cls") == [(19, 1.0), (39, 2.0), (59, 2.0)]
    assert record.iterations == 60
    # Two writings are 20 iterations apart.
    lines = [{"iteration": i, "loss_cls": float(n)} for n, i in enumerate((19, 39, 19))]
    log(tmp_path, lines)
    assert RunRecord(str(tmp_path)).series("loss_cls") == [(19, 2.0)]


def test_a_student_that_ends_without_a_detection_has_an_ap_of_0(tmp_path):
    (tmp_path / "config.yaml").write_text(tiny_cfg("SOLVER.MAX_ITER", 200).dump())
    lines = [{"iteration": 99, "bbox/AP": 21.5, "bbox/AP-cell": 21.5, "loss_cls": 1.0}]
    log(tmp_path, [*lines, {"iteration": 200, "bbox/AP": math.nan}])
    record = RunRecord(str(tmp_path))
    assert record.evaluations("bbox") == [(100, 21.5), (200, 0.0)]
    assert record.per_class("bbox") == {}


def instances(boxes, classes, scores=None):
    found = Instances((64, 64), pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4).float()))
    found.pred_classes = torch.tensor(classes, dtype=torch.long)
    if scores is not None:
        found.scores = torch.tensor(scores)
    return found


def test_each_object_is_found_once_and_by_its_class():
    a, b, c = [0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]
    truth = instances([a, b, c], [0, 1, 1])
    found = instances([a, [0, 0, 10, 9], b, c], [0, 0, 0, 1], [0.9, 0.8, 0.7, 0.6])
    assert count_errors(found, truth) == Errors(missed=1, false=2, right=2)
    assert count_errors(found, truth).f1 == 4 / 7
    nothing = instances([], [], [])
    assert count_errors(nothing, truth) == Errors(3, 0, 0)
    assert count_errors(nothing, instances([], [])).f1 == 1
    assert count_errors(found, instances([], [])) == Errors(0, 4, 0)
