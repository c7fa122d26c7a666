"""Bad annotations and images on their way into training and evaluation: each is one error that
names the file, or a repair that is counted."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from helpers import tiny_cfg
from PIL import Image
from test_cards import (
    EPS,
    OUTLINES_BROKEN,
    OUTLINES_GOOD,
    TRIANGLE,
    XML_DECLARATION,
    Coco,
    Voc,
    _image,
    _write,
    _xml,
)

from crosskd_ifc import ConfigError, CrossKDTrainer
from crosskd_ifc.data.cards import register_card
from crosskd_ifc.data.mapper import CheckedMapper, SampleError, build_mapper
from crosskd_ifc.training.errors import message_in_traceback
from crosskd_ifc.training.preflight_data import check_test_data

GOOD = ("rod", 1, 1, 30, 20)


def _cfg(name, *opts):
    options = ("DATASETS.TRAIN", (name,), "MODEL.ROI_HEADS.NUM_CLASSES", 2, *opts)
    return tiny_cfg("MODEL.CROSSKD.ENABLED", False, "INPUT.MAX_SIZE_TRAIN", 96, *options)


def _all_samples(name):
    """What training gets of a data set, each image once."""
    stream = CrossKDTrainer.build_train_loader(_cfg(name)).stream
    mapper = build_mapper(_cfg(name), is_train=True)
    return [mapper(record) for record in stream.records]


# Annotations

LAUGHS = "<!DOCTYPE a [<!ENTITY a 'ha'>%s]>" % "".join(
    f"<!ENTITY a{i} '{('&a%s;' % (i - 1 or '')) * 10}'>" for i in range(1, 10)
)
XML_REFUSED = {
    "not closed": _xml([GOOD])[:-8],
    "nothing": "",
    "other text": "hello",
    "two roots": _xml([GOOD]) * 2,
    "binary": b"\x00\x01\x02\xff" * 20,
    "UTF-16": _xml([GOOD]).encode("utf-16"),
    "UTF-8 that says it is UTF-16": XML_DECLARATION.format("UTF-16") + _xml([GOOD]),
    "UTF-8 that says it is GBK": XML_DECLARATION.format("GBK") + _xml([GOOD]),
    "an unknown encoding": XML_DECLARATION.format("no-such") + _xml([GOOD]),
    "an encoding that is none": XML_DECLARATION.format("base64") + _xml([GOOD]),
    "UTF-8 that says it is Latin-1": XML_DECLARATION.format("ISO-8859-1")
    + _xml([("r\xf6d", 1, 1, 9, 9)]),
    "Latin-1 bytes": _xml([("r\xf6d", 1, 1, 9, 9)]).encode("latin-1"),
    "an entity bomb": LAUGHS + _xml([GOOD]).replace("rod", "&a9;"),
    "an external entity": "<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>"
    + _xml([GOOD]).replace("rod", "&e;"),
    "a parameter entity": "<!DOCTYPE a [<!ENTITY % e SYSTEM 'http://127.0.0.1/x'> %e;]>"
    + _xml([GOOD]),
    "an undefined entity": _xml([GOOD]).replace("rod", "&rod;"),
    "no size": "<annotation></annotation>",
    "a width of text": _xml([GOOD], width="wide"),
    "a fractional height": _xml([GOOD], height=29.5),
    "a width with 400 digits": _xml([GOOD], width="9" * 5000),
    "no name": _xml([GOOD]).replace("<name>rod</name>", ""),
    "an empty name": _xml([GOOD]).replace("rod", ""),
    "an unknown class": _xml([("wheel", 1, 1, 9, 9)]),
    "no box": _xml([GOOD]).replace("bndbox", "box"),
    "no xmax": _xml([GOOD]).replace("xmax", "right"),
    "an empty coordinate": _xml([("rod", 1, "", 9, 9)]),
    "a coordinate of text": _xml([("rod", "one", 1, 9, 9)]),
    "another size than the image": _xml([GOOD], width=41),
    "a size of 0": _xml([GOOD], width=0, height=0),
    "a negative size": _xml([GOOD], width=-40),
}


@pytest.mark.parametrize("case", XML_REFUSED)
def test_a_bad_voc_annotation_is_one_error_that_names_file_or_image(case, tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / "Annotations/b.xml", XML_REFUSED[case])
    name = register_card(str(voc.card))[0]
    with pytest.raises(SampleError, match=r"Annotations/b.xml|JPEGImages/b.jpg") as error:
        _all_samples(name)
    assert len(str(error.value)) < 600


XML_DROPPED = {
    "no width": (9, 3, 9, 8),
    "a negative height": (3, 9, 8, 5),
    "not a number": ("nan", 3, 9, 9),
    "infinite": (1, 1, "inf", 9),
    "a coordinate of 1e999": (1, 1, 9, "1e999"),
    "right of the image": (41, 3, 60, 9),
    "below the image": (3, 1e6, 9, 2e6),
    "left of the image": (-30, 3, -1, 9),
}


@pytest.mark.parametrize("case", XML_DROPPED)
def test_a_box_that_marks_nothing_is_dropped_and_counted(case, tmp_path, caplog):
    voc = Voc(tmp_path)
    voc.annotate("b", [GOOD, ("cell", *XML_DROPPED[case])])
    name = register_card(str(voc.card))[0]
    with caplog.at_level(logging.WARNING, "crosskd_ifc"):
        samples = _all_samples(name)
    assert [len(s["instances"]) for s in samples] == [2, 1, 2]
    assert "Dropped 1 box " in caplog.text and "b.jpg" in caplog.text


def test_huge_boxes_and_those_over_the_border_are_cut_at_the_border(tmp_path):
    voc = Voc(tmp_path)
    voc.annotate("b", [("cell", -1e9, -50, 1e12, 900), ("rod", 30, 20, 70, 70)])
    sample = _all_samples(register_card(str(voc.card))[0])[1]
    height, width = sample["image"].shape[1:]
    boxes = sample["instances"].gt_boxes.tensor
    assert len(boxes) == 2 and boxes.min() >= 0
    assert boxes[:, 0::2].max() == width and boxes[:, 1::2].max() == height


def _annotation(**fields):
    return lambda coco: coco.json["annotations"][1].update(fields)


def _image_record(**fields):
    return lambda coco: coco.json["images"][1].update(fields)


def _without(kind, field):
    return lambda coco: coco.json[kind][1].pop(field)


JSON_REFUSED = {
    "a box of three": _annotation(bbox=[1, 1, 5]),
    "a box of text": _annotation(bbox=["1", 1, 5, None]),
    "a box that is no list": _annotation(bbox=7),
    "a coordinate beyond floats": _annotation(bbox=[1, 1, 5, 10**400]),
    "no box": _without("annotations", "bbox"),
    "no category": _without("annotations", "category_id"),
    "an unknown category": _annotation(category_id=99),
    "a category of text": _annotation(category_id="cell"),
    "no image id": _without("annotations", "image_id"),
    "an id twice": _annotation(id=1),
    "no file name": _without("images", "file_name"),
    "a file name that is a number": _image_record(file_name=5),
    "no width": _without("images", "width"),
    "another height than the image's": _image_record(height=31),
    "a width of text": _image_record(width="40"),
    "a device as an image": _image_record(file_name="/dev/zero"),
    "a folder as an image": _image_record(file_name="."),
    "a file name with a null byte": _image_record(file_name="a\0b"),
    "an image id twice": _image_record(id=0),
    "a category without a name": lambda coco: coco.json["categories"].append({"id": 7}),
    "a record that is a text": lambda coco: coco.json["annotations"].append("text"),
    "images that are no list": lambda coco: coco.json.update(images={}),
    "no categories": lambda coco: coco.json.pop("categories"),
    "no images": lambda coco: coco.json.update(images=[]),
    "a category id twice": lambda coco: coco.json["categories"].append({"id": 1, "name": "x"}),
    "an outline that is one flat list": _annotation(segmentation=[1, 1, 9, 1, 9, 9]),
    "an outline of texts": _annotation(segmentation=["1, 1, 9, 1, 9, 9"]),
    "an outline that is a number": _annotation(segmentation=7),
    "an image id in text": _annotation(image_id="1"),
}


@pytest.mark.parametrize("case", JSON_REFUSED)
def test_a_bad_coco_record_is_one_error_that_names_file_or_image(case, tmp_path):
    coco = Coco(tmp_path)
    JSON_REFUSED[case](coco)
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    with pytest.raises(SampleError, match=r"train.json|images/|/dev/zero") as error:
        _all_samples(name)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change, message",
    [
        (
            _annotation(segmentation=[1, 1, 9, 1, 9, 9]),
            r"train.json: annotation 2: its segmentation .* list of polygons, \[\[x1, y1, ",
        ),
        (
            lambda coco: coco.json["categories"].append({"id": 1, "name": "cell"}),
            "train.json: 2 categories have the id 1",
        ),
    ],
    ids=["a flat outline", "a category id twice"],
)
def test_what_a_coco_file_has_wrong_is_named(change, message, tmp_path):
    coco = Coco(tmp_path)
    change(coco)
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    with pytest.raises(SampleError, match=f"card.yaml: splits.train: .*{message}"):
        DatasetCatalog.get(name)


def test_an_image_twice_in_a_voc_list_is_one_error_that_names_list_and_image(tmp_path):
    voc = Voc(tmp_path)
    voc.split("train", "abcb")
    name = register_card(str(voc.card))[0]
    with pytest.raises(SampleError, match="ImageSets/Main/train.txt: .* 'b' is there 2 times"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize("separator", ["\u2028", "\x1f", "\x1c", "\x0b"])
def test_only_line_ends_end_a_line_of_a_voc_list(separator, tmp_path):
    voc = Voc(tmp_path)
    voc.split("train", ["a", f"b{separator}c", "d"])
    name = register_card(str(voc.card))[0]
    with pytest.raises(SampleError, match="train.txt: expected one image id per line"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 200_000, b'{"images": "\xff"}', "{}".encode("utf-16"), b"null", b"1e999"],
    ids=["nothing", "open", "deep", "not UTF-8", "UTF-16", "null", "a number"],
)
def test_a_file_that_is_no_coco_json_is_one_error_that_names_it(content, tmp_path):
    coco = Coco(tmp_path)
    _write(coco.root / "train.json", content)
    name = register_card(str(coco.card))[0]
    with pytest.raises(ValueError, match="train.json"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize("case", OUTLINES_BROKEN)
@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_a_broken_outline_is_one_error_before_training(case, key, tmp_path):
    outline, message = OUTLINES_BROKEN[case]
    coco = Coco(tmp_path)
    coco.json["annotations"][1]["segmentation"] = outline
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    opts = ("MODEL.MASK_ON", True, key, (name,))
    (tmp_path / "good").mkdir()
    good = register_card(str(Voc(tmp_path / "good").card))[0]
    train = good if key == "DATASETS.TEST" else name
    with pytest.raises(ValueError, match=f"train.json: annotation 2: .*{message}") as error:
        CrossKDTrainer(_cfg(train, "OUTPUT_DIR", str(tmp_path), *opts))
    assert isinstance(error.value, SampleError if key == "DATASETS.TRAIN" else ConfigError)
    assert len(str(error.value)) < 700


def _outlines(tmp_path, *outlines):
    """A data set with these outlines, and its name."""
    coco = Coco(tmp_path)
    for annotation, outline in zip(coco.json["annotations"], outlines):
        annotation["segmentation"] = outline
    _write(coco.root / "train.json", json.dumps(coco.json))
    return register_card(str(coco.card))[0]


def test_good_outlines_reach_the_model(tmp_path):
    name = _outlines(tmp_path, *[outline or [TRIANGLE] for outline in OUTLINES_GOOD])
    cfg = _cfg(name, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")
    stream = CrossKDTrainer.build_train_loader(cfg).stream
    for record in stream.records:
        instances = build_mapper(cfg, is_train=True)(record)["instances"]
        assert len(instances) == 2 and instances.gt_masks.tensor.any()


@pytest.mark.parametrize(
    "outlines, opts, message",
    [
        ([[TRIANGLE]] * 5 + [None], (), "images/2.png: .* no outline"),
        ([[TRIANGLE]] * 5, (), "images/2.png: .* no outline"),
        ([], (), "images/0.png: .* no outline"),
        ([[TRIANGLE]] * 5 + [OUTLINES_GOOD[2]], (), "images/2.png: .*INPUT.MASK_FORMAT 'bitmask'"),
    ],
    ids=["null", "missing", "none at all", "RLE where polygons are read"],
)
def test_masks_are_trained_only_where_every_object_has_an_outline(
    outlines, opts, message, tmp_path
):
    name = _outlines(tmp_path, *outlines)
    assert len(_all_samples(name)) == 3  # boxes alone
    with pytest.raises(SampleError, match=message):
        CrossKDTrainer.build_train_loader(_cfg(name, "MODEL.MASK_ON", True, *opts))


def test_outlines_of_data_sets_without_a_card_are_looked_at_too(tmp_path):
    record = {"file_name": "a.png", "image_id": 0, "height": 30, "width": 40}
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": 1, "category_id": 0}
    outline = [np.array([1, 1, 9, float("nan"), 9, 9])]
    record["annotations"] = [{**box, "segmentation": [np.array(TRIANGLE)]}]
    record["annotations"].append({**box, "segmentation": outline})
    DatasetCatalog.register("own_outlines", lambda: [record])
    with pytest.raises(SampleError, match="a.png: .*not finite"):
        CrossKDTrainer.build_train_loader(_cfg("own_outlines", "MODEL.MASK_ON", True))


# Test sets: what only an evaluator reads


def _pop(field):
    return lambda annotation: annotation.pop(field)


def _put(**fields):
    return lambda annotation: annotation.update(fields)


COCO_NOT_EVALUATED = {
    "no iscrowd": (_pop("iscrowd"), "'iscrowd'"),
    "no area": (_pop("area"), "'area'"),
    "an area of text": (_put(area="9"), "'area'"),
    "iscrowd null": (_put(iscrowd=None), "'iscrowd'"),
    "a box of three": (_put(bbox=[1, 1, 5]), "'bbox'"),
    "an id of text": (_put(id="two"), "'id'"),
    "an id of 0": (_put(id=0), "'id' is 0; .*never counts"),
    "a huge id": (_put(id=2**63 - 1), "'id'"),
    "a negative area": (_put(area=-4.0), "'area'"),
    "an area that is NaN": (_put(area=float("nan")), "'area'"),
}


@pytest.mark.parametrize("case", COCO_NOT_EVALUATED)
def test_a_coco_file_that_cant_be_evaluated_trains_but_is_no_test_set(case, tmp_path):
    change, field = COCO_NOT_EVALUATED[case]
    coco = Coco(tmp_path)
    change(coco.json["annotations"][1])
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    message = f"DATASETS.TEST.*card.yaml: splits.train: .*/train.json: annotation .*: {field} "
    with pytest.raises(ConfigError, match=message):
        CrossKDTrainer(_cfg(name, "DATASETS.TEST", (name,)))
    if case != "a box of three":
        assert len(_all_samples(name)) == 3


def test_a_test_set_with_a_huge_category_id_is_refused(tmp_path):
    coco = Coco(tmp_path)
    coco.json["categories"][0]["id"] = 2**63 - 1
    for annotation in coco.json["annotations"][3:]:
        annotation["category_id"] = 2**63 - 1
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    with pytest.raises(ConfigError, match="train.json: category 9223372036854775807: 'id'"):
        check_test_data(_cfg(name, "DATASETS.TEST", (name,)))


@pytest.mark.parametrize("crowds", [True, False])
def test_a_test_set_with_nothing_to_find_is_refused(crowds, tmp_path):
    coco = Coco(tmp_path)
    for annotation in coco.json["annotations"]:
        annotation["iscrowd"] = 1
    if not crowds:
        coco.json["annotations"] = []
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    with pytest.raises(ConfigError, match="train.json: 'annotations' has no object but crowds"):
        check_test_data(_cfg(name, "DATASETS.TEST", (name,)))


@pytest.mark.parametrize("outline", [None, [], [[1, 2, 3, 4]], "none"])
def test_masks_are_evaluated_only_where_every_object_has_an_outline(outline, tmp_path):
    coco = Coco(tmp_path)
    for annotation in coco.json["annotations"]:
        annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    if outline == "none":
        del coco.json["annotations"][1]["segmentation"]
    else:
        coco.json["annotations"][1]["segmentation"] = outline
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    check_test_data(_cfg(name, "DATASETS.TEST", (name,)))
    with pytest.raises(ConfigError, match="annotation 2: 'segmentation'"):
        check_test_data(_cfg(name, "DATASETS.TEST", (name,), "MODEL.MASK_ON", True))


GOOD_XML = _xml([("cell", 5, 5, 20, 20), GOOD])
VOC_NOT_EVALUATED = {
    "no pose": (("<pose>x</pose>", ""), "<pose>"),
    "no truncated": (("<truncated>0</truncated>", ""), "<truncated>"),
    "an empty truncated": (("<truncated>0</truncated>", "<truncated/>"), "<truncated>"),
    "no difficult": (("<difficult>0</difficult>", ""), "<difficult>"),
    "a coordinate of 5.0": (("<xmin>5<", "<xmin>5.0<"), "<xmin>"),
}


@pytest.mark.parametrize("case", VOC_NOT_EVALUATED)
def test_an_object_that_the_voc_evaluator_cant_read_is_refused_in_a_test_set(case, tmp_path):
    change, field = VOC_NOT_EVALUATED[case]
    voc = Voc(tmp_path, evaluator="pascal_voc", year=2012)
    _write(voc.root / "Annotations/b.xml", GOOD_XML.replace(*change, 1))
    train, test = register_card(str(voc.card))
    check_test_data(_cfg(test, "DATASETS.TEST", (test,)))
    message = f"card.yaml: splits.train: .*/b.xml: object 1, cell: no usable {field}.*"
    with pytest.raises(ConfigError, match=f"DATASETS.TEST.*{message}evaluator: coco"):
        CrossKDTrainer(_cfg(train, "DATASETS.TEST", (test, train)))
    assert len(_all_samples(train)) == 3
    voc.change(name="other", evaluator="coco", year=None)
    other = register_card(str(voc.card))[0]
    check_test_data(_cfg(other, "DATASETS.TEST", (other,)))


def test_a_class_without_an_object_is_refused_in_a_test_set_of_the_voc_evaluator(tmp_path, caplog):
    """It would count as AP 0, or NaN."""
    voc = Voc(tmp_path, evaluator="pascal_voc", year=2012, classes=["cell", "rod", "rare"])
    name = register_card(str(voc.card))[1]
    with pytest.raises(
        ConfigError, match="splits.val: there is no object of 'rare' .*evaluator: c"
    ):
        check_test_data(_cfg(name, "DATASETS.TEST", (name,)))
    check_test_data(_cfg(name, "DATASETS.TEST", (name,)), evaluation=True)
    assert "no object of 'rare'" in caplog.text
    voc.annotate("d", [GOOD, ("rare", 5, 5, 20, 20)])
    check_test_data(_cfg(name, "DATASETS.TEST", (name,)))
    path = voc.root / "Annotations/d.xml"
    text = path.read_text()
    start = text.index("<name>rare")
    hard = text[start:].replace("<difficult>0", "<difficult>1")
    path.write_text(text[:start] + hard)
    with pytest.raises(ConfigError, match="no object of 'rare' but difficult ones"):
        check_test_data(_cfg(name, "DATASETS.TEST", (name,)))


def test_an_empty_line_of_a_voc_list_is_refused_in_a_test_set_of_the_voc_evaluator(tmp_path):
    voc = Voc(tmp_path, evaluator="pascal_voc", year=2012)
    _write(voc.root / "ImageSets/Main/val.txt", "d\n \ne\n")
    name = register_card(str(voc.card))[1]
    with pytest.raises(ConfigError, match="splits.val: .*Main/val.txt: an empty line"):
        check_test_data(_cfg(name, "DATASETS.TEST", (name,)))


def test_a_test_set_that_cant_be_loaded_is_refused_before_training(tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / "Annotations/d.xml", "<annotation>")
    train, test = register_card(str(voc.card))
    with pytest.raises(ConfigError, match="DATASETS.TEST.*splits.val.*d.xml: not valid XML"):
        CrossKDTrainer(_cfg(train, "DATASETS.TEST", (test,)))


def test_a_test_set_without_annotations_and_one_of_an_own_evaluator_are_not_refused(tmp_path):
    coco = Coco(tmp_path)
    del coco.json["annotations"]
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]
    check_test_data(_cfg(name, "DATASETS.TEST", (name,)))
    (tmp_path / "other").mkdir()
    coco = Coco(tmp_path / "other", name="own")
    coco.json["annotations"][0].pop("area")
    _write(coco.root / "train.json", json.dumps(coco.json))
    name = register_card(str(coco.card))[0]

    class Own(CrossKDTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return None

    Own(_cfg(name, "DATASETS.TEST", (name,), "OUTPUT_DIR", str(tmp_path / "out")))


# Images


def _png16():
    out = io.BytesIO()
    Image.fromarray(np.full((30, 40), 40000, dtype=np.uint16)).save(out, "PNG")
    return out.getvalue()


def _exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


IMAGES_REFUSED = {
    "zero bytes": (b"", "not an image"),
    "text": (b"hello", "not an image"),
    "an EPS, which Pillow would give to Ghostscript": (EPS, "not an image"),
    "missing": (None, "missing"),
    "only a header": (_image(1)[:150], "unreadable|can't use"),
    "truncated": (_image(1)[:-300], "truncated"),
    "a PNG that ends early": (_image(1, kind="PNG")[:-200], "truncated|can't use"),
    "16 bits": (_png16(), "more than 8 bits.*I;16.*convert it"),
    "32-bit floats": (_image(1, kind="TIFF", mode="F"), "more than 8 bits.*mode F"),
    "another size": (_image(1, (30, 40)), "SizeMismatchError"),
    "turned by EXIF": (_image(1, exif=_exif(6)), "SizeMismatchError"),
}


@pytest.mark.parametrize("loading", ["training", "evaluation"])
@pytest.mark.parametrize("case", IMAGES_REFUSED)
def test_an_image_that_cant_be_used_is_one_error_that_names_it(case, loading, tmp_path):
    content, message = IMAGES_REFUSED[case]
    voc = Voc(tmp_path)
    (voc.root / "JPEGImages/b.jpg").unlink()
    if content is not None:
        _write(voc.root / "JPEGImages/b.jpg", content)
    name = register_card(str(voc.card))[0]
    build = {
        "training": lambda: CrossKDTrainer.build_train_loader(_cfg(name)),
        "evaluation": lambda: CrossKDTrainer.build_test_loader(_cfg(name), name),
    }
    with pytest.raises(SampleError, match=f"JPEGImages/b.jpg: .*({message})"):
        for _, batch in zip(range(4), build[loading]()):
            pass


IMAGES_READ = {
    "greyscale": _image(1, mode="L"),
    "CMYK": _image(1, mode="CMYK"),
    "RGBA": _image(1, kind="PNG", mode="RGBA"),
    "a palette": _image(1, kind="PNG", mode="P"),
    "one bit": _image(1, kind="PNG", mode="1"),
    "turned upside down by EXIF": _image(1, exif=_exif(3)),
    "corrupt EXIF": _image(1, exif=b"Exif\0\0junk"),
    "a PNG named .jpg": _image(1, kind="PNG"),
    **{f"a {kind}": _image(1, kind=kind) for kind in ("BMP", "GIF", "TIFF", "WEBP", "PPM")},
}


@pytest.mark.parametrize("case", IMAGES_READ)
def test_images_of_other_modes_are_read_as_three_channels(case, tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / "JPEGImages/b.jpg", IMAGES_READ[case])
    sample = _all_samples(register_card(str(voc.card))[0])[1]
    assert sample["image"].shape[0] == 3 and sample["image"].dtype == torch.uint8
    assert sample["image"].float().std() > 1


@pytest.mark.parametrize("size", [(1, 1), (30000, 1)])
def test_images_of_extreme_shape_are_read_or_refused_by_name(size, tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / "JPEGImages/b.jpg", _image(1, size, kind="PNG"))
    voc.annotate("b", [("cell", 1, 1, 1 + (size[0] > 1), 1)], width=size[0], height=size[1])
    record = DatasetCatalog.get(register_card(str(voc.card))[0])[1]
    mapper = build_mapper(_cfg("x"), is_train=False)
    if size == (1, 1):
        assert mapper(record)["image"].shape[0] == 3
    else:  # 30000 : 1 leaves no pixel in height
        with pytest.raises(SampleError, match="JPEGImages/b.jpg"):
            mapper(record)


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    voc = Voc(tmp_path)
    name = register_card(str(voc.card))[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # an image has 1,200, over twice as many
    with pytest.raises(SampleError, match="JPEGImages/.*too large to be decoded safely"):
        _all_samples(name)


def test_a_worker_of_the_data_loader_names_the_image_too(tmp_path):
    voc = Voc(tmp_path)
    _write(voc.root / "JPEGImages/b.jpg", b"")
    name = register_card(str(voc.card))[0]
    loader = CrossKDTrainer.build_train_loader(_cfg(name, "DATALOADER.NUM_WORKERS", 1))
    with pytest.raises(SampleError) as error:
        for _, _batch in zip(range(4), loader):
            pass
    message = message_in_traceback(str(error.value), SampleError)
    assert message.startswith(f"{voc.root}/JPEGImages/b.jpg: not an image") and "\n" not in message


def test_a_mapper_of_ones_own_may_read_what_it_likes_but_its_failures_have_a_name():
    assert CheckedMapper(lambda record: record["x"])({"x": 3, "file_name": "no.png"}) == 3
    with pytest.raises(SampleError, match="no.png: .*KeyError: 'x'"):
        CheckedMapper(lambda record: record["x"])({"file_name": "no.png"})
    with pytest.raises(SampleError, match="image id 5: "):
        CheckedMapper(lambda record: record["x"])({"image_id": 5})


def test_a_broken_image_leaves_a_checkpoint_and_a_repaired_one_lets_the_run_go_on(tmp_path):
    voc = Voc(tmp_path)
    for image_id in "bc":
        _write(voc.root / f"JPEGImages/{image_id}.jpg", _image(1, mode="L")[:-99])
    name = register_card(str(voc.card))[0]
    opts = ("SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 100)
    # With this seed the first image is a whole one.
    opts += ("SEED", 1, "OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", 0)
    cfg = _cfg(name, *opts)

    def train(resume):
        torch.manual_seed(0)
        np.random.seed(_seed_that_starts_with_a_whole_image(cfg))
        trainer = CrossKDTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    with pytest.raises(SampleError, match="JPEGImages/[bc].jpg.*last good checkpoint: .*model_0"):
        train(resume=False)
    for image_id in "bc":
        _write(voc.root / f"JPEGImages/{image_id}.jpg", _image(1))
    trainer = train(resume=True)
    assert trainer.start_iter > 0 and trainer.iter == 12


def _seed_that_starts_with_a_whole_image(cfg):
    for seed in range(50):
        np.random.seed(seed)
        stream = CrossKDTrainer.build_train_loader(cfg).stream
        if stream.records[next(iter(stream.samples))]["file_name"].endswith("a.jpg"):
            return seed
    raise AssertionError("no such seed")
