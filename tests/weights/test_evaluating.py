"""AP of exported files, and of the checkpoint that they came from."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from test_deployed import make

from crosskd_ifc import ConfigError
from crosskd_ifc.weights.evaluating import compare, evaluate_checkpoint, evaluate_deployed
from crosskd_ifc.weights.export import export_student
from crosskd_ifc.weights.timing import images_per_second, measure_in_turns

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate_export.py"


@pytest.fixture
def labelled(tmp_path):
    """A function that registers images whose labels are the student's best detections, moved."""

    def register(student):
        images, annotations = [], []
        random = np.random.RandomState(0)
        for i, (height, width) in enumerate([(130, 150), (200, 160)], start=1):
            picture = random.randint(0, 256, (height, width, 3), dtype="uint8")
            Image.fromarray(picture[:, :, ::-1]).save(tmp_path / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
            image = torch.from_numpy(picture).permute(2, 0, 1)
            with torch.no_grad():
                found = student([{"image": image}])[0]["instances"][:30:3]
            for (x0, y0, x1, y1), c in zip(found.pred_boxes.tensor.tolist(), found.pred_classes):
                box = [x0 + 0.2 * (x1 - x0), y0, x1 - x0, y1 - y0]
                mask = [box[0], y0, box[0], y1, box[0] + box[2], y1, box[0] + box[2], y0]
                annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": int(c) + 1}
                annotation.update(bbox=box, area=box[2] * box[3], iscrowd=0, segmentation=[mask])
                annotations.append(annotation)
        categories = [{"id": k, "name": f"class{k}"} for k in (1, 2, 3)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "labels.json").write_text(json.dumps({"info": {}, **content}))
        register_coco_instances("labelled", {}, str(tmp_path / "labels.json"), str(tmp_path))

    return register


@pytest.mark.parametrize("kind, tasks", [("Mask R-CNN", {"bbox", "segm"}), ("FCOS", {"bbox"})])
@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_a_file_has_the_ap_of_its_checkpoint(kind, tasks, format, labelled, tmp_path):
    run, student = make(kind, tmp_path / "run", "DATASETS.TEST", ("labelled",))
    labelled(student)
    export_student(run, str(tmp_path / "out"), format=format)
    found = evaluate_deployed(str(tmp_path / "out"), "labelled")
    wanted = evaluate_checkpoint(run, "labelled")
    assert set(found) == set(wanted) == tasks and wanted["bbox"]["AP"] > 5
    assert compare(found, wanted, 0.1) == []


def test_a_data_set_with_the_classes_in_another_order_is_refused(labelled, tmp_path):
    run, student = make("Faster R-CNN", tmp_path / "run", "DATASETS.TEST", ("labelled",))
    labelled(student)
    export_student(run, str(tmp_path / "out"), format="torchscript")
    info = tmp_path / "out" / "model.json"
    content = json.loads(info.read_text())
    assert content["classes"] == ["class1", "class2", "class3"]
    info.write_text(json.dumps({**content, "classes": ["class2", "class1", "class3"]}))
    with pytest.raises(ConfigError, match="--dataset 'labelled' .*class1.*class2.*class2.*class1"):
        evaluate_deployed(str(tmp_path / "out"), "labelled")


def test_another_ap_is_an_error_and_so_is_an_unknown_data_set(labelled, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    run, student = make("Faster R-CNN", tmp_path / "run", "DATASETS.TEST", ("labelled",))
    labelled(student)
    out = str(tmp_path / "out")
    export_student(run, out, format="torchscript")
    arguments = [out, "--dataset", "labelled", "--checkpoint"]
    kept = tmp_path / "kept" / "ap.json"
    assert main([*arguments, run, "--json", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: bbox AP " in printed and f"{run}: bbox AP " in printed
    content = json.loads(kept.read_text())
    assert content["results"]["torchscript"] == content["results"]["checkpoint"]
    assert f"bbox AP {content['results']['checkpoint']['bbox']['AP']:.2f}" in printed
    assert content["images"] == 2 and content["command"].endswith(f"--json {kept}")
    assert content["bytes"] == {"torchscript": (tmp_path / "out" / "model.ts").stat().st_size}
    assert main([*arguments, run, "--json", str(kept)]) == 1
    assert f"--json: {kept} exists; give another --json, or --force" in capsys.readouterr().err
    other, _ = make("Faster R-CNN", tmp_path / "other", "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.1)
    assert main([*arguments, other]) == 1
    assert "has bbox AP" in capsys.readouterr().err
    assert main([out, out, "--dataset", "labelled"]) == 1
    assert "EXPORTED are torchscript, torchscript; give one of each" in capsys.readouterr().err
    assert main([out, "--dataset", "unknown"]) == 1
    assert "--dataset 'unknown' is not registered; give its card" in capsys.readouterr().err
    assert main([str(tmp_path), "--dataset", "labelled"]) == 1
    assert "model.json: no such file" in capsys.readouterr().err
    assert "labelled" in DatasetCatalog


def test_the_tool_measures_speed_in_turns(labelled, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    run, student = make("RetinaNet", tmp_path / "run", "DATASETS.TEST", ("labelled",))
    labelled(student)
    out, kept = str(tmp_path / "out"), tmp_path / "speed.json"
    export_student(run, out, format="onnx")
    arguments = [out, "--dataset", "labelled", "--speed", "2", "--json", str(kept)]
    assert main([*arguments, "--checkpoint", run, "--teacher", run]) == 0
    content = json.loads(kept.read_text())
    assert (content["images"], content["rounds"]) == (2, 2)
    speeds = content["images_per_second"]
    assert list(speeds) == ["teacher", "checkpoint", "onnx"]
    printed = capsys.readouterr().out
    assert all(f" {x['median']:.1f} " in printed and x["median"] > 0 for x in speeds.values())


def test_code_of_the_training_may_register_the_data_set(labelled, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    run, student = make("RetinaNet", tmp_path / "run", "DATASETS.TEST", ("labelled",))
    labelled(student)
    export_student(run, str(tmp_path / "out"), format="torchscript")
    (tmp_path / "my_data.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('mine', {{}}, '{tmp_path}/labels.json', '{tmp_path}')\n"
    )
    config = tmp_path / "my.yaml"
    config.write_text("_BASE_: run/config.yaml\nMODEL: {CROSSKD: {IMPORTS: [my_data.py]}}\n")
    arguments = [str(tmp_path / "out"), "--dataset", "mine", "--checkpoint", run]
    assert main(arguments) == 1
    assert "the --config-file whose code registers it" in capsys.readouterr().err
    arguments += ["--config-file", str(config)]
    assert main([*arguments, "--speed", "1"]) == 0
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
    for name in [name for name in sys.modules if name.startswith("my_data_")]:
        del sys.modules[name]  # as in a new process
    assert main(arguments) == 0


def test_a_teachers_config_lies_beside_its_weights_or_is_named(labelled, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    run, student = make("RetinaNet", tmp_path / "run", "DATASETS.TEST", ("labelled",))
    labelled(student)
    export_student(run, str(tmp_path / "out"), format="torchscript")
    teacher, config = tmp_path / "teacher.pth", tmp_path / "teacher.yaml"
    shutil.copy(run, teacher)
    arguments = [str(tmp_path / "out"), "--dataset", "labelled", "--speed", "1", "--images", "1"]
    arguments += ["--teacher", str(teacher)]
    assert main(arguments) == 1
    assert "teacher.pth: there is no config in it" in capsys.readouterr().err
    shutil.copy(tmp_path / "run" / "config.yaml", config)
    assert main(arguments) == 0
    config.rename(tmp_path / "moved.yaml")
    assert main([*arguments, "--teacher-config", str(tmp_path / "moved.yaml")]) == 0
    with pytest.raises(SystemExit):
        main([*arguments[:-2], "--teacher-config", "x.yaml"])


def test_parts_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    parts = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure_in_turns(parts, rounds=3)
    assert all(len(x) == 3 for x in seconds.values())
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) > 3 and all(sorted(x) == ["a", "b", "c"] for x in rounds)
    assert set(rounds[-3:]) == {"abc", "bca", "cab"}


def test_images_per_second_are_medians_over_rounds():
    assert images_per_second([1.0, 2.0, 4.0], 8) == {"median": 4.0, "quartiles": [3.0, 6.0]}
    assert images_per_second([0.5], 8) == {"median": 16.0, "quartiles": [16.0, 16.0]}


def test_an_ap_that_is_missing_or_no_number_differs():
    nan = float("nan")
    assert compare({"bbox": {"AP": 1.05}}, {"bbox": {"AP": 1.0}}, 0.1) == []
    assert compare({}, {"bbox": {"AP": 1.0}}, 0.1) == ["bbox AP nan instead of 1.00"]
    assert compare({"bbox": {"AP": nan}}, {"bbox": {"AP": 1.0}}, 0.1)
