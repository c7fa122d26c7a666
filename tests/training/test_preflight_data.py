"""Training data that must be the same on all machines, and test data that an evaluator can read."""

import json
import re
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import answers_of_two, tiny_cfg
from test_cards import Coco

from crosskd_ifc import ConfigError
from crosskd_ifc.data.cards import register_card
from crosskd_ifc.training.preflight_data import check_same_everywhere, check_test_data


@pytest.mark.parametrize(
    "classes, numbers, message",
    [
        (("abc", "abc"), (5, 5), ""),
        (("abc", "acb"), (5, 5), "'theirs' has other classes .*process 1 .*class 1 is 'c' and 'b'"),
        (("abc", "ab"), (5, 5), "class 2 is None and 'c'"),
        (("abc", "abc"), (5, 4), "DATASETS.TRAIN: 4 images in process 1 and 5 in the main process"),
    ],
    ids=["same", "order", "fewer", "images"],
)
def test_machines_with_other_data_dont_train_together(tmp_path, classes, numbers, message):
    def check(rank):
        DatasetCatalog.register("theirs", list)
        MetadataCatalog.get("theirs").set(thing_classes=list(classes[rank]))
        try:
            check_same_everywhere(tiny_cfg("DATASETS.TRAIN", ("theirs",)), numbers[rank])
        except ConfigError as error:
            return str(error)
        return ""

    for answer in answers_of_two(tmp_path, check):
        assert re.search(message, answer) if message else answer == ""


def coco_without_card(folder, change=lambda data: None):
    """The name of a COCO data set that detectron2's own function has registered."""
    data = Coco(folder)
    change(data)
    (data.root / "train.json").write_text(json.dumps(data.json))
    path, images = str(data.root / "train.json"), str(data.root / "images")
    register_coco_instances("own_coco", {}, path, images)
    return tiny_cfg("DATASETS.TEST", ("own_coco",))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.json["annotations"][1].pop("area"), "annotation 2: 'area' is missing"),
        (lambda data: data.json.pop("categories"), ": KeyError categories in .*train.json"),
        (lambda data: shutil.rmtree(data.root / "images"), "0.png: the image is missing"),
    ],
    ids=["area", "categories", "images"],
)
def test_test_data_without_a_card_are_looked_at_before_a_training(change, message, tmp_path):
    cfg = coco_without_card(tmp_path, change)
    with pytest.raises(ConfigError, match=f"^DATASETS.TEST: 'own_coco'.*{message}"):
        check_test_data(cfg)


def test_usable_test_data_without_a_card_pass(tmp_path, caplog):
    check_test_data(coco_without_card(tmp_path))
    assert not [x for x in caplog.records if x.levelname == "WARNING"]


def test_test_data_that_are_not_there_are_one_error_before_a_training(tmp_path):
    register_coco_instances("not_there", {}, str(tmp_path / "no.json"), str(tmp_path))
    with pytest.raises(ConfigError, match="^DATASETS.TEST: 'not_there': FileNotFoundError .*no.js"):
        check_test_data(tiny_cfg("DATASETS.TEST", ("not_there",)))


def test_test_images_of_a_card_that_are_not_there_are_one_error_before_a_training(tmp_path):
    data = Coco(tmp_path)
    (data.root / "train.json").write_text(json.dumps(data.json))
    register_card(str(data.card))
    shutil.move(str(data.root / "images"), str(data.root / "pictures"))
    with pytest.raises(ConfigError, match="^DATASETS.TEST: 'tinyco_train': .*0.png: the image is"):
        check_test_data(tiny_cfg("DATASETS.TEST", ("tinyco_train",)))


def test_boxes_that_no_detector_can_find_are_told(tmp_path, caplog):
    def flatten(data):
        data.json["annotations"][0]["bbox"][2] = 0
        data.json["annotations"][1].update(iscrowd=1, bbox=[0, 0, 0, 0])

    check_test_data(coco_without_card(tmp_path, flatten))
    assert "'own_coco': 1 of 6 boxes have no area" in caplog.text
