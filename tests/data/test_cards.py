"""Dataset cards, the dropping of empty boxes, and ``tools/prepare_data.py check``."""

import io
import json
import logging
import os
import re
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import load_tool, tiny_cfg
from PIL import Image
from pycocotools import mask as mask_util

from crosskd_ifc import ConfigError
from crosskd_ifc.common.paths import resolve_path
from crosskd_ifc.data import files as data_files
from crosskd_ifc.data.cards import drop_degenerate_boxes, load_card, register_card, register_cards
from crosskd_ifc.data.check import check_card
from crosskd_ifc.data.findings import KINDS
from crosskd_ifc.training.preflight import check_evaluation_config

REPO = Path(__file__).resolve().parents[2]
BCCD = Path(os.environ.get("CROSSKD_IFC_BCCD") or REPO / "../shared/data/bccd")
BOX = ("cell", 5, 5, 20, 20)


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _image(seed, size=(40, 30), kind="JPEG", mode="RGB", **kwargs):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **kwargs)
    return out.getvalue()


def _xml(objects, width=40, height=30):
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>" + (
        "".join(
            f"<object><name>{name}</name><pose>x</pose><truncated>0</truncated>"
            "<difficult>0</difficult>"
            f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
            "</object>"
            for name, x0, y0, x1, y1 in objects
        )
        + "</annotation>"
    )


# COCO outlines that detectron2 or pycocotools would crash on, of images of 40 x 30.
INF = float("inf")
TRIANGLE = [1, 1, 9, 1, 9, 9]
OUTLINES_BROKEN = {
    "NaN": ([[1, 1, 9, float("nan"), 9, 9]], "not finite"),
    "infinite": ([TRIANGLE, [1, 1, 9, 1, INF, 9]], "not finite"),
    "both infinities": ([[1, 1, INF, 1, -INF, 9]], "not finite"),
    "a huge coordinate": ([[1, 1, 1e8, 1, 9, 9]], "beyond"),
    "a huge negative one": ([[1, 1, -(10**400), 1, 9, 9]], "beyond"),
    "texts": ([["1", "1", "9", "1", "9", "9"]], "not all numbers"),
    "a null": ([[1, 1, None, 1, 9, 9]], "not all numbers"),
    "points as pairs": ([[[1, 1], [9, 1], [9, 9]]], "not all numbers"),
    "RLE without size": ({"counts": [1200]}, "size"),
    "RLE of another size": ({"counts": [900], "size": [30, 30]}, "size"),
    "RLE of a huge size": ({"counts": [2**62], "size": [2**31, 2**31]}, "size"),
    "RLE of a size in text": ({"counts": [1200], "size": ["30", "40"]}, "size"),
    "RLE without counts": ({"size": [30, 40]}, "counts"),
    "RLE of too few": ({"counts": [1, 2, 3], "size": [30, 40]}, "6 pixels"),
    "RLE of too many": ({"counts": [1200, 1200], "size": [30, 40]}, "2400 pixels"),
    "RLE with a negative run": ({"counts": [1300, -100], "size": [30, 40]}, "counts"),
    "RLE with a huge run": ({"counts": [2**80], "size": [30, 40]}, "pixels"),
    "RLE of texts": ({"counts": ["1200"], "size": [30, 40]}, "counts"),
    "RLE of floats": ({"counts": [1200.0], "size": [30, 40]}, "counts"),
    "RLE of garbage": ({"counts": "garbage!", "size": [30, 40]}, "counts"),
    "RLE of other letters": ({"counts": "PP0\u20ac", "size": [30, 40]}, "counts"),
    "RLE that never ends": ({"counts": "o" * 99, "size": [30, 40]}, "counts"),
    "RLE that is cut off": ({"counts": "Po", "size": [30, 40]}, "counts"),
    "a short RLE": ({"counts": "0123", "size": [30, 40]}, "pixels"),
}
_MASK = np.zeros((30, 40), dtype=np.uint8, order="F")
_MASK[3:12, 5:38:3] = 1
OUTLINES_GOOD = [
    [TRIANGLE],
    [TRIANGLE, [-5, 2.5, 60, 3, 4, 5, 6, 7]],
    {"counts": mask_util.encode(_MASK)["counts"].decode(), "size": [30, 40]},
    {"counts": [100, 1000, 100], "size": [30, 40]},
    None,
    [],
]

XML_DECLARATION = '<?xml version="1.0" encoding="{}"?>'


class Voc:
    """A tiny VOC folder with a card: train is a, b, c and val is d, e. Valid until changed."""

    def __init__(self, folder, **card):
        self.root = folder / "voc"
        for seed, image_id in enumerate("abcde"):
            _write(self.root / f"JPEGImages/{image_id}.jpg", _image(seed))
            # The second box ends on the border on all sides.
            self.annotate(image_id, [BOX, ("rod", 1, 1, 40, 30)])
        self.split("train", "abc")
        self.split("val", "de")
        self.card = folder / "card.yaml"
        self.content = {
            "name": "tiny",
            "format": "voc",
            "root": "voc",
            "splits": {"train": "train", "val": "val"},
            "classes": ["cell", "rod"],
            "evaluator": "coco",
        }
        self.change(**card)

    def change(self, **card):
        self.content.update(card)
        self.content = {k: v for k, v in self.content.items() if v is not None}
        self.card.write_text(yaml.safe_dump(self.content))

    def split(self, name, ids):
        _write(self.root / f"ImageSets/Main/{name}.txt", "".join(f"{i}\n" for i in ids))

    def annotate(self, image_id, objects, **kwargs):
        _write(self.root / f"Annotations/{image_id}.xml", _xml(objects, **kwargs))

    def found(self):
        report = check_card(load_card(str(self.card)))
        assert str(report)
        return {kind: list(places) for kind, places in report.found.items()}


