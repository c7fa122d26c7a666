"""docs/deploy.md: its program runs an exported file without torch, its numbers are recorded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_deployed import make

from crosskd_ifc.weights.deployed import difference
from crosskd_ifc.weights.export import export_student

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
RECORDED = PAGE.parents[1] / "benchmarks" / "deployment"
WITHOUT = """
import runpy, sys
for name in ("torch", "torchvision", "detectron2", "crosskd_ifc", "PIL"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    (text,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(text.splitlines()) <= 60
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.M)
    assert set(imported) == {"json", "sys", "pathlib", "cv2", "numpy", "onnxruntime"}
    path = tmp_path_factory.mktemp("program") / "detect.py"
    path.write_text(text)
    return path


def run_program(*arguments):
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    boxes = torch.tensor([[float(x) for x in row[2:]] for row in rows]).view(-1, 4)
    scores = torch.tensor([float(row[1]) for row in rows])
    return boxes, scores, torch.tensor([int(row[0]) for row in rows])


@pytest.mark.parametrize("kind, channels", [("Mask R-CNN", "BGR"), ("RetinaNet", "RGB")])
def test_it_finds_and_draws_what_the_student_finds(kind, channels, program, tmp_path):
    picture = np.random.RandomState(0).randint(0, 256, (130, 190, 3), dtype="uint8")
    cv2.imwrite(str(tmp_path / "image.png"), picture)
    run, student = make(kind, tmp_path / "run", "INPUT.FORMAT", channels)
    options = dict(format="onnx", images=[str(tmp_path / "image.png")])
    export_student(run, str(tmp_path / "out"), **options)
    drawn = tmp_path / "drawn.png"
    found = run_program(program, tmp_path / "out", tmp_path / "image.png", drawn, 0)
    image = torch.from_numpy(picture[:, :, :: 1 if channels == "BGR" else -1].copy())
    with torch.no_grad():
        wanted = student([{"image": image.permute(2, 0, 1)}])[0]["instances"]
    wanted = Instances((130, 190), **{k: wanted.get(k) for k in FIELDS})
    assert len(wanted) > 10
    found = Instances((130, 190), **dict(zip(FIELDS, (Boxes(found[0]), *found[1:]))))
    assert difference(found, wanted) == ""
    assert (cv2.imread(str(drawn)) != picture).mean() > 0.01


FIELDS = ("pred_boxes", "scores", "pred_classes")


def test_it_resizes_and_pads_to_a_fixed_size(program, tmp_path):
    smooth = np.random.RandomState(0).randint(0, 256, (6, 9, 3), dtype="uint8")
    smooth = cv2.resize(smooth, (304, 200), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "image.png"), smooth)
    run, student = make("Faster R-CNN", tmp_path / "run")
    options = dict(format="onnx", images=[str(tmp_path / "image.png")], size=(130, 152))
    export_student(run, str(tmp_path / "out"), **options)
    drawn = tmp_path / "drawn.png"
    boxes, scores, _ = run_program(program, tmp_path / "out", tmp_path / "image.png", drawn, 0)
    padded = student.pixel_mean.repeat(1, 130, 152)
    half = cv2.resize(smooth, (152, 100), interpolation=cv2.INTER_AREA)
    padded[:, :100] = torch.from_numpy(half).permute(2, 0, 1)
    with torch.no_grad():
        wanted = student([{"image": padded}])[0]["instances"]
    best = wanted.pred_boxes.tensor[0].clamp(max=torch.tensor([152.0, 100, 152, 100])) * 2
    assert (boxes[0] - best).abs().max() < 0.02 and abs(scores[0] - wanted.scores[0]) < 1e-3


def rows_between(what):
    """Cells of the table that benchmarks/deployment/measure.py writes."""
    begin, end = f"<!-- {what}: benchmarks/deployment/measure.py -->", f"<!-- end of {what} -->"
    text = PAGE.read_text().split(begin)[1].split(end)[0]
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def recorded(what):
    return [json.loads(path.read_text()) for path in RECORDED.glob(f"*_{what}.json")]


def test_the_aps_in_the_docs_are_the_recorded_ones_and_those_of_files_are_the_checkpoints():
    told, wanted = rows_between("ap"), []
    for found in recorded("ap"):
        assert found["images"] == 300 and found["dataset"] == "crosskd_shapes_test"
        results, sizes = found["results"], found["bytes"]
        for task in results["checkpoint"]:
            aps = [results[x][task]["AP"] for x in ("checkpoint", "torchscript", "onnx", "int8")]
            assert max(abs(ap - aps[0]) for ap in aps[:3]) <= 0.1
            sizes_told = f"{sizes['onnx'] / 1e6:.1f} / {sizes['int8'] / 1e6:.1f}"
            wanted.append([{"bbox": "boxes", "segm": "masks"}[task], *map("{:.2f}".format, aps)])
            wanted[-1].append(sizes_told)
    assert sorted(row[1:] for row in told) == sorted(wanted)


def test_the_speeds_in_the_docs_are_the_recorded_ones():
    wanted, kinds = [], ("teacher", "checkpoint", "torchscript", "onnx", "int8")
    for found in recorded("speed"):
        speeds = found["images_per_second"]
        assert found["rounds"] >= 20 and found["dataset"] == "crosskd_shapes_test"
        cells = [f"{speeds[x]['median']:.1f}" if x in speeds else "" for x in kinds]
        wanted.append(cells)
    assert sorted(row[1:] for row in rows_between("speed")) == sorted(wanted)
