"""Random dataset cards, outlines, configs and overrides: valid, or one error that names file or
key."""

import json

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import tiny_cfg
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crosskd_ifc import ConfigError
from crosskd_ifc.common.config_files import merge_from_file, merge_from_list
from crosskd_ifc.config import distillation_requested
from crosskd_ifc.data.cards import load_card, register_card
from crosskd_ifc.data.check import check_card
from crosskd_ifc.data.loading import load_training_records
from crosskd_ifc.data.mapper import build_mapper
from crosskd_ifc.data.outlines import check_outlines
from crosskd_ifc.distillation.compatibility.settings import check_crosskd_config
from crosskd_ifc.training.preflight_data import check_test_data

SETTINGS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,  # a red CI must be red again
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


# Cards

GOOD_CARD = {
    "name": "fuzz",
    "format": "coco",
    "root": ".",
    "splits": {"train": {"json": "train.json", "images": "."}},
    "classes": ["rod", "cell"],
    "evaluator": "coco",
    "year": 2007,
}
CARD_VALUES = VALUES | st.sampled_from(
    ["voc", "coco", "pascal_voc", 2007, 2012, ".", "..", "/", "~", "$HOME", "${UNSET_}", "a/b"]
)
CARDS = st.tuples(
    st.dictionaries(st.sampled_from(list(GOOD_CARD)) | TEXT, CARD_VALUES, max_size=4),
    st.sets(st.sampled_from(list(GOOD_CARD)), max_size=3),
)


def _load_or_refuse(path, load):
    try:
        return load(str(path))
    except ValueError as error:
        assert str(path.resolve()) in str(error)
        assert len(str(error)) < 1500
    return None


@SETTINGS
@given(CARDS)
@example(({"format": "voc", "splits": {"train": "train"}, "year": None}, set()))
@example(({}, {"year"}))
def test_a_random_card_loads_or_is_one_error_that_names_it(tmp_path, changes):
    changed, removed = changes
    content = {k: v for k, v in {**GOOD_CARD, **changed}.items() if k not in removed}
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    card = _load_or_refuse(path, load_card)
    if card is not None:
        assert card.name and card.splits and card.format in ("voc", "coco")


@SETTINGS
@given(st.binary(max_size=80) | st.text(alphabet="{}[]:-&*!<?|>#%@'\" \n\tab1", max_size=60))
def test_a_card_of_random_bytes_is_one_error_that_names_it(tmp_path, content):
    path = tmp_path / "card.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert _load_or_refuse(path, load_card) is None


IMAGE = {"id": 0, "file_name": "a.jpg", "width": 40, "height": 30}
ANNOTATION = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}
NUMBERS = st.integers(-5, 50) | st.floats() | st.integers()


@SETTINGS
@given(
    st.dictionaries(st.sampled_from(list(IMAGE)) | TEXT, VALUES, max_size=2),
    st.dictionaries(
        st.sampled_from(list(ANNOTATION)) | TEXT,
        VALUES | NUMBERS | st.lists(NUMBERS, min_size=4, max_size=4),
        max_size=2,
    ),
    st.sets(st.sampled_from(list(ANNOTATION)), max_size=2),
)
def test_a_random_coco_json_loads_or_is_one_error_that_names_it(
    tmp_path, image, annotation, removed
):
    record = {k: v for k, v in {**ANNOTATION, **annotation}.items() if k not in removed}
    content = {
        "images": [{**IMAGE, **image}],
        "annotations": [record],
        "categories": [{"id": 1, "name": "rod"}, {"id": 2, "name": "cell"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content, default=str))
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in GOOD_CARD.items() if k != "year"}))
    register_card(str(path))
    try:
        for loaded in DatasetCatalog.get("fuzz_train"):
            assert loaded["file_name"].startswith(str(tmp_path))
    except ValueError as error:
        assert str(tmp_path / "train.json") in str(error)
    finally:
        DatasetCatalog.remove("fuzz_train")
        MetadataCatalog.remove("fuzz_train")


COORDINATES = st.integers(-5, 50) | st.floats(-5, 50) | st.floats() | st.integers() | SCALARS
POLYGONS = st.lists(st.integers(0, 40), min_size=6, max_size=12).filter(lambda x: len(x) % 2 == 0)
LETTERS = st.text(alphabet="0123456789:;<=>?@ABCDOPQ_`abcno", max_size=20)
RLES = st.fixed_dictionaries(
    {},
    optional={
        "size": st.just([30, 40]) | st.lists(st.integers() | SCALARS, max_size=3) | VALUES,
        "counts": st.lists(st.integers(0, 1300) | st.integers(), max_size=5)
        | st.integers(0, 1200).map(lambda n: [n, 1200 - n])
        | LETTERS
        | VALUES,
    },
)
OUTLINES = (
    st.lists(POLYGONS | st.lists(COORDINATES, max_size=9), max_size=3)
    | RLES
    | st.builds(dict, size=st.just([30, 40]), counts=LETTERS)
    | VALUES
)