class Coco(Voc):
    """A tiny COCO folder with a card, changed through ``self.json``. Valid until changed."""

    def __init__(self, folder, **card):
        self.root = folder / "coco"
        self.json = {"categories": [{"id": 3, "name": "rod"}, {"id": 1, "name": "cell"}]}
        self.json["images"] = [
            {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)
        ]
        self.json["annotations"] = [
            {"id": i, "image_id": i % 3, "category_id": 1 + i // 3 * 2, "bbox": [i, 0, 40 - i, 30]}
            for i in range(6)
        ]
        for annotation in self.json["annotations"]:
            annotation.update(id=annotation["id"] + 1, area=1, iscrowd=0)
        for i in range(3):
            _write(self.root / f"images/{i}.png", _image(i, kind="PNG"))
        self.card = folder / "card.yaml"
        self.content = {
            "name": "tinyco",
            "format": "coco",
            "root": "coco",
            "splits": {"train": {"json": "train.json", "images": "images"}},
        }
        self.change(**card)

    def found(self):
        _write(self.root / "train.json", json.dumps(self.json))
        return super().found()


# Cards


def test_a_run_keeps_where_a_card_of_the_current_folder_lies(tmp_path, monkeypatch):
    Voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    cfg = tiny_cfg("DATASETS.CARDS", ("card.yaml",))
    cfg.merge_from_list(["DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ()])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.CROSSKD.ENABLED", False])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    args = default_argument_parser().parse_args(["--config-file", "config.yaml"])
    found = runpy.run_path(str(REPO / "tools" / "train_net.py"))["setup"](args)
    assert found.DATASETS.CARDS == (str(tmp_path / "card.yaml"),)
    assert found.MODEL.ROI_HEADS.NUM_CLASSES == 2


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(name=None), "name"),
        (dict(name="a/b"), "name"),
        (dict(name=7), "name"),
        (dict(format=None), "format"),
        (dict(format="yolo"), "format"),
        (dict(format=["voc"]), "format"),
        (dict(root=None), "root"),
        (dict(root=""), "root"),
        (dict(root=["voc"]), "root"),
        (dict(root="nowhere"), "root"),
        (dict(root="$CROSSKD_IFC_UNSET/voc"), "CROSSKD_IFC_UNSET"),
        (dict(root="${CROSSKD_IFC_UNSET}"), "CROSSKD_IFC_UNSET"),
        (dict(splits=None), "splits"),
        (dict(splits={}), "splits"),
        (dict(splits=["train"]), "splits"),
        (dict(splits={"train": "train.txt"}), "splits.train"),
        (dict(splits={"train": "../train"}), "splits.train"),
        (dict(splits={"train": {"json": "a", "images": "b"}}), "splits.train"),
        (dict(splits={True: "train"}), "a key of splits is True"),
        (dict(classes=None), "classes"),
        (dict(classes=[]), "classes"),
        (dict(classes="cell"), "classes"),
        (dict(classes=["cell", 1]), "classes[1]"),
        (dict(classes=["cell", "cell"]), "classes[1]"),
        (dict(classes=["../cell"], evaluator="pascal_voc", year=2007), "classes[0]"),
        (dict(classes=["\u20ac" * 90], evaluator="pascal_voc", year=2007), "classes[0]"),
        (dict(evaluator=None), "evaluator"),
        (dict(evaluator="lvis"), "evaluator"),
        (dict(evaluator="pascal_voc"), "year"),
        (dict(evaluator="pascal_voc", year=2010), "year"),
        (dict(clases=["cell"]), "clases"),
    ],
)
def test_a_wrong_key_of_a_card_is_one_error_naming_file_and_key(tmp_path, change, key):
    voc = Voc(tmp_path, **change)
    with pytest.raises(ValueError) as error:
        register_card(str(voc.card))
    before, after = str(error.value).split(str(voc.card))
    assert before == "dataset card " and key in after
    assert not [name for name in DatasetCatalog if name.startswith("tiny")]


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(evaluator="pascal_voc"), "evaluator"),
        (dict(year=2007), "year"),
        (dict(splits={"train": "train"}), "splits.train"),
        (dict(splits={"train": {"json": "train.json"}}), "splits.train"),
        (dict(splits={"train": {"json": 3, "images": "images"}}), "splits.train.json"),
    ],
)
def test_a_wrong_key_of_a_coco_card_is_one_error(tmp_path, change, key):
    with pytest.raises(ValueError, match="card.yaml.*" + re.escape(key)):
        register_card(str(Coco(tmp_path, **change).card))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- name",
        "name: [",
        "name: a\nname: b",
        "name: &a [x]\nclasses: *a",
        "name: !!python/object/apply:os.system ['true']",
        "year: !!bool foo",
        "year: !!timestamp foo",
        "year: !!int ''",
        "year: !!str 2007",
        "year: !own {a: 1}",
        "[" * 1500,
        b"\xff\xfe\x00",
    ],
)
def test_a_card_that_is_no_plain_yaml_mapping_is_one_error(tmp_path, text):
    _write(tmp_path / "card.yaml", text)
    with pytest.raises(ValueError, match="dataset card .*card.yaml"):
        load_card(str(tmp_path / "card.yaml"))


