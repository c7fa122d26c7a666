"""Data sets that exported files are evaluated on, usable and not."""

import json
import runpy
import shutil

import pytest
from detectron2.data import MetadataCatalog
from test_cards import Coco, Voc
from test_deployed import images, make  # noqa: F401  a fixture
from test_evaluating import TOOL

from crosskd_ifc import ConfigError
from crosskd_ifc.data.cards import register_card
from crosskd_ifc.weights import evaluating
from crosskd_ifc.weights.evaluating import evaluate_checkpoint, evaluate_deployed
from crosskd_ifc.weights.export import export_student

TWO = ("MODEL.ROI_HEADS.NUM_CLASSES", 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, images):  # noqa: F811
    """(checkpoint, folder of the exported file) of a student of two classes without names."""
    folder = tmp_path_factory.mktemp("student")
    run, _ = make("Faster R-CNN", folder / "run", *TWO)
    export_student(run, str(folder / "out"), format="torchscript", images=images)
    return run, str(folder / "out")


def test_a_voc_folder_is_evaluated_as_often_as_asked(exported, tmp_path):
    run, out = exported
    name = register_card(str(Voc(tmp_path).card))[0]
    found = evaluate_deployed(out, name), evaluate_checkpoint(run, name)
    assert found[0]["bbox"].keys() == found[1]["bbox"].keys()
    assert "json_file" not in MetadataCatalog.get(name).as_dict()


def coco(folder, change=lambda content: None):
    """The name of a registered COCO data set of two classes without outlines."""
    data = Coco(folder)
    change(data.json)
    (data.root / "train.json").write_text(json.dumps(data.json))
    return register_card(str(data.card))[0]


def without(field):
    return lambda content: content["annotations"][1].pop(field)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("area"), "train.json: annotation 2: 'area' is missing"),
        (without("iscrowd"), "train.json: annotation 2: 'iscrowd' is missing"),
        (lambda content: content.pop("annotations"), "train.json: there are no annotations in it"),
        (lambda content: content.update(annotations=[]), "there are no annotations in it"),
        (
            lambda content: content["categories"].append({"id": 9, "name": "tube"}),
            "has the classes cell, rod, tube, but .* 2, whose names aren't known",
        ),
    ],
)
def test_a_data_set_that_cannot_be_evaluated_is_one_error(change, message, exported, tmp_path):
    name = coco(tmp_path, change)
    for evaluate, model in zip((evaluate_checkpoint, evaluate_deployed), exported):
        with pytest.raises(ConfigError, match=f"^--dataset 'tinyco_train' .*{message}"):
            evaluate(model, name)


@pytest.mark.parametrize("kind", [Coco, Voc])
def test_masks_need_a_data_set_with_outlines(kind, exported, tmp_path):
    name = coco(tmp_path) if kind is Coco else register_card(str(Voc(tmp_path).card))[0]
    out = tmp_path / "out"
    shutil.copytree(exported[1], out)
    info = json.loads((out / "model.json").read_text())
    info["outputs"].append("masks")
    (out / "model.json").write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="can't be evaluated: .*'segmentation' is missing"):
        evaluate_deployed(str(out), name)


def test_keypoints_are_measured_by_the_sigmas_of_the_training(images, tmp_path):  # noqa: F811
    def mark(content):
        content["categories"] = [{"id": 1, "name": "person"}]
        for annotation in content["annotations"]:
            annotation.update(category_id=1, keypoints=[9, 9, 2] * 3, num_keypoints=3)

    name, sigmas = coco(tmp_path, mark), [0.1, 0.2, 0.3]
    run, _ = make("Keypoint R-CNN", tmp_path / "run", "TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    out = tmp_path / "out"
    export_student(run, str(out), format="torchscript", images=images)
    found, wanted = evaluate_deployed(str(out), name), evaluate_checkpoint(run, name)
    assert set(found) == set(wanted) == {"bbox", "keypoints"}
    info = json.loads((out / "model.json").read_text())
    assert info["keypoint_sigmas"] == sigmas
    (out / "model.json").write_text(json.dumps({**info, "keypoint_sigmas": []}))
    with pytest.raises(ConfigError, match="needs three numbers for each of 17 keypoints"):
        evaluate_deployed(str(out), name)


@pytest.mark.parametrize("name", ["model.ts", "model.onnx"])
def test_a_damaged_file_is_one_line(name, exported, tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    out = tmp_path / "out"
    shutil.copytree(exported[1], out)
    (out / name).write_bytes((out / "model.ts").read_bytes()[:9999])
    info = json.loads((out / "model.json").read_text())
    (out / "model.json").write_text(json.dumps({**info, "file": name}))
    assert main([str(out), "--dataset", coco(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"evaluate_export: {out / name}: it can't be run; export it again (")
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        main([str(out), "--dataset", "x", "--threads", "-1"])
    assert "--threads at least 0" in capsys.readouterr().err


def test_all_detections_in_a_photo_of_a_card_count(tmp_path):
    name = coco(tmp_path)
    asked = evaluating._Asked(masks=False, keypoints=False, sigmas=[])
    assert evaluating._evaluator(name, str(tmp_path), asked)._max_dets_per_image[2] > 100