@SETTINGS
@given(OUTLINES)
@example([[1, 1, 9, 1, 9, 9]])
@example([[1, 1, 9, float("nan"), 9, 9]])
@example({"size": [30, 40], "counts": [2**62]})
def test_a_random_outline_is_trained_and_evaluated_or_is_one_error_that_names_it(tmp_path, outline):
    """pycocotools would end this process on some of them."""
    record = {**ANNOTATION, "area": 9, "segmentation": outline}
    content = {"images": [IMAGE], "annotations": [record], "categories": [{"id": 1, "name": "a"}]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content, default=str))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    card = tmp_path / "card.yaml"
    change = {"classes": ["a"], "year": None}
    card.write_text(yaml.safe_dump({**GOOD_CARD, **change}))
    errors = check_card(load_card(str(card))).total("error")
    options = ("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")
    cfg = tiny_cfg("DATASETS.TRAIN", ("fuzz_train",), "DATASETS.TEST", ("fuzz_train",), *options)
    register_card(str(card))
    try:
        check_test_data(cfg)
        records = load_training_records(cfg)
        check_outlines(records, polygons=False)
    except ValueError as error:
        assert str(tmp_path) in str(error) and len(str(error)) < 1500
        # An object without an outline is an error only where masks are asked for.
        assert errors or "'segmentation'" in str(error) or "no outline" in str(error)
        return
    finally:
        DatasetCatalog.remove("fuzz_train")
        MetadataCatalog.remove("fuzz_train")
    assert not errors
    assert len(build_mapper(cfg, is_train=True)(records[0])["instances"]) <= 1
    truth = COCO(str(path))
    detection = {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1.0}
    mask = {"size": [30, 40], "counts": mask_util.encode(np.ones((30, 40), np.uint8, "F"))}
    mask["counts"] = mask["counts"]["counts"]
    evaluation = COCOeval(truth, truth.loadRes([{**detection, "segmentation": mask}]), "segm")
    evaluation.evaluate()


# Configs


def _leaves(node, prefix):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}"


KEYS = list(_leaves(tiny_cfg().MODEL.CROSSKD, "MODEL.CROSSKD"))
LIKELY = st.sampled_from(
    ["", "none", "sum", "mean", "direct", "through", "l1", "giou", "iou", "standardize", "float16"]
    + ["cross_head", "student_head", "fc1", "names", "teacher", 0, 1, -1, 0.5, 1e309, True, False]
)
CONFIG_VALUES = LIKELY | VALUES | st.lists(LIKELY, max_size=3).map(tuple)


def _accepted(change):
    """Whether a config takes a change; else a ConfigError of one paragraph that names a key."""
    cfg = tiny_cfg()
    try:
        change(cfg)
        check_crosskd_config(cfg)
        distillation_requested(cfg)
    except ConfigError as error:
        assert "MODEL." in str(error) or "config.yaml" in str(error), error
        assert len(str(error)) < 1500
        return False
    return True


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(KEYS), CONFIG_VALUES), min_size=1, max_size=3))
@example([("MODEL.CROSSKD.FUSION.NAME", "mean"), ("MODEL.CROSSKD.ENABLED", False)])
def test_random_overrides_are_valid_or_one_error_that_names_the_key(pairs):
    opts = [x for pair in pairs for x in pair]
    _accepted(lambda cfg: merge_from_list(cfg, opts, key="the command line"))


@SETTINGS
@given(st.lists(TEXT | st.sampled_from(KEYS) | LIKELY.map(str), min_size=1, max_size=4))
def test_random_words_on_the_command_line_are_one_error(words):
    try:
        merge_from_list(tiny_cfg(), words, key="the command line")
    except ConfigError as error:
        assert "the command line" in str(error)


@SETTINGS
@given(st.dictionaries(st.sampled_from([k.split(".", 2)[2] for k in KEYS]), VALUES, max_size=3))
def test_a_random_config_file_is_valid_or_one_error_that_names_it(tmp_path, values):
    content = {}
    for key, value in values.items():
        *nodes, leaf = key.split(".")
        node = content.setdefault("MODEL", {}).setdefault("CROSSKD", {})
        for name in nodes:
            node = node.setdefault(name, {})
        node[leaf] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    _accepted(lambda cfg: merge_from_file(cfg, str(path), key="--config-file"))


@SETTINGS
@given(st.binary(max_size=80) | st.text(alphabet="{}[]:-&*!<?|>#%@'\" \n\tMODEL_B1", max_size=60))
def test_a_config_file_of_random_bytes_is_one_error_that_names_it(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        merge_from_file(tiny_cfg(), str(path), key="--config-file")
    except ConfigError as error:
        assert "config.yaml" in str(error)


def test_the_fuzzers_base_is_valid(tmp_path):
    assert _accepted(lambda cfg: merge_from_list(cfg, ["MODEL.CROSSKD.ENABLED", False], key="x"))
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in GOOD_CARD.items() if k != "year"}))
    assert load_card(str(path)).classes == ("rod", "cell")
    with pytest.raises(ValueError, match="year"):
        path.write_text(yaml.safe_dump(GOOD_CARD))
        load_card(str(path))