def test_root_expands_environment_variables_and_starts_at_the_card(tmp_path, monkeypatch):
    voc = Voc(tmp_path, root="${CROSSKD_IFC_TEST}/voc")
    monkeypatch.setenv("CROSSKD_IFC_TEST", str(tmp_path))
    monkeypatch.chdir("/")
    assert load_card(str(voc.card)).root == str(voc.root)
    voc.change(root="./voc")
    assert load_card(str(voc.card)).root == str(voc.root)


def test_registering_reads_no_annotation_and_twice_is_once(tmp_path):
    voc = Voc(tmp_path)
    voc.annotate("a", [("unheard-of", 1, 1, 2, 2)])
    assert register_card(str(voc.card)) == ["tiny_train", "tiny_val"]
    assert register_card(str(voc.card)) == ["tiny_train", "tiny_val"]
    link = tmp_path / "link.yaml"
    link.symlink_to(voc.card)
    assert register_card(str(link)) == ["tiny_train", "tiny_val"]
    assert MetadataCatalog.get("tiny_val").thing_classes == ["cell", "rod"]
    with pytest.raises(ValueError, match="a.xml.*unheard-of.*cell, rod"):
        DatasetCatalog.get("tiny_train")


def test_a_name_belongs_to_one_card(tmp_path):
    voc = Voc(tmp_path)
    register_card(str(voc.card))
    other = tmp_path / "other.yaml"
    other.write_text(voc.card.read_text())
    with pytest.raises(ValueError, match=f"other.yaml.*tiny_train.*{voc.card}"):
        register_card(str(other))
    voc.change(classes=["rod", "cell"])
    with pytest.raises(ValueError, match="older state"):
        register_card(str(voc.card))
    DatasetCatalog.pop("tiny_train")
    DatasetCatalog.register("tiny_train", list)
    with pytest.raises(ValueError, match="tiny_train.*other code"):
        register_card(str(voc.card))
    voc.change(name="coco", splits={"2017_val": "val"})
    with pytest.raises(ValueError, match="coco_2017_val.*detectron2"):
        register_card(str(voc.card))


def test_cards_are_found_from_the_current_folder_then_in_configs(tmp_path, monkeypatch):
    Voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSKD_IFC_BCCD", str(tmp_path))
    names = register_cards(["card.yaml", "datasets/bccd.yaml"])
    assert names[:2] == ["tiny_train", "tiny_val"] and "bccd_trainval" in names
    found = resolve_path("datasets/bccd.yaml", what="dataset card", key="DATASETS.CARDS")
    assert found == str(REPO / "configs/datasets/bccd.yaml")
    assert found == resolve_path("configs/datasets/bccd.yaml", what="dataset card", key="X")
    with pytest.raises(FileNotFoundError) as error:
        resolve_path("no.yaml", what="config", key="SOME.KEY", extra_tried=["model zoo: no.yaml"])
    for part in ("SOME.KEY", f"{tmp_path}/no.yaml", str(REPO / "configs/no.yaml"), "model zoo: no"):
        assert part in str(error.value)


def test_an_error_of_a_card_names_the_config_key_once(tmp_path):
    for card in (str(Voc(tmp_path, year=7).card), "no_such_card.yaml"):
        with pytest.raises(ConfigError, match="^DATASETS.CARDS: ") as error:
            check_evaluation_config(tiny_cfg("DATASETS.CARDS", (card,)))
        assert str(error.value).count("DATASETS.CARDS") == 1 and card in str(error.value)


def test_the_cards_of_the_readme_are_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLS", str(tmp_path))
    (tmp_path / "street").mkdir()
    text = (REPO / "configs/datasets/README.md").read_text()
    cards = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    for card in cards:
        _write(tmp_path / "cards/card.yaml", card)
        register_card(str(tmp_path / "cards/card.yaml"))
    assert {"cells_test", "street_val"} <= set(DatasetCatalog)


# Loading


def test_voc_boxes_are_detectron2s_but_empty_ones_have_no_area(tmp_path):
    voc = Voc(tmp_path)
    voc.annotate("a", [BOX, ("cell", 7, 8, 7, 9), ("cell", 7, 8, 9, 8), ("rod", 1, 1, 2, 2)])
    register_card(str(voc.card))
    records = DatasetCatalog.get("tiny_train")
    assert [len(record["annotations"]) for record in records] == [4, 2, 2]
    boxes = [annotation["bbox"] for annotation in records[0]["annotations"]]
    assert boxes == [[4, 4, 20, 20], [7, 7, 7, 9], [6, 8, 9, 8], [0, 0, 2, 2]]
    kept, dropped = drop_degenerate_boxes(records)
    assert dropped == 2 and len(kept[0]["annotations"]) == 2


@pytest.mark.parametrize(
    "file, content",
    [
        ("Annotations/b.xml", None),
        ("Annotations/b.xml", "<annotation>"),
        ("Annotations/b.xml", _xml([BOX]).replace("20", "twenty")),
        (
            "Annotations/b.xml",
            "<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>" + _xml([BOX]),
        ),
        ("Annotations/b.xml", ("<!DOCTYPE a [<!ENTITY e 'x'>]>" + _xml([BOX])).encode("utf-16")),
        ("Annotations/b.xml", XML_DECLARATION.format("UTF-16") + _xml([BOX])),
        ("ImageSets/Main/train.txt", None),
        ("ImageSets/Main/train.txt", ""),
        ("ImageSets/Main/train.txt", "a\n"),
        ("ImageSets/Main/train.txt", "a 1\nb -1\n"),
    ],
)
def test_a_broken_voc_file_stops_loading_with_its_name(tmp_path, file, content):
    voc = Voc(tmp_path)
    (voc.root / file).unlink()
    if content is not None:
        _write(voc.root / file, content)
    register_card(str(voc.card))
    with pytest.raises(ValueError, match=f"card.yaml.*splits.train.*{file}"):
        DatasetCatalog.get("tiny_train")


