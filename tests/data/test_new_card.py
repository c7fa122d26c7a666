"""``tools/prepare_data.py init``: folders of photos in each layout, and their split."""

import contextlib
import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import load_tool
from PIL import Image, ImageDraw

from crosskd_ifc.common.files import replacing
from crosskd_ifc.data import near_duplicates
from crosskd_ifc.data.card import load_card
from crosskd_ifc.data.cards import register_card
from crosskd_ifc.data.check import check_card
from crosskd_ifc.data.layouts import read_folder

REPO = Path(__file__).resolve().parents[2]
BCCD = Path(os.environ.get("CROSSKD_IFC_BCCD") or REPO / "../shared/data/bccd")
CLASSES = ["hard hat", "cat"]
SUFFIXES = [".jpg", ".PNG", ".bmp", ".WebP", ".JPEG"]
SIZE = (96, 64)


@pytest.fixture(scope="module")
def tool():
    return load_tool("prepare_data").main


def objects(number):
    """Class name and box (x0, y0, x1, y1) of the objects in a photo."""
    x = 6 + 3 * (number % 5)
    found = [(CLASSES[number % 2], (x, 10, x + 30, 40))]
    return found + ([("cat", (50, 20, 96, 64))] if number % 3 == 0 else [])


def draw(number):
    """A photo that looks like no other number's."""
    noise = np.random.default_rng(number).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
    for name, box in objects(number):
        ImageDraw.Draw(image).rectangle(box, fill="red" if name == "cat" else "blue")
    return image


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(number).save(path)


def voc(root, count=20):
    """Annotations in one tree of folders, photos in another, with all kinds of suffixes."""
    for i in range(count):
        name = f"img {i}{SUFFIXES[i % 5]}"
        save(root / f"pictures/day{i % 2}" / name, i)
        things = "".join(
            f"<object><name>{n}</name><bndbox><xmin>{a + 1}</xmin><ymin>{b + 1}</ymin>"
            f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for n, (a, b, c, d) in objects(i)
        )
        path = root / f"labels/deep/er/{i}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"<annotation><filename>{name}</filename><size><width>96</width><height>64</height>"
            f"</size>{things}</annotation>"
        )


def coco(root, count=20, *, outlines=True, split=""):
    ids = {name: 7 + 5 * i for i, name in enumerate(CLASSES)}
    content = {"categories": [{"id": k, "name": n} for n, k in ids.items()]}
    content.update(images=[], annotations=[])
    for i in range(count):
        save(root / "images" / f"{i}{SUFFIXES[i % 5]}", i)
        image = {"id": i, "file_name": f"{i}{SUFFIXES[i % 5]}", "width": 96, "height": 64}
        content["images"].append(image)
        for n, (a, b, c, d) in objects(i):
            record = {"id": len(content["annotations"]), "image_id": i, "category_id": ids[n]}
            record["bbox"] = [a, b, c - a, d - b]
            if outlines:
                record["segmentation"] = [[a, b, c, b, c, d, a, d]]
            content["annotations"].append(record)
    (root / f"instances{split}.json").write_text(json.dumps(content))


def yolo(root, count=20):
    for i in range(count):
        split = "train" if i % 4 else "valid"
        save(root / split / "images" / f"{i}{SUFFIXES[i % 5]}", i)
        lines = [
            f"{CLASSES.index(n)} {(a + c) / 192} {(b + d) / 128} {(c - a) / 96} {(d - b) / 64}"
            for n, (a, b, c, d) in objects(i)
        ]
        label = root / split / "labels" / f"{i}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("\n".join(lines))
    (root / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnc: 2\nnames: {CLASSES}\n"
    )


