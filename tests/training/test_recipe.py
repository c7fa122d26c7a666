"""``tools/prepare_data.py configs``: what it writes loads, fits the data, and fits together."""

import json
import shlex

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import tiny_cfg
from PIL import Image

from crosskd_ifc import ConfigError, CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import merge_from_file
from crosskd_ifc.config import class_count, distillation_requested, fusion_name
from crosskd_ifc.data.card import load_card
from crosskd_ifc.data.check import check_card
from crosskd_ifc.data.class_names import fill_in_class_count
from crosskd_ifc.modeling.attach import load_teacher_config
from crosskd_ifc.training.preflight import check_training_config
from crosskd_ifc.training.preflight_data import check_classes
from crosskd_ifc.training.recipe import DETECTORS, write_configs


def make_card(folder, *, images=40, size=(640, 480), side=24, classes=("a", "b", "c"), rle=False):
    """A card whose boxes are squares of ``side`` pixels; no image is on disk but the first."""
    Image.new("RGB", size).save(folder / "0.png")
    outline = [[1, 1, 20, 1, 20, 20]]
    if rle:
        outline = {"size": [size[1], size[0]], "counts": [10, size[0] * size[1] - 10]}
    content = {
        "images": [
            {"id": i, "file_name": "0.png", "width": size[0], "height": size[1]}
            for i in range(images)
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i,
                "category_id": i % len(classes) + 1,
                "bbox": [5, 5, side, side],
                "area": side * side,
                "iscrowd": 0,
                "segmentation": outline,
            }
            for i in range(images)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    (folder / "data.json").write_text(json.dumps(content))
    card = {"name": "recipe", "format": "coco", "root": "."}
    card["splits"] = {s: {"json": "data.json", "images": "."} for s in ("test", "train", "val")}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return str(folder / "card.yaml")


def load(path):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    merge_from_file(cfg, str(path), key="--config-file")
    fill_in_class_count(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("detector", DETECTORS)
def test_the_configs_of_each_detector_load_and_fit_together(detector, pretrained, tmp_path):
    out = tmp_path / "configs"
    options = dict(teacher="R50", student="R18", detector=detector, pretrained=pretrained)
    told = write_configs(make_card(tmp_path), str(out), **options)
    cfgs = {name: load(out / f"{name}.yaml") for name in ("teacher", "student", "distilled")}
    weights = tmp_path / "configs/output/teacher/model_final.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    for name, cfg in cfgs.items():
        check_training_config(cfg)
        assert class_count(cfg)[1] == 3
        assert distillation_requested(cfg) == (name == "distilled")
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("recipe_train",), ("recipe_val",))
        assert f"--config-file {out / name}.yaml" in told
        text = (out / f"{name}.yaml").read_text()
        assert f"python tools/train_net.py --config-file {out / name}.yaml" in text
        depth = 50 if name == "teacher" else 18
        assert cfg.MODEL.RESNETS.DEPTH == depth
        assert cfg.MODEL.MASK_ON == (detector == "mask_rcnn")
        assert cfg.MODEL.BACKBONE.FREEZE_AT == (2 if pretrained else 0)
        assert cfg.MODEL.RESNETS.NORM == ("FrozenBN" if pretrained else "BN")
        assert bool(cfg.MODEL.WEIGHTS) == pretrained
        assert (f"R-{depth}" in cfg.MODEL.WEIGHTS) == pretrained
    teacher_cfg, path = load_teacher_config(cfgs["distilled"])
    assert path == str(weights) and class_count(teacher_cfg)[1] == 3
    assert teacher_cfg.MODEL.RESNETS.DEPTH == 50
    assert len({cfg.OUTPUT_DIR for cfg in cfgs.values()}) == 3
    # A loss for each layer in box heads, for their mean in dense ones, as docs/choosing.md advises.
    is_dense = detector in ("retinanet", "fcos")
    assert not cfgs["distilled"].MODEL.CROSSKD.FUSION.IN_FEATURES
    assert fusion_name(cfgs["distilled"]) == ("mean" if is_dense else "none")
    assert f"CrossKD-IFC, {'the mean of layers' if is_dense else 'a loss for each'}" in told
    stock = cfgs["student"]
    assert sum(p.numel() for p in build_model(stock).parameters()) > 10**6


def test_photos_of_more_than_100_objects_are_detected_and_counted_in_full(tmp_path):
    card = make_card(tmp_path, images=2, classes=("cell",))
    content = json.loads((tmp_path / "data.json").read_text())
    (one, _), boxes = content["annotations"], [(4 * (i % 50), 4 * (i // 50)) for i in range(150)]
    content["annotations"] = [
        {**one, "id": i + 1, "bbox": [x, y, 3, 3], "area": 9} for i, (x, y) in enumerate(boxes)
    ]
    (tmp_path / "data.json").write_text(json.dumps(content))
    (tmp_path / "card.yaml").write_text(open(card).read().replace("name: recipe", "name: crowded"))
    (found,) = check_card(load_card(card)).found["more than 100 objects"]
    assert found.endswith("0.png: 150")
    told = write_configs(card, str(tmp_path / "c"), teacher="R50", student="R18", detector="fcos")
    assert "Up to 150 objects in an image: a detector gives up to 300 detections" in told
    cfg = load(tmp_path / "c" / "student.yaml")
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300

    def ap_of_the_truth():
        evaluator = CrossKDTrainer.build_evaluator(cfg, "crowded_val", str(tmp_path))
        evaluator.reset()
        for record in DatasetCatalog.get("crowded_val"):
            truth = [a["bbox"] for a in record["annotations"]]
            all_ = Instances((480, 640), scores=torch.ones(len(truth)))
            all_.pred_boxes = Boxes(torch.tensor([(x, y, x + w, y + h) for x, y, w, h in truth]))
            all_.pred_classes = torch.zeros(len(truth), dtype=torch.int64)
            evaluator.process([record], [{"instances": all_}])
        return evaluator.evaluate()["bbox"]["AP"]

    assert ap_of_the_truth() == pytest.approx(100)
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
    assert ap_of_the_truth() < 70


def test_sizes_schedule_and_anchors_follow_the_data(tmp_path):
    def written(name, *, gpus=1, detector="faster_rcnn", pretrained=True, **data):
        (tmp_path / name).mkdir()
        options = dict(teacher="R50", student="R18", detector=detector, pretrained=pretrained)
        card = make_card(tmp_path / name, **data)
        path = tmp_path / f"{name}_configs"
        # one name of a data set belongs to one card
        text = open(card).read().replace("name: recipe", f"name: {name}")
        open(card, "w").write(text)
        write_configs(card, str(path), gpus=gpus, **options)
        return load(path / "student.yaml")

    small = written("small", size=(128, 96), side=9, images=40)
    assert small.INPUT.MIN_SIZE_TEST == 96 and small.INPUT.MAX_SIZE_TEST == 128
    assert small.MODEL.ANCHOR_GENERATOR.SIZES == [[8], [16], [32], [64], [128]]
    assert (small.SOLVER.IMS_PER_BATCH, small.SOLVER.BASE_LR) == (4, 0.005)
    assert (small.SOLVER.MAX_ITER, small.SOLVER.STEPS) == (2000, (1400, 1800))
    large = written("large", size=(4000, 2000), side=320, images=8000, gpus=8)
    assert large.INPUT.MIN_SIZE_TEST == 800 and large.INPUT.MAX_SIZE_TEST == 1600
    assert large.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32]
    assert (large.SOLVER.IMS_PER_BATCH, large.SOLVER.BASE_LR) == (32, 0.04)
    assert large.SOLVER.MAX_ITER == 24 * 8000 // 32
    dense = written("dense", detector="retinanet", pretrained=False, side=20, gpus=2)
    assert dense.MODEL.RESNETS.NORM == "SyncBN" and dense.MODEL.RETINANET.NORM == "GN"
    assert all(len(level) == 3 for level in dense.MODEL.ANCHOR_GENERATOR.SIZES)
    assert (dense.SOLVER.IMS_PER_BATCH, dense.SOLVER.BASE_LR) == (8, 0.005)
    cpu = written("cpu", gpus=0)
    assert cpu.INPUT.MIN_SIZE_TEST == 240 and cpu.INPUT.MIN_SIZE_TRAIN == (240,)


def test_a_command_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    out = tmp_path / "my $configs"
    told = write_configs(make_card(tmp_path), str(out), teacher="R50", student="R18")
    commands = [shlex.split(x) for x in told.splitlines() if "train_net.py" in x]
    assert [x[-1] for x in commands] == [
        str(out / f"{name}.yaml") for name in ("teacher", "student", "distilled")
    ]
    # Then what to do with the student.
    export, use = (shlex.split(x) for x in told.splitlines()[-2:])
    assert export[1:3] == ["tools/export_student.py", str(out / "output/distilled/model_final.pth")]
    assert use[1:3] == ["tools/predict.py", export[3]]


def test_the_commands_of_a_package_without_the_repository_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("crosskd_ifc.common.command_line.CHECKOUT", "")
    told = write_configs(make_card(tmp_path), str(tmp_path / "x"), teacher="R50", student="R18")
    commands = told[told.index("Next") :].splitlines()[1:]
    assert len(commands) == 6 and all(x.startswith("  crosskd-") for x in commands)


def test_an_evaluation_on_the_training_images_is_told(tmp_path):
    card = tmp_path / "card.yaml"
    make_card(tmp_path)
    content = yaml.safe_load(card.read_text())
    options = dict(teacher="R50", student="R18")
    assert "recipe_train, too" not in write_configs(str(card), str(tmp_path / "a"), **options)
    content.update(name="alone", splits={"train": content["splits"]["train"]})
    card.write_text(yaml.safe_dump(content))
    assert "on alone_train, too" in write_configs(str(card), str(tmp_path / "b"), **options)
    train, test = content["splits"]["train"], {**content["splits"]["train"]}
    content.update(name="both", splits={"trainval": train, "val": test})
    card.write_text(yaml.safe_dump(content))
    told = write_configs(str(card), str(tmp_path / "c"), **options)
    assert "on both_val, whose images both_trainval has too" in told
    content.update(name="three", splits={"trainval": train, "val": test, "test": test})
    card.write_text(yaml.safe_dump(content))
    assert "too. They say little" not in write_configs(str(card), str(tmp_path / "d"), **options)
    base = yaml.safe_load((tmp_path / "d" / "base.yaml").read_text())
    assert base["DATASETS"]["TEST"] == ["three_test"]
    assert "Evaluations: on three_test, since trainval holds val." in read_words(tmp_path / "d")


def read_words(folder):
    return " ".join((folder / "base.yaml").read_text().replace("#", "").split())


def test_masks_in_run_length_codes_are_read_as_bitmaps(tmp_path):
    options = dict(teacher="R50", student="R18", detector="mask_rcnn")
    write_configs(make_card(tmp_path, rle=True), str(tmp_path / "out"), **options)
    assert load(tmp_path / "out/student.yaml").INPUT.MASK_FORMAT == "bitmask"


def test_nothing_is_overwritten_and_masks_need_outlines(tmp_path):
    card = make_card(tmp_path)
    options = dict(teacher="R50", student="R18")
    write_configs(card, str(tmp_path / "out"), **options)
    with pytest.raises(FileExistsError, match="base.yaml exists.*--force"):
        write_configs(card, str(tmp_path / "out"), **options)
    write_configs(card, str(tmp_path / "out"), force=True, **options)
    content = json.loads((tmp_path / "data.json").read_text())
    del content["annotations"][3]["segmentation"]
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--detector mask_rcnn: .*0.png.*no outline"):
        write_configs(card, str(tmp_path / "masks"), detector="mask_rcnn", **options)
    assert not (tmp_path / "masks").exists()


# The class count of a card


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet", "FCOS"])
def test_a_class_count_left_alone_is_the_cards_and_one_set_by_hand_must_agree(
    architecture, tmp_path
):
    card = make_card(tmp_path)
    opts = ("DATASETS.CARDS", (card,), "DATASETS.TRAIN", ("recipe_train",))
    plain = ("MODEL.CROSSKD.ENABLED", False, "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    cfg = tiny_cfg(*plain, *opts, architecture=architecture)
    key, count = class_count(cfg)
    assert count == 80
    fill_in_class_count(cfg)
    assert class_count(cfg) == (key, 3)
    cfg.merge_from_list([key, 5])
    fill_in_class_count(cfg)
    assert class_count(cfg) == (key, 5)
    with pytest.raises(ConfigError, match=f"{key} is 5, but .* has 3 classes"):
        check_classes(cfg)


def test_a_class_count_without_a_card_is_left_alone():
    cfg = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 80, "DATASETS.TRAIN", ("coco_2017_train",))
    fill_in_class_count(cfg)
    assert class_count(cfg)[1] == 80