def test_coco_card_loads_through_detectron2_and_classes_must_match(tmp_path):
    coco = Coco(tmp_path, classes=["cell", "rod"])
    coco.found()
    register_card(str(coco.card))
    records = DatasetCatalog.get("tinyco_train")
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]
    assert MetadataCatalog.get("tinyco_train").thing_classes == ["cell", "rod"]
    coco.change(name="other", classes=["rod", "cell"])
    register_card(str(coco.card))
    with pytest.raises(ValueError, match="train.json.*not the card's classes"):
        DatasetCatalog.get("other_train")


def test_a_coco_card_without_classes_takes_them_from_the_json(tmp_path):
    coco = Coco(tmp_path)
    coco.found()
    register_card(str(coco.card))
    DatasetCatalog.get("tinyco_train")
    assert MetadataCatalog.get("tinyco_train").thing_classes == ["cell", "rod"]
    (coco.root / "train.json").unlink()
    with pytest.raises(ValueError, match="train.json"):
        DatasetCatalog.get("tinyco_train")


@pytest.mark.parametrize(
    "kind, evaluator", [("voc", "pascal_voc"), ("voc", "coco"), ("coco", "coco")]
)
def test_perfect_predictions_reach_ap_100(tmp_path, kind, evaluator):
    if kind == "voc":
        data = Voc(tmp_path, evaluator=evaluator, year=2012 if evaluator == "pascal_voc" else None)
    else:
        data = Coco(tmp_path)
        data.found()
    name = register_card(str(data.card))[0]
    meta = MetadataCatalog.get(name)
    assert meta.evaluator_type == evaluator
    records = DatasetCatalog.get(name)
    if evaluator == "coco":
        runs = COCOEvaluator(name, output_dir=str(tmp_path / "out"), distributed=False)
    else:
        runs = PascalVOCDetectionEvaluator(name)
    runs.reset()
    for record in records:
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.ones(len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        runs.process([record], [{"instances": instances}])
    result = runs.evaluate()["bbox"]
    assert result["AP50"] == pytest.approx(100) and result["AP"] == pytest.approx(100)


def _voc_ap(name, records, extra_class=None):
    """AP50 of perfect predictions, with one of another class on top."""
    runs = PascalVOCDetectionEvaluator(name)
    runs.reset()
    for record in records:
        found = [(a["bbox"], a["category_id"]) for a in record["annotations"]]
        found += [([0, 0, 9, 9], extra_class)] if extra_class is not None else []
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor([box for box, _ in found]))
        instances.scores = torch.ones(len(found))
        instances.pred_classes = torch.tensor([category for _, category in found])
        runs.process([record], [{"instances": instances}])
    return runs.evaluate()["bbox"]["AP50"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("year, detected", [(2007, 200 / 3), (2012, float("nan"))])
def test_the_check_says_what_a_class_without_boxes_does_to_the_ap(tmp_path, year, detected):
    voc = Voc(tmp_path, classes=["cell", "rod", "x"])
    report = str(check_card(load_card(str(voc.card))))
    assert "no AP for this class" in report and "AP 0" not in report
    voc.change(evaluator="pascal_voc", year=year)
    report = str(check_card(load_card(str(voc.card))))
    assert "AP 0 for this class" in report and "no AP" not in report
    assert ("NaN" in report) == (year == 2012)
    name = register_card(str(voc.card))[0]
    records = DatasetCatalog.get(name)
    assert _voc_ap(name, records) == pytest.approx(200 / 3)
    assert _voc_ap(name, records, extra_class=2) == pytest.approx(detected, nan_ok=True)


# Dropping of degenerate boxes


def test_degenerate_boxes_are_dropped_in_each_box_mode_without_changing_the_input(caplog):
    nan, inf = float("nan"), float("inf")
    boxes = {
        BoxMode.XYXY_ABS: (
            [0, 0, 10, 10],
            [5, 5, 5, 9],
            [5, 5, 9, 4],
            [0, nan, 3, 3],
            [0, 0, inf, 1],
        ),
        BoxMode.XYWH_ABS: (
            [7, 7, 1, 1],
            [7, 7, 0, 5],
            [7, 7, 3, -1],
            [nan, 0, 1, 1],
            [0, 0, 1, inf],
        ),
        BoxMode.XYWHA_ABS: ([5, 5, 2, 2, 30], [5, 5, 0, 2, 30], [5, 5, 2, 2, nan]),
    }
    records = [
        {
            "file_name": f"{mode.name}.jpg",
            "annotations": [{"bbox": box, "bbox_mode": mode, "category_id": 0} for box in group],
        }
        for mode, group in boxes.items()
    ]
    records[0]["annotations"][0]["bbox"] = np.array([0, 0, 10.0, 10])
    records.append({"file_name": "empty.jpg", "annotations": []})
    records.append({"file_name": "test.jpg"})
    before = repr(records)
    with caplog.at_level(logging.WARNING, "crosskd_ifc.data.cards"):
        kept, dropped = drop_degenerate_boxes(records)
    assert repr(records) == before
    assert dropped == 10 and [len(r.get("annotations", ())) for r in kept] == [1, 1, 1, 0, 0]
    assert kept[0]["annotations"][0] is records[0]["annotations"][0]
    assert len(caplog.records) == 1
    for part in ("10 boxes", "3 of 5 images", "XYXY_ABS.jpg, XYWH_ABS.jpg, XYWHA_ABS.jpg"):
        assert part in caplog.text


def test_nothing_is_logged_where_nothing_is_dropped(caplog):
    record = {
        "file_name": "a",
        "annotations": [{"bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYXY_ABS}],
    }
    assert drop_degenerate_boxes([record]) == ([record], 0)
    assert not caplog.records
    record["annotations"][0]["bbox"] = [1, "x"]
    with pytest.raises(ValueError, match="a: an annotation's bbox"):
        drop_degenerate_boxes([record])


# The check


def test_a_valid_set_has_no_findings_and_boxes_on_the_border_are_valid(tmp_path):
    assert Voc(tmp_path).found() == {}
    assert Coco(tmp_path).found() == {}


def _exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def _remove(path):
    return lambda voc: (voc.root / path).unlink()


def _put(path, content):
    return lambda voc: _write(voc.root / path, content)


def _objects(*objects):
    return lambda voc: voc.annotate("a", [BOX, ("rod", 1, 1, 40, 30), *objects])


def _long_exif(orientation):
    """As _exif, in 32 bits."""
    entry = struct.pack("<HHII", 274, 4, 1, orientation)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n"
    b"0 0 moveto 40 30 lineto stroke\nshowpage\n%%EOF\n"
)
A_XML, A_JPG = "Annotations/a.xml", "JPEGImages/a.jpg"
BOMB = '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]>' + _xml([BOX])


@pytest.mark.parametrize(
    "defect, kind, place",
    [
        (_remove(A_JPG), "missing image", A_JPG),
        (_remove(A_XML), "missing annotation", A_XML),
        (_remove("ImageSets/Main/val.txt"), "unreadable split", "val.txt: no such file"),
        (_put("ImageSets/Main/val.txt", "d 1\ne 1\n"), "unreadable split", "val.txt: .*'d 1'"),
        (_put("ImageSets/Main/val.txt", "d\n"), "unreadable split", "val.txt: 1 images"),
        (_put("ImageSets/Main/val.txt", "d\ne\nd\n"), "duplicate id", "val.txt: d"),
        (_put(A_XML, "<annotation>"), "unreadable annotation", A_XML + ": not valid XML"),
        (_put(A_XML, b"\xff\xfe<"), "unreadable annotation", A_XML + ": not UTF-8"),
        (_put(A_XML, BOMB), "unreadable annotation", A_XML + ": .*DOCTYPE"),
        (
            _put(A_XML, XML_DECLARATION.format("UTF-16") + _xml([BOX])),
            "unreadable annotation",
            A_XML + ": not valid XML: encoding",
        ),
        (
            _put(A_XML, XML_DECLARATION.format("ISO-8859-1") + _xml([("r\xf6d", 1, 1, 9, 9)])),
            "unknown class",
            "object 1, 'r\xc3\xb6d'",
        ),
        (_put(A_XML, "<annotation/>"), "unreadable annotation", "<size><width> is missing"),
        (
            _put(A_XML, _xml([BOX]).replace("<ymax>20", "<ymax>")),
            "unreadable annotation",
            "<bndbox><ymax> is missing or empty in object 1",
        ),
        (_put(A_XML, _xml([BOX], width=0.5)), "unreadable annotation", "<width> is '0.5'"),
        (_put(A_XML, _xml([BOX], 30, 40)), "image size mismatch", "annotation 30x40, image 40x30"),
        (_put(A_XML, _xml([])), "image without boxes", A_XML),
        (
            _objects(("rod", 5, 5, 5, 9)),
            "box without area",
            A_XML + r" object 3, rod \[5, 5, 5, 9\]",
        ),
        (_objects(("rod", 5, 9, 8, 5)), "box without area", r"object 3, rod \[5, 9, 8, 5\]"),
        (_objects(("rod", "nan", 9, 8, 5)), "box not finite", "object 3"),
        (_objects(("rod", "1e999", 9, 8, 5)), "box not finite", "object 3"),
        (_objects(("rod", 0, 1, 5, 5)), "box outside image", r"\[0, 1, 5, 5\] in 40x30"),
        (_objects(("rod", 1, 1, 41, 5)), "box outside image", r"\[1, 1, 41, 5\] in 40x30"),
        (_objects(("virus", 1, 1, 4, 5)), "unknown class", "object 3, virus"),
        (_objects(BOX), "duplicate box", "object 3, cell"),
        (
            _objects(*(("rod", 1 + i % 30, 1 + i // 30, 33, 9) for i in range(101))),
            "more than 100 objects",
            A_XML + ": 103",
        ),
        (_put(A_JPG, b""), "unreadable image", A_JPG + ": the file is empty"),
        (_put(A_JPG, b"GIF?"), "unreadable image", A_JPG + ": not an image"),
        (_put(A_JPG, _image(0)[:-200]), "truncated image", A_JPG),
        (_put(A_JPG, _image(0, kind="PNG")[:-900]), "truncated image", A_JPG),
        (_put(A_JPG, _image(0, exif=_exif(3))), "EXIF orientation", A_JPG + ": orientation 3"),
        (_put(A_JPG, _image(0, (30, 40), exif=_exif(6))), "EXIF orientation", ": orientation 6"),
        (_put(A_JPG, _image(0, exif=b"Exif\0\0nonsense")), "bad EXIF", A_JPG),
        (_put(A_JPG, _image(0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")), "bad EXIF", A_JPG),
        (_put(A_JPG, _image(0, exif=_exif(0))), "bad EXIF", A_JPG + ": orientation 0, expected 1"),
        (_put(A_JPG, _image(0, exif=_long_exif(65537))), "bad EXIF", ": orientation 65537, "),
        (_put(A_JPG, EPS), "unreadable image", A_JPG + ": not an image"),
        (
            _put(A_JPG, _image(0, kind="PNG", mode="I;16")),
            "more than 8 bits",
            A_JPG + ": mode I;16",
        ),
        (_put(A_JPG, _image(1)), "picture twice", "b.jpg and JPEGImages/a.jpg in train"),
        (_put(A_JPG, _image(3)), "picture in two splits", "JPEGImages/d.jpg in val and train"),
        (lambda voc: voc.split("val", "ad"), "picture in two splits", "a.jpg in val and train$"),
        (
            lambda voc: (
                voc.split("trainval", "abcd"),
                voc.change(splits=dict(t="trainval", rain="train")),
            ),
            "picture in two splits",
            "",
        ),
        (
            lambda voc: (
                voc.split("trainval", "abcd"),
                voc.change(splits=dict(trainval="trainval", train="train")),
            ),
            "split inside a split",
            "trainval contains train",
        ),
        (lambda voc: voc.change(classes=["cell", "rod", "x"]), "class without boxes", "train: x"),
    ],
)
def test_a_voc_defect_is_exactly_one_kind_of_finding(tmp_path, defect, kind, place):
    voc = Voc(tmp_path)
    defect(voc)
    found = voc.found()
    assert list(found) == [kind]
    assert re.search(place, found[kind][0])


def test_an_exif_tag_that_swaps_the_size_is_told_with_the_mismatch(tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / A_JPG, _image(0, exif=_exif(6)))
    found = voc.found()
    assert set(found) == {"EXIF orientation", "image size mismatch"}
    assert found["image size mismatch"][0].endswith("image 30x40, turned by its EXIF tag")


@pytest.mark.parametrize("limit, kind", [(500, "image too large"), (1000, "large image")])
def test_only_an_image_over_twice_pillows_limit_isnt_decoded(tmp_path, monkeypatch, limit, kind):
    voc = Voc(tmp_path)  # of 1,200 pixels each
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    found = voc.found()
    assert list(found) == [kind] and len(found[kind]) == 5
    _write(voc.root / A_JPG, _image(0)[:-200])
    assert ("truncated image" in voc.found()) == (kind == "large image")


def test_a_missing_image_with_another_ending_is_named(tmp_path):
    voc = Voc(tmp_path)
    (voc.root / A_JPG).rename(voc.root / "JPEGImages/a.png")
    assert voc.found() == {"missing image": [A_JPG + ": there is a.png"]}


@pytest.mark.parametrize("field", ["pose", "truncated", "difficult", "xmin"])
def test_what_the_voc_evaluator_cant_read_is_a_warning_only_where_it_runs(tmp_path, field):
    voc = Voc(tmp_path)
    text = _xml([BOX, ("rod", 1, 1, 40, 30)])
    old = "<xmin>5<" if field == "xmin" else f"<{field}>{'x' if field == 'pose' else 0}</{field}>"
    _write(voc.root / A_XML, text.replace(old, "<xmin>5.5<" if field == "xmin" else "", 1))
    assert voc.found() == {}
    voc.change(evaluator="pascal_voc", year=2012)
    assert re.search(f"object 1.*<{field}>", voc.found()["not for the VOC evaluator"][0])


def test_an_empty_line_of_a_voc_list_is_a_warning_only_where_the_voc_evaluator_runs(tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / "ImageSets/Main/val.txt", "d\n\ne\n")
    assert voc.found() == {}
    voc.change(evaluator="pascal_voc", year=2012)
    assert voc.found() == {
        "not for the VOC evaluator": ["ImageSets/Main/val.txt: an empty line"],
    }


def _set(kind, index, **fields):
    return lambda coco: coco.json[kind][index].update(fields)


def _drop(kind, index, field):
    return lambda coco: coco.json[kind][index].pop(field)


def _add(kind, record):
    return lambda coco: coco.json[kind].append(record)


@pytest.mark.parametrize(
    "defect, kind, place",
    [
        (_set("annotations", 0, bbox=[1, 1, 0, 5]), "box without area", r"cell \[1, 1, 0, 5\]"),
        (_set("annotations", 0, bbox=[1, 1, 5, -2]), "box without area", "annotation 1 in 0.png"),
        (_set("annotations", 0, bbox=[1, 1, float("nan"), 5]), "box not finite", "annotation 1"),
        (_set("annotations", 0, bbox=[-1, 1, 5, 5]), "box outside image", "in 40x30"),
        (_set("annotations", 0, bbox=[1, 1, 40, 5]), "box outside image", "in 40x30"),
        (_set("annotations", 0, bbox=[1, 1, 5]), "broken record", "wrong: bbox"),
        (_set("annotations", 0, bbox=[1, 1, 5, 10**400]), "broken record", "wrong: bbox"),
        (_set("annotations", 0, ignore=1), "broken record", "wrong: ignore"),
        (_drop("annotations", 0, "area"), "broken record", "annotation 1.*wrong: area"),
        (_drop("annotations", 0, "iscrowd"), "broken record", "annotation 1.*wrong: iscrowd"),
        (_set("annotations", 0, iscrowd="no"), "broken record", "wrong: iscrowd"),
        (_drop("annotations", 0, "image_id"), "broken record", "wrong: image_id"),
        (_add("annotations", "text"), "broken record", "annotation {}"),
        (
            _set("annotations", 0, segmentation=[1, 1, 9, 1, 9, 9], attributes={}),
            "broken record",
            "annotation 1.*wrong: segmentation",
        ),
        (_set("annotations", 0, segmentation=["1, 1"]), "broken record", "wrong: segmentation"),
        (_set("annotations", 0, area=-1), "broken record", "wrong: area"),
        (_set("annotations", 0, area=float("nan")), "broken record", "wrong: area"),
        (_set("annotations", 0, id=2**63 - 1), "broken record", "wrong: id"),
        (_add("categories", {"id": 2**63 - 1, "name": "x"}), "broken record", "wrong: id"),
        (_set("annotations", 0, image_id="0"), "broken record", "image_id '0' is text"),
        (
            _add("images", {"id": 9, "file_name": "0.png", "width": 0, "height": 3}),
            "broken record",
            "width",
        ),
        (
            _add("images", {"id": 9, "file_name": "x", "width": 10**350, "height": 1}),
            "broken record",
            "wrong: width",
        ),
        (_add("images", {"id": [9]}), "broken record", "wrong: id, file_name, width, height"),
        (_add("categories", {"id": 7}), "broken record", "wrong: name"),
        (_set("annotations", 1, id=1), "duplicate id", "annotation 1"),
        (_set("annotations", 1, id=0), "annotation id 0", "annotation 0"),
        (_set("annotations", 1, id="1"), "broken record", "wrong: id"),
        (
            lambda coco: coco.json["images"].append(coco.json["images"][0]),
            "duplicate id",
            "image 0",
        ),
        (_add("categories", {"id": 1, "name": "x"}), "duplicate id", "category 1"),
        (_set("annotations", 0, image_id=77), "box of no image", "annotation 1, image_id 77"),
        (_set("annotations", 0, segmentation=[[1, 2, 3, 4]]), "unusable outline", "annotation 1"),
        (_set("annotations", 0, iscrowd=1), "crowd", "annotation 1 in 0.png, cell"),
        (_set("images", 0, file_name="a\0b"), "missing image", ""),
        (_set("images", 0, file_name="/dev/zero"), "missing image", "/dev/zero"),
        (_set("images", 0, file_name="1.png"), "picture twice", ""),
        (
            lambda coco: coco.change(classes=["rod", "cell"]),
            "different classes",
            "class 0 is 'cell'",
        ),
        (lambda coco: coco.json.update(images={}), "unreadable split", "no list 'images'"),
        (lambda coco: coco.json.pop("categories"), "unreadable split", "no list 'categories'"),
    ],
)
def test_a_coco_defect_is_found(tmp_path, defect, kind, place):
    coco = Coco(tmp_path)
    defect(coco)
    found = coco.found()
    assert kind in found and set(found) <= {kind, "image without boxes", "class without boxes"}
    assert re.search(place, found[kind][0])


@pytest.mark.parametrize("case", OUTLINES_BROKEN)
def test_a_broken_outline_is_found(tmp_path, case):
    coco = Coco(tmp_path)
    coco.json["annotations"][0]["segmentation"] = OUTLINES_BROKEN[case][0]
    found = coco.found()
    assert list(found) == ["broken outline"]
    assert re.search(f"annotation 1 .*{OUTLINES_BROKEN[case][1]}", found["broken outline"][0])


def test_good_outlines_are_no_findings(tmp_path):
    coco = Coco(tmp_path)
    for annotation, outline in zip(coco.json["annotations"], OUTLINES_GOOD):
        annotation["segmentation"] = outline
    assert coco.found() == {}


def test_an_unknown_category_is_found(tmp_path):
    coco = Coco(tmp_path)
    coco.json["annotations"][0]["category_id"] = 2
    assert re.search("annotation 1 in 0.png, category 2", coco.found()["unknown class"][0])


def test_a_coco_set_without_annotations_can_be_checked(tmp_path):
    coco = Coco(tmp_path)
    del coco.json["annotations"]
    assert coco.found() == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100000, b"\xff"])
def test_broken_json_is_a_finding(tmp_path, content):
    coco = Coco(tmp_path)
    coco.found()
    _write(coco.root / "train.json", content)
    report = check_card(load_card(str(coco.card)))
    assert list(report.found) == ["unreadable split"]


def test_photos_that_look_alike_in_two_splits_are_found(tmp_path):
    voc = Voc(tmp_path)
    blurred = Image.open(io.BytesIO(_image(7, (8, 6)))).resize((40, 30))
    blurred.save(voc.root / A_JPG, quality=90)
    blurred.save(voc.root / "JPEGImages/d.jpg", quality=60)
    assert voc.found() == {
        "alike in two splits": ["JPEGImages/d.jpg in val, JPEGImages/a.jpg in train"]
    }


def test_classes_that_a_card_lacks_are_told_ready_to_paste(tmp_path):
    voc = Voc(tmp_path)
    voc.annotate("a", [BOX, ("red rod", 1, 1, 9, 9), ("virus", 1, 1, 9, 9), ("virus", 2, 2, 9, 9)])
    text = str(check_card(load_card(str(voc.card))))
    assert "lacks, with their boxes: virus 2, 'red rod' 1\n" in text
    assert 'classes: ["cell", "rod", "red rod", "virus"]' in text
    voc.change(classes=json.loads(text.split("classes: ")[-1].splitlines()[0]))
    assert "unknown class" not in voc.found()
    (tmp_path / "second").mkdir()
    coco = Coco(tmp_path / "second", classes=["rod"])
    coco.found()
    text = str(check_card(load_card(str(coco.card))))
    # In the order of the file's ids: in another one, ids would mean other classes.
    assert "lacks, with their boxes: cell 3\n" in text and 'classes: ["cell", "rod"]' in text
    coco.change(classes=["cell", "rod"])
    assert coco.found() == {}


def test_every_kind_of_finding_is_tested():
    text = Path(__file__).read_text() + Path(data_files.__file__).read_text()
    assert not [kind for kind in KINDS if f'"{kind}"' not in text]


# The tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("prepare_data").main


def test_the_tool_prints_counts_examples_and_its_exit_status_tells(tmp_path, tool, capsys):
    voc = Voc(tmp_path)
    assert tool(["check", str(voc.card)]) == 0
    assert "0 errors, 0 warnings, 0 notes" in capsys.readouterr().out
    for image_id in "abc":
        voc.annotate(
            image_id, [BOX, ("rod", 3, 3, 3, 3), ("rod", 4, 4, 4, 4), ("ro\x85d", 1, 1, 3, 3)]
        )
    assert tool(["check", str(voc.card)]) == 1
    out = capsys.readouterr().out
    assert "error: box without area (6)" in out and "... and 1 more" in out
    assert "9 errors" in out and "\x85" not in out
    assert re.search(r"images +3 +2\n  boxes +12 +4\n    cell +3 +2\n    rod +6 +2\n", out)


def test_the_tool_shows_all_places_json_and_a_picture(tmp_path, tool, capsys):
    voc = Voc(tmp_path, classes=["cell", "rod", "a $class"])
    for image_id in "abc":
        voc.annotate(image_id, [BOX, ("rod", 3, 3, 3, 3), ("rod", 4, 4, 4, 4), BOX])
    assert tool(["check", str(voc.card), "--all"]) == 1
    out = capsys.readouterr().out
    assert "object 2, rod [3, 3, 3, 3]" in out and "... and" not in out
    assert out.count("object 3, rod [4, 4, 4, 4]") == 3 and "  'a $class'  " in out
    picture = tmp_path / "boxes.png"
    assert tool(["check", str(voc.card), "--json", "--picture", str(picture)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"] == {
        "images": 3,
        "boxes": 12,
        "classes": {"cell": 6, "rod": 6, "a $class": 0},
    }
    kinds = {finding["kind"]: finding for finding in found["findings"]}
    assert len(kinds["box without area"]["places"]) == 6
    assert kinds["box without area"]["severity"] == "error"
    with Image.open(picture) as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(10**6)) > 5
    assert tool(["check", str(voc.card), "--picture", str(picture)]) == 1


def test_the_tools_picture_replaces_no_other_file(tmp_path, tool, capsys):
    voc = Voc(tmp_path)
    (photo,) = voc.root.glob("JPEGImages/a.jpg")
    Image.open(photo).save(photo.with_name("x.png"))
    for path in (photo, photo.with_name("x.png"), voc.card):
        before = path.read_bytes()
        assert tool(["check", str(voc.card), "--picture", str(path)]) == 2
        assert f"prepare_data: --picture {path}" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_what_cant_be_checked_is_exit_status_2(tmp_path, tool, capsys):
    assert tool(["check", str(Voc(tmp_path, year=7).card)]) == 2
    assert "card.yaml: year is 7" in capsys.readouterr().err
    assert tool(["check", "no_such_thing"]) == 2
    assert "a registered data set: none" in capsys.readouterr().err
    MetadataCatalog.get("crosskd_voc").set(dirname=str(tmp_path / "gone"), split="train")
    DatasetCatalog.register("crosskd_voc", list)
    assert tool(["check", "crosskd_voc"]) == 2
    assert "gone doesn't exist (DETECTRON2_DATASETS" in capsys.readouterr().err
    DatasetCatalog.register("crosskd_other", list)
    assert tool(["check", "crosskd_other"]) == 2
    with pytest.raises(SystemExit) as error:
        tool(["verify"])
    assert error.value.code == 2


def test_a_registered_name_is_checked_like_its_card(tmp_path, tool, capsys):
    voc = Voc(tmp_path)
    voc.annotate("a", [BOX, ("rod", 3, 3, 3, 3)])
    register_card(str(voc.card))
    assert tool(["check", "tiny_train"]) == 1
    assert "box without area (1)" in capsys.readouterr().out
    (tmp_path / "second").mkdir()
    coco = Coco(tmp_path / "second")
    coco.found()
    register_card(str(coco.card))
    assert tool(["check", "tinyco_train"]) == 0
    coco.json["annotations"][0]["bbox"] = [0, 0, 0, 0]
    coco.found()
    assert tool(["check", "tinyco_train"]) == 1
    assert "  train.json: annotation 1 in 0.png, cell [0, 0, 0, 0]" in capsys.readouterr().out


@pytest.mark.skipif(
    not BCCD.is_dir(), reason=f"no BCCD photos in {BCCD} (set CROSSKD_IFC_BCCD to their folder)"
)
def test_the_blood_cell_photos_have_exactly_two_errors(monkeypatch):
    monkeypatch.setenv("CROSSKD_IFC_BCCD", str(BCCD.resolve()))
    card = str(REPO / "configs/datasets/bccd.yaml")
    report = check_card(load_card(card))
    places = report.found["box without area"]
    assert report.total("error") == 2 == len(places) and report.total("warning") == 1
    assert "BloodImage_00037.jpg in val" in list(report.found["alike in two splits"])[0]
    assert sorted(re.findall(r"BloodImage_\d+", " ".join(places))) == [
        "BloodImage_00338",
        "BloodImage_00343",
    ]
    assert [report.counts[split]["images"] for split in report.counts] == [205, 87, 292, 72]
    register_card(card)
    kept, dropped = drop_degenerate_boxes(DatasetCatalog.get("bccd_trainval"))
    kept_test, dropped_test = drop_degenerate_boxes(DatasetCatalog.get("bccd_test"))
    assert dropped + dropped_test == 2 and len(kept) + len(kept_test) == 364