def table(root, count=20):
    with open(root / "boxes.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
        for i in range(count):
            save(root / "img" / f"{i}{SUFFIXES[i % 5]}", i)
            for n, box in objects(i):
                out.writerow([f"{i}{SUFFIXES[i % 5]}", 96, 64, n, *box])


LAYOUTS = {"voc": voc, "coco": coco, "yolo": yolo, "csv": table}


def loaded(card):
    """File name -> the (class, box) pairs of its objects, over all splits of a card."""
    found = {}
    for name in register_card(str(card)):
        for record in DatasetCatalog.get(name):
            names = MetadataCatalog.get(name).thing_classes
            pairs = [(names[a["category_id"]], a["bbox"]) for a in record["annotations"]]
            assert record["file_name"] not in found
            found[record["file_name"]] = pairs
    return found


def split_sizes(card):
    return {name: len(DatasetCatalog.get(name)) for name in register_card(str(card))}


def listing(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_becomes_a_card_that_holds_all_its_boxes(layout, tmp_path, tool, capsys):
    photos = tmp_path / "my photos"
    photos.mkdir()
    LAYOUTS[layout](photos)
    before = listing(photos)
    card = tmp_path / "cells.yaml"
    split = ["--split", "0.6/0.2/0.2"]
    assert tool(["init", str(photos), "--output", str(card), *split]) == 0
    out = capsys.readouterr().out
    assert f"{layout.upper()}, 2 classes" in out and "left out" not in out
    assert listing(photos) == before
    assert check_card(load_card(str(card))).found == {}
    found = loaded(card)
    assert len(found) == 20
    for path, pairs in found.items():
        number = int("".join(c for c in Path(path).stem if c.isdigit()))
        expected = [(n, [a, b, c - a, d - b]) for n, (a, b, c, d) in objects(number)]
        assert [n for n, _ in pairs] == [n for n, _ in expected]
        assert np.allclose([b for _, b in pairs], [b for _, b in expected], atol=1e-3)
    assert split_sizes(card) == {"cells_train": 12, "cells_val": 4, "cells_test": 4}


def test_a_card_beside_its_photos_can_be_moved_with_them(tmp_path, tool):
    (tmp_path / "a/photos").mkdir(parents=True)
    coco(tmp_path / "a/photos")
    assert tool(["init", str(tmp_path / "a/photos"), "--output", str(tmp_path / "a/c.yaml")]) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert check_card(load_card(str(tmp_path / "b/c.yaml"))).total("error") == 0


def test_outlines_come_along(tmp_path, tool):
    coco(tmp_path)
    assert tool(["init", str(tmp_path), "--output", str(tmp_path / "c.yaml")]) == 0
    content = json.loads((tmp_path / "c_annotations/train.json").read_text())
    assert all(len(a["segmentation"][0]) == 8 for a in content["annotations"])


@pytest.mark.parametrize("layout", ["yolo", "coco", "voc"])
def test_the_folders_own_lists_are_kept_unless_a_split_is_given(layout, tmp_path, tool, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    if layout == "coco":
        coco(photos, split="_train2017")
    else:
        LAYOUTS[layout](photos)
    if layout == "voc":
        lists = photos / "ImageSets/Main"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("\n".join(map(str, range(15))))
        (lists / "val.txt").write_text("\n".join(map(str, range(15, 20))))
    assert tool(["init", str(photos), "--output", str(tmp_path / "c.yaml")]) == 0
    sizes = split_sizes(tmp_path / "c.yaml")
    expected = {"c_train": 20} if layout == "coco" else {"c_train": 15, "c_val": 5}
    assert sizes == expected
    told = ", only train; --split 0.8/0.1/0.1 makes val and test\n" if layout == "coco" else "\n"
    assert f"Split: as the folder's own lists say{told}" in capsys.readouterr().out
    again = ["--output", str(tmp_path / "d.yaml"), "--split", "0.5/0.5"]
    assert tool(["init", str(photos), *again]) == 0
    assert split_sizes(tmp_path / "d.yaml") == {"d_train": 10, "d_val": 10}


def test_photos_that_look_alike_stay_together_and_a_seed_decides(tmp_path, tool, capsys):
    coco(tmp_path)
    content = json.loads((tmp_path / "instances.json").read_text())
    for i in range(20):  # a smaller copy, and one of another quality
        for suffix, image in ((".small.png", draw(i).resize((48, 32))), (".low.jpg", draw(i))):
            image.save(tmp_path / "images" / f"{i}{suffix}", quality=40)
            record = {"id": f"{i}{suffix}", "file_name": f"{i}{suffix}"}
            content["images"].append({**record, "width": image.width, "height": image.height})
    for image in content["images"]:
        image["id"] = str(image["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    (tmp_path / "instances.json").write_text(json.dumps(content))

    def members(name, *options):
        output = str(tmp_path / f"{name}.yaml")
        assert tool(["init", str(tmp_path), "--layout", "coco", "--output", output, *options]) == 0
        return {
            split: {Path(r["file_name"]).name for r in DatasetCatalog.get(f"{name}_{split}")}
            for split in ("train", "val", "test")
            if register_card(output)
        }

    first = members("a", "--split", "0.6/0.2/0.2")
    assert "60 photos that look alike" in capsys.readouterr().out
    for names in first.values():
        numbers = [name.split(".")[0] for name in names]
        assert all(numbers.count(number) == 3 for number in numbers)
    assert "alike in two splits" not in check_card(load_card(str(tmp_path / "a.yaml"))).found
    assert len(first["train"]) == 36
    options = ("--split", "0.6/0.2/0.2", "--seed")
    other = members("b", *options, "1")
    assert other != first and members("c", *options, "0") == first
    apart = members("d", "--split", "0.6/0.2/0.2", "--ignore-near-duplicates")
    assert apart != first
    assert "alike in two splits" in check_card(load_card(str(tmp_path / "d.yaml"))).found


def test_a_split_without_a_photo_is_told(tmp_path, tool, capsys):
    coco(tmp_path, count=2)
    assert tool(["init", str(tmp_path), "--output", str(tmp_path / "c.yaml")]) == 0
    assert "none are left for val and test" in capsys.readouterr().out
    assert split_sizes(tmp_path / "c.yaml") == {"c_train": 2}


def test_what_cant_be_used_is_told_and_left_out(tmp_path, tool, capsys):
    voc(tmp_path)
    labels = tmp_path / "labels/deep/er"
    good = (labels / "1.xml").read_text()
    (labels / "0.xml").write_text("<annotation>")
    (labels / "2.xml").write_text(good.replace("img 1.PNG", "gone.png"))
    (labels / "3.xml").write_text(good.replace("96<", "95<").replace("img 1.PNG", "img 3.WebP"))
    (labels / "5.xml").write_text(
        good.replace("img 1.PNG", "img 5.jpg")
        .replace("<xmin>10<", "<xmin>70<")
        .replace("<xmax>39<", "<xmax>70<")
    )
    (tmp_path / "pictures/day0/img 4.JPEG").write_bytes(b"no image")
    assert tool(["init", str(tmp_path), "--output", str(tmp_path / "c.yaml")]) == 0
    out = capsys.readouterr().out
    for part in (
        "annotation that can't be read, left out: 1\n  labels/deep/er/0.xml: ",
        "size that isn't the image's, left out: 1\n  labels/deep/er/3.xml: 95x64, the image",
        "image that can't be used, left out: 1\n  pictures/day0/img 4.JPEG: not an image",
        "box without area, left out: 1\n  labels/deep/er/5.xml: 'cat'",
    ):
        assert part in out
    assert check_card(load_card(str(tmp_path / "c.yaml"))).total("error") == 0


def test_a_card_made_anew_is_whole_or_the_old_one(tmp_path, tool, monkeypatch):
    coco(tmp_path, count=9)
    card, seed = tmp_path / "c.yaml", ("--split", "0.6/0.2/0.2", "--seed")
    command = ["init", str(tmp_path), "--output", str(card), "--force", *seed]
    assert tool([*command, "0"]) == 0
    before = listing(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def replacing_on_a_full_disk(path):
        with replacing(path) as f:
            if path.endswith("test.json"):
                raise full
            yield f

    monkeypatch.setattr("crosskd_ifc.data.new_card.replacing", replacing_on_a_full_disk)
    assert tool([*command, "1"]) != 0
    assert listing(tmp_path) == before


def test_errors_of_init_say_what_to_do(tmp_path, tool, capsys, monkeypatch):
    def said(*args, status=2):
        assert tool(["init", *map(str, args)]) == status
        return capsys.readouterr().err

    card = tmp_path / "c.yaml"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no such folder" in said(tmp_path / "no", "--output", card)
    assert "no annotations: no VOC XML" in said(empty, "--output", card)
    coco(empty)
    table(empty)
    assert "several layouts, coco, csv; choose with --layout" in said(empty, "--output", card)
    shutil.rmtree(empty / "img")
    assert "expected a file such as" in said(empty, "--output", tmp_path / "c.json")
    assert "which needs a letter from A to Z" in said(empty, "--output", tmp_path / "数据.yaml")
    options = (empty, "--layout", "coco", "--output", card)
    assert "--split 0.8/0.3" in said(*options, "--split", "0.8/0.3")
    assert "--split a" in said(*options, "--split", "a")
    monkeypatch.setattr(near_duplicates, "is_available", lambda: False)
    monkeypatch.setattr("crosskd_ifc.data.new_card.is_available", lambda: False)
    assert "imagehash isn't installed" in said(*options)
    assert not card.exists()
    said(*options, "--ignore-near-duplicates", status=0)
    before = listing(tmp_path)
    assert "exists; give another --output" in said(*options, "--ignore-near-duplicates")
    assert listing(tmp_path) == before
    said(*options, "--ignore-near-duplicates", "--force", status=0)


@pytest.mark.parametrize("text", ["names: [x]\ntrain: images\n", "", "a: [\n", None])
def test_what_is_no_card_is_never_replaced(text, tmp_path, tool, capsys):
    coco(tmp_path)
    own = tmp_path / "data.yaml"
    own.mkdir() if text is None else own.write_text(text)
    before = listing(tmp_path)
    options = ("--layout", "coco", "--force")
    assert tool(["init", str(tmp_path), "--output", str(own), *options]) == 2
    assert f"{own} is no dataset card; move it" in capsys.readouterr().err
    assert listing(tmp_path) == before


def test_a_json_that_init_has_not_made_is_never_replaced(tmp_path, tool, capsys):
    coco(tmp_path)
    own = tmp_path / "cells_annotations/train.json"
    own.parent.mkdir()
    (tmp_path / "instances.json").rename(own)
    before = listing(tmp_path)
    for options in ([], ["--force"]):
        assert tool(["init", str(tmp_path), "--output", f"{tmp_path}/cells.yaml", *options]) == 2
        assert f"{own} wasn't made by init" in capsys.readouterr().err
    assert listing(tmp_path) == before


def test_a_card_does_not_replace_the_json_of_another_one(tmp_path, tool, capsys):
    (tmp_path / "photos").mkdir()
    coco(tmp_path / "photos", count=4)
    start = ["init", str(tmp_path / "photos"), "--output"]
    assert tool([*start, f"{tmp_path}/my cells.yaml"]) == 0
    before = listing(tmp_path)
    assert tool([*start, f"{tmp_path}/my_cells.yaml", "--force"]) == 2
    assert "belongs to the card my cells.yaml" in capsys.readouterr().err
    assert listing(tmp_path) == before
    assert tool([*start, f"{tmp_path}/my cells.yaml", "--force"]) == 0


def test_lists_that_name_no_photo_are_refused_rather_than_left_out(tmp_path, tool, capsys):
    (tmp_path / "photos").mkdir()
    yolo(tmp_path / "photos")
    (tmp_path / "photos/train").rename(tmp_path / "photos/a")
    (tmp_path / "photos/valid").rename(tmp_path / "photos/b")
    start = ["init", str(tmp_path / "photos"), "--output", f"{tmp_path}/c.yaml"]
    assert tool(start) == 2
    assert "the split in " in (said := capsys.readouterr().err) and "give --split 0.8/" in said
    assert tool([*start, "--split", "0.5/0.5"]) == 0


def test_no_card_is_written_for_class_names_that_none_can_have(tmp_path, tool, capsys):
    (tmp_path / "photos").mkdir()
    yolo(tmp_path / "photos")
    yaml = tmp_path / "photos/data.yaml"
    yaml.write_text(yaml.read_text().replace(str(CLASSES), "[cat, cat]"))
    assert tool(["init", str(tmp_path / "photos"), "--output", f"{tmp_path}/c.yaml"]) == 2
    assert "data.yaml: the class 'cat' is there twice" in capsys.readouterr().err
    assert not list(tmp_path.glob("c*"))


def test_the_area_of_an_outline_is_kept(tmp_path, tool):
    coco(tmp_path, count=4)
    content = json.loads((tmp_path / "instances.json").read_text())
    for record, area in zip(content["annotations"], (300.5, -1, 10**6, None)):
        record["area"] = area
    (tmp_path / "instances.json").write_text(json.dumps(content))
    options = ["--split", "0.9/0.1", "--ignore-near-duplicates", "--output", f"{tmp_path}/c.yaml"]
    assert tool(["init", str(tmp_path), *options]) == 0
    written = json.loads((tmp_path / "c_annotations/train.json").read_text())["annotations"]
    differing = [a["area"] for a in written if a["area"] != a["bbox"][2] * a["bbox"][3]]
    assert differing == [300.5]


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"no BCCD photos in {BCCD}")
def test_the_blood_cell_photos_by_their_own_lists(tmp_path, tool, capsys):
    assert tool(["init", str(BCCD), "--output", str(tmp_path / "cells.yaml")]) == 0
    assert "box without area, left out: 2" in capsys.readouterr().out
    report = check_card(load_card(str(tmp_path / "cells.yaml")))
    assert report.total("error") == 0 and report.classes == ("Platelets", "RBC", "WBC")
    assert [report.counts[s]["images"] for s in ("train", "val", "test")] == [205, 87, 72]


def one_box(layout, name):
    """Annotations of a photo 1.jpg that has one box."""
    if layout == "voc":
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin"), (9, 9)))
        corners += "<xmax>20</xmax><ymax>20</ymax>"
        thing = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
        return f"<annotation><filename>1.jpg</filename>{thing}</annotation>"
    if layout == "csv":
        return f"image,class,x,y,w,h\n1.jpg,{name},9,9,20,20"
    if layout == "yolo":
        return f"{CLASSES.index(name)} .5 .5 .2 .2"
    record = {"id": 1, "image_id": 1, "category_id": CLASSES.index(name), "bbox": [9, 9, 20, 20]}
    categories = [{"id": i, "name": n} for i, n in enumerate(CLASSES)]
    images = [{"id": 1, "file_name": "1.jpg"}]
    return json.dumps({"images": images, "annotations": [record], "categories": categories})


# Layout -> the folder of the photos and the annotation file of a split.
PLACES = {
    "voc": ("images/{}", "xml/{}/1.xml"),
    "coco": ("{}2017", "annotations/instances_{}2017.json"),
    "yolo": ("{}/photos", "{}/boxes/1.txt"),
    "csv": ("{}", "{}.csv"),
}


def twins(root, layout, names):
    """Two photos 1.jpg in folders of these names, the first of a hard hat, the other of a cat."""
    photos, annotations = PLACES[layout]
    for i, name in enumerate(names):
        save(root / photos.format(name) / "1.jpg", i)
        path = root / annotations.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one_box(layout, CLASSES[i]))
    if layout == "yolo":
        lists = "".join(f"{k}: {n}/photos\n" for k, n in zip(("train", "val"), names))
        (root / "data.yaml").write_text(f"{lists}names: {CLASSES}\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_photos_of_one_name_in_two_folders_have_their_own_boxes(layout, tmp_path):
    twins(tmp_path, layout, ("train", "val"))
    found = read_folder(str(tmp_path))
    assert not found.problems
    boxes = {Path(photo.path): [thing.name for thing in photo.things] for photo in found.photos}
    folder = PLACES[layout][0].format
    assert boxes == {
        tmp_path / folder("train") / "1.jpg": ["hard hat"],
        tmp_path / folder("val") / "1.jpg": ["cat"],
    }


@pytest.mark.parametrize("layout", ["voc", "csv"])
def test_an_annotation_that_may_mean_two_photos_is_left_out(layout, tmp_path):
    twins(tmp_path, layout, ("a", "b"))
    save(tmp_path / "c/1.jpg", 3)
    path = tmp_path / PLACES[layout][1].format("a")
    path.rename(path.with_name(f"unsure{path.suffix}"))
    if layout == "voc":
        path.with_name("unsure.xml").rename(tmp_path / "unsure.xml")
    found = read_folder(str(tmp_path))
    assert [Path(photo.path).parent.name for photo in found.photos] == ["b"]
    (problem,) = (where for what, where in found.problems.items() if "several" in what)
    assert "unsure" in problem[0]


def test_a_photo_without_a_label_does_not_get_that_of_another_folder(tmp_path):
    twins(tmp_path, "yolo", ("train", "val"))
    (tmp_path / "val/boxes/1.txt").unlink()
    found = {Path(p.path).parts[-3]: p.things for p in read_folder(str(tmp_path)).photos}
    assert [thing.name for thing in found["train"]] == ["hard hat"] and found["val"] == []


def test_a_number_of_yolo_is_a_line_of_the_class_list(tmp_path):
    save(tmp_path / "1.jpg", 1)
    (tmp_path / "1.txt").write_text("2 .5 .5 .2 .2")
    (tmp_path / "classes.txt").write_text("cat\n\ndog\nbird\n\n")
    found = read_folder(str(tmp_path))
    assert [thing.name for thing in found.photos[0].things] == ["dog"]
    assert found.classes == ["cat", "dog", "bird"]


def test_a_table_of_fractions_is_read_as_one(tmp_path):
    save(tmp_path / "1.jpg", 1)
    rows = "1.jpg,cat,0.25,0.25,0.5,1.0\n1.jpg,cat,0,0,1,1\n"
    (tmp_path / "boxes.csv").write_text(f"image,class,xmin,ymin,xmax,ymax\n{rows}")
    (photo,) = read_folder(str(tmp_path)).photos
    assert [thing.box for thing in photo.things] == [[24, 16, 24, 48], [0, 0, 96, 64]]


@pytest.mark.parametrize("name", ["$x", "$HOME"])
def test_a_card_is_not_written_where_its_path_means_another(name, tmp_path, tool):
    (tmp_path / "photos").mkdir()
    coco(tmp_path / "photos", count=4)
    (tmp_path / name).mkdir()
    assert tool(["init", str(tmp_path / "photos"), "--output", f"{tmp_path}/{name}/c.yaml"]) == 2
    assert not list((tmp_path / name).iterdir())


def test_photos_beyond_the_first_thousand_look_alike_too():
    bits = np.random.default_rng(0).random((1100, 64)) < 0.5
    hashes = list(np.where(bits, 1, -1).astype(np.float32))
    found = near_duplicates.alike(hashes, hashes[1050:])
    assert found.tolist() == [[1050 + i, i] for i in range(50)]


def test_a_photo_that_cant_be_decoded_stands_alone_and_moves_no_other():
    one = np.ones(64, np.float32)
    assert sorted(near_duplicates.groups_of_alike([one, None, -one, one])) == [[0, 3], [1], [2]]


def test_crowds_stay_crowds_on_the_card(tmp_path, tool):
    coco(tmp_path, count=4)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"][1]["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(content))
    options = ["--ignore-near-duplicates", "--output", f"{tmp_path}/c.yaml"]
    assert tool(["init", str(tmp_path), *options]) == 0
    written = [json.loads(p.read_text()) for p in (tmp_path / "c_annotations").iterdir()]
    assert sum(a["iscrowd"] for one in written for a in one["annotations"]) == 1
