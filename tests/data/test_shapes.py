"""The generated data set: same bytes everywhere, safe files, and labels that fit the pictures."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

from crosskd_ifc.data import shapes, shapes_drawing

TINY = {"num_images": {"train": 3, "val": 1, "test": 2}, "image_size": 64, "seed": 3}


def digests(root):
    """The sha256 of each file below ``root``."""
    result = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                result[os.path.relpath(path, root)] = hashlib.sha256(f.read()).hexdigest()
    return result


def start_generating(root, hash_seed):
    """Starts another Python process that generates the tiny set."""
    code = f"from crosskd_ifc.data import shapes; shapes.generate({str(root)!r}, **{TINY!r})"
    paths = [str(Path(shapes.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONHASHSEED=hash_seed, PYTHONPATH=os.pathsep.join(paths))
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)


@pytest.fixture
def register(tmp_path):
    """Registers tiny sets below ``tmp_path``, and removes them from the catalogs again."""
    names = []

    def register(name_prefix="tiny_shapes", **kwargs):
        new = shapes.register_shapes(
            name_prefix, **{"root": str(tmp_path / "set"), **TINY, **kwargs}
        )
        names.extend(new)
        return new

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def scenes():
    """Some full-sized pictures and their annotations."""
    return [shapes.render(0, "train", i) for i in range(30)]


# The same bytes, or nothing


def test_racing_processes_write_the_same_bytes_as_this_one(tmp_path):
    racers = [start_generating(tmp_path / "raced", hash_seed) for hash_seed in ("1", "2")]
    shapes.generate(str(tmp_path / "alone"), **TINY)
    for racer in racers:
        assert racer.wait() == 0, racer.stderr.read().decode()
        racer.stderr.close()
    alone = digests(tmp_path / "alone")
    assert len(alone) == 3 + 1 + 2 + 3 + 1  # images, annotation files, info.json
    assert digests(tmp_path / "raced") == alone
    assert not os.path.exists(tmp_path / "raced.partial")


def test_an_image_depends_on_seed_split_and_index_only(scenes):
    image, annotations = shapes.render(0, "train", 7)
    assert np.array_equal(image, scenes[7][0]) and annotations == scenes[7][1]
    others = [
        shapes.render(0, "val", 7),
        shapes.render(1, "train", 7),
        shapes.render(0, "train", 8),
    ]
    for other, _ in others:
        assert not np.array_equal(image, other)


def test_fewer_images_are_the_first_ones_of_more(tmp_path):
    shapes.generate(str(tmp_path / "more"), **TINY)
    shapes.generate(str(tmp_path / "fewer"), **{**TINY, "num_images": {"train": 2}})
    fewer, more = digests(tmp_path / "fewer"), digests(tmp_path / "more")
    images = [name for name in fewer if name.endswith(".png")]
    assert len(images) == 2 and all(fewer[name] == more[name] for name in images)


def test_splits_share_no_image(tmp_path):
    shapes.generate(str(tmp_path / "set"), **TINY)
    images = [digest for name, digest in digests(tmp_path / "set").items() if ".png" in name]
    assert len(set(images)) == len(images) == 6


def test_an_existing_folder_is_used_as_it_is(tmp_path, monkeypatch):
    root = str(tmp_path / "set")
    shapes.generate(root, **TINY)
    monkeypatch.setattr(shapes, "_write", None)
    shapes.generate(root, **TINY)


@pytest.mark.parametrize("change", [{"seed": 4}, {"image_size": 80}, {"num_images": {"val": 1}}])
def test_a_folder_with_other_parameters_is_refused(tmp_path, change):
    root = str(tmp_path / "set")
    shapes.generate(root, **TINY)
    before = digests(root)
    with pytest.raises(ValueError, match="Remove the folder") as error:
        shapes.generate(root, **{**TINY, **change})
    assert root in str(error.value)
    assert digests(root) == before


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="Not a generated shapes data set"):
        shapes.generate(str(tmp_path / "set"), **TINY)
    assert (tmp_path / "set" / "thesis.txt").read_text() == "mine"


def test_an_interrupted_generation_is_redone(tmp_path, monkeypatch):
    root, render = str(tmp_path / "set"), shapes.render

    def interrupted(seed, split, index, image_size):
        if split == "val":
            raise KeyboardInterrupt
        return render(seed, split, index, image_size)

    monkeypatch.setattr(shapes, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(root, **TINY)
    assert not os.path.exists(root)
    (tmp_path / "set.partial" / "train" / "leftover.png").write_text("half a picture")
    monkeypatch.setattr(shapes, "render", render)
    shapes.generate(root, **TINY)
    shapes.generate(str(tmp_path / "clean"), **TINY)
    assert digests(root) == digests(tmp_path / "clean")
    assert not os.path.exists(root + ".partial")


@pytest.mark.parametrize(
    "wrong",
    [{"num_images": {"test2017": 5}}, {"num_images": {"val": 0}}, {"image_size": 32}, {"seed": -1}],
)
def test_wrong_parameters_are_refused_at_registration(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        shapes.register_shapes("wrong_shapes", **wrong)
    assert not [name for name in DatasetCatalog.list() if name.startswith("wrong_shapes")]


# The labels fit the pictures


def test_boxes_are_tight_around_their_masks_and_inside_the_image(scenes):
    for image, annotations in scenes:
        h, w = image.shape[:2]
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            assert width > 0 and height > 0 and annotation["area"] > 0
            assert x >= 0 and y >= 0 and x + width <= w and y + height <= h
            rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], h, w))
            ys, xs = np.nonzero(mask_util.decode(rle))
            tight = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            assert np.abs(np.subtract(tight, (x, y, x + width, y + height))).max() <= 1
            assert annotation["area"] == pytest.approx(len(xs), rel=0.1)


def test_polygons_cover_the_mask_that_they_were_made_from():
    y, x = np.mgrid[:60, :60] + 0.5
    rho = np.hypot(x - 30, y - 28)
    ring = (rho < 25) & (rho > 12)
    ring_and_island = ring | (rho < 6)
    two_pieces = ring & (np.abs(x - 30) > 3)
    for mask in (ring, ring_and_island, two_pieces):
        polygons = shapes_drawing._annotation("ring", mask)["segmentation"]
        assert len(polygons) >= 2
        found = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, 60, 60)))
        found = found.astype(bool)
        assert (found & mask).sum() / (found | mask).sum() > 0.97


def test_every_class_occurs_and_images_hold_two_to_seven_objects(scenes):
    counts = [len(annotations) for _, annotations in scenes]
    assert min(counts) >= 2 and max(counts) == 7
    ids = {annotation["category_id"] for _, annotations in scenes for annotation in annotations}
    assert ids == set(range(1, len(shapes.CLASSES) + 1))


def test_the_two_disks_differ_in_texture_only():
    u, v = np.mgrid[-1:1:9j, -1:1:9j]
    disks = [
        shapes_drawing._distance(kind, np.random.default_rng(0), u, v)
        for kind in ("striped_disk", "dotted_disk", "plain_disk")
    ]
    assert np.array_equal(disks[0], disks[1]) and np.array_equal(disks[0], disks[2])


# detectron2 takes it as any other data set


def test_registering_writes_nothing_and_the_first_load_writes(register, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    names = register(root=None)
    assert names == ["tiny_shapes_train", "tiny_shapes_val", "tiny_shapes_test"]
    metadata = [MetadataCatalog.get(name) for name in names]
    assert os.listdir(tmp_path) == []
    assert {meta.evaluator_type for meta in metadata} == {"coco"}
    assert metadata[0].thing_classes == list(shapes.CLASSES)

    dicts = DatasetCatalog.get("tiny_shapes_test")
    assert len(dicts) == 2
    assert all(os.path.isfile(meta.json_file) for meta in metadata)
    assert dicts[0]["file_name"].startswith(metadata[2].image_root)
    with Image.open(dicts[0]["file_name"]) as image:
        expected, _ = shapes.render(TINY["seed"], "test", 0, TINY["image_size"])
        assert np.array_equal(np.asarray(image), expected)
    (folder,) = [name for name in os.listdir(tmp_path / "data") if not name.endswith(".lock")]
    assert folder.startswith("crosskd_shapes-v")


def test_other_parameters_have_another_default_folder(register):
    changes = [{}, {"seed": 4}, {"image_size": 80}, {"num_images": {"train": 3, "val": 1}}]
    names = [register(f"tiny{i}", root=None, **change)[0] for i, change in enumerate(changes)]
    assert len({MetadataCatalog.get(name).json_file for name in names}) == len(changes)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_the_ordinary_mapper_gives_boxes_and_masks(register, mask_format):
    register()
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.MIN_SIZE_TRAIN = (128,)
    mapper = DatasetMapper(cfg, is_train=True)
    for record in DatasetCatalog.get("tiny_shapes_train"):
        mapped = mapper(copy.deepcopy(record))
        assert mapped["image"].shape == (3, 128, 128)
        instances = mapped["instances"]
        assert len(instances) == len(record["annotations"])
        of_masks = instances.gt_masks.get_bounding_boxes().tensor
        assert (of_masks - instances.gt_boxes.tensor).abs().max() <= 2


def test_ground_truth_as_predictions_gives_ap_100(register, tmp_path):
    register()
    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 64
    truth = {record["image_id"]: record for record in DatasetCatalog.get("tiny_shapes_train")}
    loader = build_detection_test_loader(cfg, "tiny_shapes_train")
    evaluator = COCOEvaluator("tiny_shapes_train", ("bbox", "segm"), output_dir=str(tmp_path))
    evaluator.reset()
    for inputs in loader:
        outputs = []
        for item in inputs:
            annotations = truth[item["image_id"]]["annotations"]
            boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
            boxes[:, 2:] += boxes[:, :2]
            size = item["height"], item["width"]
            rles = [
                mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *size))
                for annotation in annotations
            ]
            masks = torch.from_numpy(np.stack([mask_util.decode(rle) for rle in rles])).bool()
            instances = Instances(size)
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.ones(len(boxes))
            instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
            instances.pred_masks = BitMasks(masks).tensor
            outputs.append({"instances": instances})
        evaluator.process(inputs, outputs)
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_the_annotation_files_are_plain_coco(tmp_path):
    shapes.generate(str(tmp_path / "set"), **TINY)
    with open(tmp_path / "set" / "annotations" / "train.json") as f:
        coco = json.load(f)
    assert [image["id"] for image in coco["images"]] == [1, 2, 3]
    ids = [annotation["id"] for annotation in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert [category["name"] for category in coco["categories"]] == list(shapes.CLASSES)
    for image in coco["images"]:
        with Image.open(tmp_path / "set" / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (64, 64)


def test_several_processes_draw_the_same_pictures_in_the_same_order(monkeypatch):
    alone = list(shapes._rendered(3, "test", 4, 64))
    monkeypatch.setattr(shapes, "_PER_PROCESS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    together = list(shapes._rendered(3, "test", 4, 64))
    assert [objects for _, objects in alone] == [objects for _, objects in together]
    assert all((a == b).all() for (a, _), (b, _) in zip(alone, together))


def test_a_coarse_class_holds_the_fine_one(register):
    register()
    shapes.register_coarse_shapes("tiny_shapes")
    fine, coarse = (DatasetCatalog.get(f"tiny_shapes_{x}train") for x in ("", "coarse_"))
    members = list(shapes.COARSE_CLASSES.values())
    for one, other in zip(fine, coarse):
        for a, b in zip(one["annotations"], other["annotations"]):
            assert a["bbox"] == b["bbox"]
            assert shapes.CLASSES[a["category_id"]] in members[b["category_id"]]
