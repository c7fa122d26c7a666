"""Odd folders of photos: which annotation is of which photo, and which split is its own."""

import errno
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from crosskd_ifc.data.layouts import read_folder

BOM = "\ufeff"


def photo(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def voc(path, name, cls):
    """An annotation with one object; no <filename> for an empty name."""
    corners = "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax>"
    thing = f"<object><name>{cls}</name><bndbox>{corners}</bndbox></object>"
    named = f"<filename>{name}</filename>" if name else ""
    write(path, f"<annotation>{named}{thing}</annotation>")


def coco(path, pairs, **changes):
    """A json with a box of each (file name, class)."""
    names = sorted({cls for _, cls in pairs})
    content = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(pairs)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + names.index(cls), "bbox": [1, 1, 9, 9]}
            for i, (_, cls) in enumerate(pairs)
        ],
    }
    content.update(changes)
    write(path, json.dumps(content))


def table(path, pairs):
    rows = "".join(f"{name},{cls},1,1,20,20\n" for name, cls in pairs)
    write(path, "filename,class,xmin,ymin,xmax,ymax\n" + rows)


def yolo(path, *lines):
    write(path, "\n".join(lines or ["0 .5 .5 .2 .2"]))


def read(root, **options):
    """The photos below a folder -> the classes of their objects; and the problems."""
    found = read_folder(str(root), **options)
    photos = {os.path.relpath(p.path, root): [t.name for t in p.things] for p in found.photos}
    return photos, {what: places for what, places in found.problems.items()}


def splits(root):
    return {os.path.relpath(p.path, root): p.split for p in read_folder(str(root)).photos}


# Objects


@pytest.mark.parametrize("outline", [[[]], [[1, 1, 9, 9]], [[1, 1, 9, 1, 9]]])
def test_a_box_whose_outline_is_no_polygon_stays_without_it(outline, tmp_path):
    photo(tmp_path / "1.jpg")
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}
    coco(tmp_path / "a.json", [("1.jpg", "x")], annotations=[{**box, "segmentation": outline}])
    found = read_folder(str(tmp_path))
    assert [thing.outline for thing in found.photos[0].things] == [None]
    (place,) = found.problems["outline that can't be used, left out"]
    assert place.endswith("no polygon of three points")


def test_why_no_box_can_be_used_is_told(tmp_path):
    photo(tmp_path / "1.jpg")
    write(tmp_path / "data.yaml", "names: [cat]")
    yolo(tmp_path / "1.txt", "0 120 80 40 30")  # pixels
    with pytest.raises(ValueError, match="(?s)no photo has a box.*box outside its image.*1.txt"):
        read(tmp_path)


# Which photo does an annotation mean?


def test_a_name_with_a_dot_is_not_that_of_the_part_before_it(tmp_path):
    write(tmp_path / "data.yaml", "names: [cat]")
    photo(tmp_path / "images" / "shot_3.jpg")
    yolo(tmp_path / "labels" / "shot_3.cropped.txt")
    photo(tmp_path / "images" / "shot_4.jpg")
    yolo(tmp_path / "labels" / "shot_4.txt")
    photos, problems = read(tmp_path)
    assert photos == {"images/shot_4.jpg": ["cat"]}
    told = problems["annotation without an image (in its split), left out"]
    assert told == ["labels/shot_3.cropped.txt"]


def test_another_suffix_of_an_image_is_no_part_of_its_name(tmp_path):
    photo(tmp_path / "1.jpg")
    voc(tmp_path / "1.xml", "1.tif", "a")
    assert read(tmp_path) == ({"1.jpg": ["a"]}, {})


def test_a_photo_with_an_annotation_of_its_own_is_not_taken_for_a_missing_one(tmp_path):
    for name in ("A/2.jpg", "B/1.jpg", "B/2.jpg"):
        photo(tmp_path / name)
    for name in ("A/1", "A/2", "B/1", "B/2"):
        voc(tmp_path / f"{name}.xml", f"{name[-1]}.jpg", f"of {name[0]}")
    photos, problems = read(tmp_path)
    assert photos == {"A/2.jpg": ["of A"], "B/1.jpg": ["of B"], "B/2.jpg": ["of B"]}
    assert problems == {
        "annotation whose image is that of another one, left out": [
            "A/1.xml: B/1.jpg is that of B/1.xml"
        ]
    }


def test_a_photo_of_another_folder_is_not_taken_for_one_that_is_missing_in_its_own(tmp_path):
    photo(tmp_path / "A/2.jpg")
    photo(tmp_path / "B/1.jpg")
    coco(tmp_path / "all.json", [("A/1.jpg", "a"), ("A/2.jpg", "a")])
    photos, problems = read(tmp_path)
    assert photos == {"A/2.jpg": ["a"]}
    assert problems["annotation without an image (in its split), left out"] == ["all.json: A/1.jpg"]


def test_a_photo_of_another_split_is_not_taken_for_a_missing_one(tmp_path):
    for name in ("train/images/2", "valid/images/1", "valid/images/2"):
        photo(tmp_path / f"{name}.jpg")
    for name in ("train/labels/1", "train/labels/2", "valid/labels/2"):
        yolo(tmp_path / f"{name}.txt")
    write(tmp_path / "data.yaml", "train: train/images\nval: valid/images\nnames: [cat]\n")
    photos, problems = read(tmp_path)
    assert photos["valid/images/1.jpg"] == []
    assert problems == {
        "annotation without an image (in its split), left out": ["train/labels/1.txt"]
    }


def test_a_split_in_the_name_of_a_json_keeps_photos_of_others_away(tmp_path):
    photo(tmp_path / "images/val/1.jpg")
    photo(tmp_path / "images/train/2.jpg")
    coco(tmp_path / "annotations/train.json", [("1.jpg", "a"), ("2.jpg", "a")])
    coco(tmp_path / "annotations/val.json", [("1.jpg", "b")])
    photos, problems = read(tmp_path)
    assert photos == {"images/train/2.jpg": ["a"], "images/val/1.jpg": ["b"]}
    assert [*problems.values()] == [["annotations/train.json: 1.jpg"]]


@pytest.mark.parametrize("place", ["annotations/all", "annotations/instances_b", "b/boxes"])
@pytest.mark.parametrize("form", ["coco", "csv"])
def test_the_folders_that_are_written_decide_first(form, place, tmp_path):
    pairs = [(f"{folder}/{i}.jpg", f"of {folder}") for folder in "AB" for i in (1, 2)]
    for name, _ in pairs:
        photo(tmp_path / "images" / name)
    if form == "coco":
        coco(tmp_path / f"{place}.json", pairs)
    else:
        table(tmp_path / f"{place}.csv", pairs)
    photos, problems = read(tmp_path)
    assert photos == {f"images/{name}": [cls] for name, cls in pairs} and not problems


def test_folders_in_common_decide_before_words(tmp_path):
    for day in ("2024_01_01", "2024_01_02", "2024_02_01"):
        photo(tmp_path / f"img/{day}/7.jpg")
        voc(tmp_path / f"ann/{day}/7.xml", "7.jpg", day)
    photos, problems = read(tmp_path)
    assert photos == {f"img/{day[0]}/7.jpg": day for day in photos.values()} and not problems


def test_words_of_an_annotations_own_name_decide_nothing(tmp_path):
    for folder in ("1/rgb", "2/img"):
        photo(tmp_path / folder / "img_1.png")
        voc(tmp_path / folder[0] / "ann/img_1.xml", "img_1.png", f"of {folder[0]}")
    photos, problems = read(tmp_path)
    assert photos == {"1/rgb/img_1.png": ["of 1"], "2/img/img_1.png": ["of 2"]} and not problems


def test_a_photo_with_two_annotations_that_differ_is_left_out(tmp_path):
    photo(tmp_path / "1.jpg")
    photo(tmp_path / "2.jpg")
    coco(tmp_path / "a.json", [("1.jpg", "a"), ("2.jpg", "a")])
    coco(tmp_path / "b.json", [("1.jpg", "b"), ("2.jpg", "a")])
    photos, problems = read(tmp_path)
    assert photos == {"2.jpg": ["a"]}
    assert problems["image with several annotations, left out"] == [
        "1.jpg: a.json: 1.jpg, b.json: 1.jpg"
    ]
    assert problems["image annotated twice alike, the first counts"] == ["2.jpg: b.json: 2.jpg"]


def test_an_annotation_whose_two_names_are_two_photos_is_left_out(tmp_path):
    for name in ("1", "2", "3"):
        photo(tmp_path / f"{name}.jpg")
    voc(tmp_path / "1.xml", "2.jpg", "a")
    voc(tmp_path / "3.xml", "gone.jpg", "a")
    photos, problems = read(tmp_path)
    assert photos == {"3.jpg": ["a"]}
    what = "annotation whose <filename> is another image than its own name, left out"
    assert problems[what] == ["1.xml: 2.jpg, 1.jpg"]


def test_linked_folders_are_looked_through_once(tmp_path):
    photo(tmp_path / "elsewhere/1.jpg")
    voc(tmp_path / "set/Annotations/1.xml", "1.jpg", "a")
    (tmp_path / "set/JPEGImages").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/again").symlink_to(tmp_path / "set/Annotations")
    assert read(tmp_path / "set") == ({"JPEGImages/1.jpg": ["a"]}, {})


# What can't be read


@pytest.mark.parametrize("suffix", ["xml", "json", "csv"])
def test_annotation_files_that_cant_be_read_are_told(suffix, tmp_path):
    photo(tmp_path / "1.jpg")
    voc(tmp_path / "1.xml", "1.jpg", "a")
    write(tmp_path / f"empty.{suffix}", "")
    (tmp_path / f"gone.{suffix}").symlink_to(tmp_path / "nothing")
    photos, problems = read(tmp_path)
    (told,) = problems.values()
    assert photos == {"1.jpg": ["a"]}
    assert [place.split(":")[0] for place in told] == [f"empty.{suffix}", f"gone.{suffix}"]


def test_a_folder_whose_only_annotations_cant_be_read_says_why(tmp_path):
    photo(tmp_path / "1.jpg")
    write(tmp_path / "a.json", '{"images": [')
    with pytest.raises(ValueError, match="it holds no annotations(?s:.*)a.json: not valid JSON"):
        read(tmp_path)


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_photos_without_an_annotation_are_told(form, tmp_path):
    photo(tmp_path / "1.jpg")
    photo(tmp_path / "2.jpg")
    if form == "voc":
        voc(tmp_path / "1.xml", "", "a")
    else:
        coco(tmp_path / "a.json", [("1.jpg", "a")])
    assert read(tmp_path)[1] == {"image without an annotation, left out": ["2.jpg"]}


def test_a_mark_of_byte_order_is_no_part_of_a_file(tmp_path):
    for i in (1, 2):
        photo(tmp_path / f"yolo/{i}.jpg")
        write(tmp_path / f"yolo/{i}.txt", f"{BOM}0 .5 .5 .2 .2\r\n")
    write(tmp_path / "yolo/classes.txt", f"{BOM}cat\r\ndog\r\n")
    assert read(tmp_path / "yolo")[0] == {"1.jpg": ["cat"], "2.jpg": ["cat"]}
    photo(tmp_path / "coco/1.jpg")
    coco(tmp_path / "a.json", [("1.jpg", "a")])
    write(tmp_path / "coco/a.json", BOM + (tmp_path / "a.json").read_text())
    assert read(tmp_path / "coco")[0] == {"1.jpg": ["a"]}


def test_the_suffixes_that_are_read_are_told(tmp_path):
    write(tmp_path / "images/1.HEIC", "")
    yolo(tmp_path / "labels/1.txt")
    write(tmp_path / "data.yaml", "names: [cat]")
    with pytest.raises(ValueError, match="no image in it is one of .jpg, .jpeg, .png"):
        read(tmp_path)


# COCO


def test_crowds_and_objects_to_ignore_are_told_and_stay_crowds(tmp_path):
    pairs = [("a.png", "cat"), ("b.png", "cat"), ("c.png", "cat")]
    for name, _ in pairs:
        photo(tmp_path / name)
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(3)]
    boxes[0]["iscrowd"], boxes[1]["ignore"], boxes[2]["iscrowd"] = 1, 1, "0"
    coco(tmp_path / "a.json", pairs, annotations=boxes)
    found = read_folder(str(tmp_path))
    assert [thing.crowd for one in found.photos for thing in one.things] == [1, 1, 0]
    (places,) = [v for k, v in found.problems.items() if k.startswith("crowd or object to ignore")]
    assert places == ["a.json: annotation 0", "a.json: annotation 1"]


def test_of_a_turned_box_the_upright_one_around_it_is_taken_and_told(tmp_path):
    photo(tmp_path / "a.png")
    turned = [{"rotation": x} for x in (90.0, 270.0, 0.0, "left")]
    boxes = [
        {"id": i, "image_id": 0, "category_id": 1, "bbox": [22, 20, 20, 4], "attributes": each}
        for i, each in enumerate(turned)
    ]
    coco(tmp_path / "a.json", [("a.png", "rod")], annotations=boxes)
    found = read_folder(str(tmp_path))
    first, second, *others = [thing.box for thing in found.photos[0].things]
    assert first == second == pytest.approx([30, 12, 4, 20])
    assert others == [[22, 20, 20, 4]] * 2
    assert found.problems["rotated box, the upright one around it is taken"] == [
        "a.json: annotation 0",
        "a.json: annotation 1",
    ]


def test_a_path_through_a_link_is_a_place_in_the_folder(tmp_path):
    photo(tmp_path / "real" / "train" / "a.png")
    photo(tmp_path / "real" / "test" / "a.png")
    os.symlink(tmp_path / "real", tmp_path / "link")
    coco(tmp_path / "real" / "x.json", [(str(tmp_path / "link" / "train" / "a.png"), "cat")])
    (one,) = read_folder(str(tmp_path / "link")).photos
    assert one.path == str(tmp_path / "real" / "train" / "a.png") and one.things


def test_paths_of_a_folder_that_was_copied_from_here_are_found(tmp_path):
    for place in ("original", "copy"):
        photo(tmp_path / place / "images" / "a.png")
    coco(tmp_path / "copy" / "x.json", [(str(tmp_path / "original/images/a.png"), "cat")])
    (one,) = read_folder(str(tmp_path / "copy")).photos
    assert one.path == str(tmp_path / "copy" / "images" / "a.png") and one.things


def test_why_a_data_yaml_or_a_file_of_cvat_is_not_read_is_told(tmp_path):
    photo(tmp_path / "a.png")
    write(tmp_path / "data.yaml", 'path: "C:\\Users\\me"\nnames: [cat]\n')
    write(tmp_path / "annotations.xml", "<annotations><version>1.1</version></annotations>")
    with pytest.raises(ValueError, match="(?s)xml: CVAT's own format.*data.yaml: not valid"):
        read_folder(str(tmp_path))


def test_images_of_one_id_are_left_out(tmp_path):
    for name in "abc":
        photo(tmp_path / f"{name}.jpg")
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in ((0, "a"), (0, "b"), (1, "c"))]
    coco(tmp_path / "a.json", [("a.jpg", "x"), ("c.jpg", "x")], images=images)
    photos, problems = read(tmp_path)
    assert photos == {"c.jpg": ["x"]}
    assert problems["images of one id, left out"] == ["a.json: id 0: a.jpg, b.jpg"]


def test_a_file_with_two_classes_of_one_id_is_left_out(tmp_path):
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
        coco(tmp_path / f"{name}.json", [(f"{name}.jpg", "x")])
    categories = [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]
    coco(tmp_path / "b.json", [("b.jpg", "x")], categories=categories)
    photos, problems = read(tmp_path)
    assert photos == {"a.jpg": ["x"]}
    (told,) = problems["annotations that can't be read, left out"]
    assert "b.json" in told and "'x' and 'y' have one id, 1" in told


def test_annotations_of_no_image_are_told_and_make_no_background(tmp_path):
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    box = {"category_id": 1, "bbox": [1, 1, 9, 9]}
    annotations = [{"id": i, "image_id": key, **box} for i, key in enumerate((0, "1", 9))]
    coco(tmp_path / "a.json", [("a.jpg", "x"), ("b.jpg", "x")], annotations=annotations)
    photos, problems = read(tmp_path)
    assert photos == {"a.jpg": ["x"]}
    told = ["a.json: annotation 1: image_id '1'", "a.json: annotation 2: image_id 9"]
    assert problems["annotation of no image, left out"] == told


def test_class_names_are_without_blanks_around_them(tmp_path):
    photo(tmp_path / "1.jpg")
    photo(tmp_path / "2.jpg")
    coco(tmp_path / "a.json", [("1.jpg", "cat"), ("2.jpg", "cat ")])
    assert read_folder(str(tmp_path)).classes == ["cat"]


# YOLO


def test_yolo_class_lists_that_differ_are_refused(tmp_path):
    for folder, names in (("A", "cat\ndog"), ("B", "dog\ncat")):
        photo(tmp_path / folder / f"{folder}.jpg")
        yolo(tmp_path / folder / f"{folder}.txt")
        write(tmp_path / folder / "classes.txt", names)
    with pytest.raises(ValueError, match="A/classes.txt and .*B/classes.txt hold different class"):
        read(tmp_path)
    write(tmp_path / "data.yaml", "names: {0: bird}")
    assert read(tmp_path)[0] == {"A/A.jpg": ["bird"], "B/B.jpg": ["bird"]}


@pytest.mark.parametrize(
    "text, said",
    [
        ("names: {cat: 0}", "names is {'cat': 0}; expected a list of names"),
        ("names: []", "there is no class name in it"),
        ("names: [cat, dog, cat]", "the class 'cat' is there twice"),
        ("names: [cat]\ntrain: 5", "train is 5; expected a folder"),
        ("names: [no, yes]", "the class name False has to be in quotes"),
        ("names: {0: cat, 1: on}", "the class name True has to be in quotes"),
        ("names: [cat, null]", "the class name None has to be in quotes"),
    ],
)
def test_a_yaml_that_cant_be_right_is_one_error(text, said, tmp_path):
    photo(tmp_path / "1.jpg")
    yolo(tmp_path / "1.txt")
    write(tmp_path / "data.yaml", text)
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/data.yaml: {said}")


def test_a_pose_is_its_box(tmp_path):
    photo(tmp_path / "1.jpg")
    yolo(tmp_path / "1.txt", "0 .5 .5 .5 .5 .45 .45 .55 .45 .55 .55 .45 .55")
    write(tmp_path / "data.yaml", "names: [cat]\nkpt_shape: [4, 2]")
    (found,) = read_folder(str(tmp_path)).photos
    assert [(t.box, t.outline) for t in found.things] == [([16, 12, 32, 24], None)]


def test_a_label_file_that_isnt_text_is_left_out(tmp_path):
    for i in (1, 2):
        photo(tmp_path / f"{i}.jpg")
        yolo(tmp_path / f"{i}.txt")
    write(tmp_path / "1.txt", "0 .5 .5 .2 .2 \u00e4", "cp1252")
    write(tmp_path / "classes.txt", "cat")
    photos, problems = read(tmp_path)
    assert photos == {"2.jpg": ["cat"]}
    assert problems["annotation that can't be read, left out"][0].startswith("1.txt: not UTF-8")


# The folder's own split


def test_the_lists_of_voc_may_hold_suffixes_blanks_and_a_column(tmp_path):
    for i in range(1, 5):
        photo(tmp_path / f"JPEGImages/IMG ({i}).jpg")
        voc(tmp_path / f"Annotations/IMG ({i}).xml", "", "x")
    lists = tmp_path / "ImageSets/Main"
    write(lists / "train.txt", f"{BOM}IMG (1)\r\nIMG (2).jpg\r\n")
    write(lists / "val.txt", "IMG (3)  1\ngone\n")
    write(lists / "trainval.txt", "IMG (1)\nIMG (3)\nIMG (4) -1\n")
    names = {1: "train", 2: "train", 3: "val", 4: "train"}
    assert splits(tmp_path) == {f"JPEGImages/IMG ({i}).jpg": name for i, name in names.items()}
    told = {"line of a list that names no annotation": ["ImageSets/Main/val.txt: gone"]}
    assert read(tmp_path)[1] == told


def test_the_lists_of_voc_are_of_the_data_set_they_lie_in(tmp_path):
    for folder, split in (("A", "train"), ("B", "val")):
        photo(tmp_path / folder / "JPEGImages/1.jpg")
        voc(tmp_path / folder / "Annotations/1.xml", "1.jpg", "x")
        write(tmp_path / folder / f"ImageSets/Main/{split}.txt", "1")
    assert splits(tmp_path) == {"A/JPEGImages/1.jpg": "train", "B/JPEGImages/1.jpg": "val"}


@pytest.mark.parametrize("start", ["/content/data/", "../../elsewhere/", ""])
def test_a_yaml_from_another_machine_keeps_its_split(start, tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / f"images/{split}/{split}.jpg")
        yolo(tmp_path / f"labels/{split}/{split}.txt")
    entries = f"train: {start}images/train\nval: {start}images/val\ntest: {start}images/test\n"
    write(tmp_path / "data.yaml", f"{entries}names: [cat]\n")
    assert splits(tmp_path) == {
        "images/train/train.jpg": "train",
        "images/val/val.jpg": "val",
    }
    told = {"entry of a yaml that matches no image": [f"data.yaml: test: {start}images/test"]}
    assert read(tmp_path)[1] == told


def test_a_list_from_another_machine_keeps_its_split(tmp_path):
    for i in range(4):
        photo(tmp_path / f"obj/{i}.jpg")
        yolo(tmp_path / f"obj/{i}.txt")
    write(tmp_path / "data.yaml", "train: train.txt\nval: /x/val.txt\nnames: [cat]\n")
    write(tmp_path / "train.txt", "data\\obj\\0.jpg\ndata\\obj\\1.jpg\n")
    write(tmp_path / "val.txt", "/x/obj/2.jpg\n/x/obj/3.jpg\n/x/obj/9.jpg\n")
    names = ["train", "train", "val", "val"]
    assert splits(tmp_path) == {f"obj/{i}.jpg": name for i, name in enumerate(names)}
    told = {"line of a list that names no image, or several": ["val.txt: /x/obj/9.jpg"]}
    assert read(tmp_path)[1] == told


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_folders_of_these_names_are_a_split(form, tmp_path):
    for folder in ("training", "valid", "Testing"):
        photo(tmp_path / folder / f"{folder}.jpg")
        if form == "voc":
            voc(tmp_path / folder / f"{folder}.xml", "", "x")
        else:
            coco(tmp_path / folder / "_annotations.coco.json", [(f"{folder}.jpg", "x")])
    assert sorted(splits(tmp_path).values()) == ["test", "train", "val"]
    photo(tmp_path / "more.jpg")
    if form == "voc":
        voc(tmp_path / "more.xml", "", "x")
    else:
        coco(tmp_path / "more.json", [("more.jpg", "x")])
    assert set(splits(tmp_path).values()) == {""}


# CSV


def test_a_column_tells_the_split_and_other_words_in_it_are_told(tmp_path):
    rows = ""
    for number, split in enumerate(("training", "Val", "testing", "holdout", "")):
        photo(tmp_path / f"{number}.jpg")
        rows += f"{number}.jpg,cat,1,1,20,20,{split}\n"
    write(tmp_path / "a.csv", f"filename,class,xmin,ymin,xmax,ymax,split\n{rows}")
    assert [*splits(tmp_path).values()] == ["train", "val", "test", "", ""]
    told = "split other than train, val and test, not used"
    assert read(tmp_path)[1] == {told: ["a.csv row 4: 'holdout'"]}


def test_rows_of_one_photo_in_two_splits_are_told_and_the_first_counts(tmp_path):
    photo(tmp_path / "1.jpg")
    rows = "".join(f"1.jpg,cat,1,1,20,20,{split}\n" for split in ("test", "", "train"))
    write(tmp_path / "a.csv", f"filename,class,xmin,ymin,xmax,ymax,split\n{rows}")
    assert splits(tmp_path) == {"1.jpg": "test"}
    told = "rows of one photo in two splits; it is in the first"
    assert read(tmp_path)[1] == {told: ["a.csv row 3: 1.jpg"]}


def test_difficult_objects_are_told(tmp_path):
    photo(tmp_path / "1.jpg")
    voc(tmp_path / "1.xml", "1.jpg", "cat")
    marked = (tmp_path / "1.xml").read_text().replace("</name>", "</name><difficult>1</difficult>")
    write(tmp_path / "1.xml", marked)
    told = {"difficult object, trained on and evaluated as any other": ["1.xml: cat"]}
    assert read(tmp_path) == ({"1.jpg": ["cat"]}, told)


def test_a_folder_that_cant_be_read_is_told(tmp_path, monkeypatch):
    def scan(path):
        if os.path.basename(path) == "private":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    photo(tmp_path / "1.jpg")
    voc(tmp_path / "1.xml", "1.jpg", "cat")
    (tmp_path / "private").mkdir()
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", scan)
    told = {"file that can't be read, left out": ["private: Permission denied"]}
    assert read(tmp_path) == ({"1.jpg": ["cat"]}, told)


def test_columns_that_are_not_known_are_told_with_those_that_are(tmp_path):
    photo(tmp_path / "1.jpg")
    write(tmp_path / "de.csv", "Dateiname;Klasse;xmin;ymin;xmax;ymax\n1.jpg;cat;1;1;20;20\n")
    message = "no annotations: .*de.csv: its columns are 'Dateiname;.*expected one of filename, "
    with pytest.raises(ValueError, match=f"(?s){message}.*one of class, .*xmin, ymin, xmax, ymax"):
        read(tmp_path)


def test_a_size_in_a_table_is_that_of_the_photo(tmp_path):
    photo(tmp_path / "1.jpg")
    photo(tmp_path / "2.jpg")
    rows = "1.jpg,64,48,cat,1,1,20,20\n2.jpg,32,24,cat,1,1,20,20\n"
    write(tmp_path / "a.csv", f"filename,width,height,class,xmin,ymin,xmax,ymax\n{rows}")
    photos, problems = read(tmp_path)
    assert photos == {"1.jpg": ["cat"]}
    told = ["a.csv: '2.jpg': 32x24, the image is 64x48"]
    assert problems == {"size that isn't the image's, left out": told}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_of_excel_is_read(end, tmp_path):
    photo(tmp_path / "1.jpg")
    lines = ["sep=;", "filename;class;xmin;ymin;xmax;ymax", "1.jpg;cat;1;1;20;20"]
    write(tmp_path / "a.csv", BOM + end.join(lines))
    assert read(tmp_path) == ({"1.jpg": ["cat"]}, {})


def test_a_photo_whose_rows_cant_be_read_is_no_background(tmp_path):
    for i in (1, 2, 3):
        photo(tmp_path / f"{i}.jpg")
    rows = '1.jpg,cat,"1,5",1,20,20\n2.jpg,cat,1,1,20,20\n3.jpg,,,,,\n'
    write(tmp_path / "a.csv", f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
    photos, problems = read(tmp_path)
    assert photos == {"2.jpg": ["cat"], "3.jpg": []}
    assert problems["image none of whose objects can be read, left out"] == ["1.jpg"]


def test_a_table_that_cant_be_read_is_told(tmp_path):
    photo(tmp_path / "1.jpg")
    voc(tmp_path / "1.xml", "1.jpg", "a")
    write(tmp_path / "notes.csv", f'id,text\n1,"{"x" * 140_000}"\n')
    photos, problems = read(tmp_path)
    assert photos == {"1.jpg": ["a"]}
    assert problems["file that can't be read, left out"][0].startswith("notes.csv: field larger")


def test_photos_that_their_exif_tag_turns_are_told_where_no_size_is(tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    for name in ("yolo/1.jpg", "table/2.jpg"):
        photo(tmp_path / name, exif=turned)
    yolo(tmp_path / "yolo/1.txt", "0 0.5 0.5 0.2 0.2")
    write(tmp_path / "yolo/classes.txt", "a")
    table(tmp_path / "table/boxes.csv", [("2.jpg", "a")])
    said = "image that its EXIF tag turns: are its boxes of the turned image?"
    for folder, name in (("yolo", "1.jpg"), ("table", "2.jpg")):
        photos, problems = read(tmp_path / folder)
        assert list(photos) == [name] and problems == {said: [name]}


def test_a_row_of_the_other_unit_is_left_out(tmp_path):
    head = "filename,xmin,ymin,xmax,ymax,class\n"
    for name in "1234":
        photo(tmp_path / f"{name}.jpg")
    fractions = "{}.jpg,0.1,0.1,0.5,0.5,a\n"
    rows = "1.jpg,nan,nan,nan,nan,a\n2.jpg,1,1,20,20,a\n"
    write(tmp_path / "a.csv", head + rows + fractions.format(3) + fractions.format(4))
    found = read_folder(str(tmp_path))
    boxes = {os.path.basename(p.path): [t.box for t in p.things] for p in found.photos}
    width, height = found.photos[-1].size
    wanted = [[0.1 * width, 0.1 * height, 0.4 * width, 0.4 * height]]
    assert boxes.pop("1.jpg") == [] and list(boxes) == ["3.jpg", "4.jpg"]
    for box in boxes.values():
        assert box == [pytest.approx(wanted[0])]
    assert found.problems["line that can't be read, left out"] == [
        "a.csv row 2: pixels among fractions: 1, 1, 20, 20"
    ]


def test_accents_that_macos_takes_apart_are_the_same_name(tmp_path):
    for form, cls in (("NFC", "a"), ("NFD", "b")):
        folder = tmp_path / form
        photo(folder / (unicodedata.normalize(form, "Zürich") + ".jpg"))
        other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], "Zürich")
        table(folder / "boxes.csv", [(f"{other}.jpg", cls)])
        photos, problems = read(folder)
        assert list(photos.values()) == [[cls]] and not problems


def boxes(root):
    """The boxes of all photos below a folder, in the order of the photos' paths."""
    return [[thing.box for thing in photo.things] for photo in read_folder(str(root)).photos]


def test_a_line_of_a_voc_list_that_names_one_annotation_means_no_other(tmp_path):
    for name in ("a", "a.b", "a 1"):
        photo(tmp_path / f"JPEGImages/{name}.jpg")
        voc(tmp_path / f"Annotations/{name}.xml", "", "x")
    write(tmp_path / "ImageSets/Main/train.txt", "a.b\na 1\n")
    write(tmp_path / "ImageSets/Main/val.txt", "a\n")
    names = {"a": "val", "a.b": "train", "a 1": "train"}
    assert splits(tmp_path) == {f"JPEGImages/{k}.jpg": v for k, v in names.items()}


@pytest.mark.parametrize(
    "size, said",
    [
        ((64, 48), ""),
        ((48, 48), "<width>48</width><height>48</height>"),
        ((64, 48), "<width>0</width><height>0</height>"),
    ],
)
def test_a_turned_photo_is_told_where_its_size_says_nothing(size, said, tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", size).save(tmp_path / "1.jpg", exif=turned)
    voc(tmp_path / "1.xml", "1.jpg", "a")
    text = (tmp_path / "1.xml").read_text()
    write(tmp_path / "1.xml", text.replace("<object>", f"<size>{said}</size><object>"))
    told = "image that its EXIF tag turns: are its boxes of the turned image?"
    assert read(tmp_path)[1] == {told: ["1.jpg"]}


def test_a_box_of_five_numbers_is_told_and_not_taken_for_one_of_four(tmp_path):
    photo(tmp_path / "1.jpg")
    box = {"id": 1, "image_id": 0, "category_id": 1}
    both = [{**box, "bbox": [32, 24, 20, 10, 0]}, {**box, "id": 2, "bbox": [1, 1, 9, 9]}]
    coco(tmp_path / "a.json", [("1.jpg", "x")], annotations=both)
    assert boxes(tmp_path) == [[[1, 1, 9, 9]]]
    assert len(read(tmp_path)[1]["annotation that can't be read, left out"]) == 1


def test_an_image_that_a_yaml_has_for_val_and_test_is_of_val(tmp_path):
    for name in ("a", "b"):
        photo(tmp_path / f"{name}/{name}.jpg")
        yolo(tmp_path / f"{name}/{name}.txt")
    write(tmp_path / "data.yaml", "train: a\nval: b\ntest: b\nnames: [cat]\n")
    assert splits(tmp_path) == {"a/a.jpg": "train", "b/b.jpg": "val"}
    told = "photo in two splits of a yaml; it is in the first"
    assert read(tmp_path)[1] == {told: ["data.yaml: b/b.jpg"]}


def test_a_table_of_four_corners_is_not_taken_for_one_of_two(tmp_path):
    photo(tmp_path / "1.jpg")
    row = "1.jpg,cat,10,5,30,15,25,25,5,15\n"
    write(tmp_path / "a.csv", f"filename,class,x1,y1,x2,y2,x3,y3,x4,y4\n{row}")
    with pytest.raises(ValueError, match="its columns are 'filename,cl.*expected one of"):
        read_folder(str(tmp_path))
    more = "xmin,ymin,xmax,ymax"
    write(
        tmp_path / "a.csv",
        f"filename,class,x1,y1,x2,y2,x3,y3,{more}\n{row}".replace("5,15\n", "5,5,30,25\n"),
    )
    assert boxes(tmp_path) == [[[5, 5, 25, 20]]]


def test_a_polygon_is_its_box_and_an_outline_in_pixels(tmp_path):
    photo(tmp_path / "1.jpg")  # 64 x 48
    yolo(tmp_path / "1.txt", "0 .25 .5 .5 .5 .5 .75")
    write(tmp_path / "classes.txt", "cat")
    (thing,) = read_folder(str(tmp_path)).photos[0].things
    assert (thing.box, thing.outline) == ([16, 24, 16, 12], [[16, 24, 32, 24, 32, 36]])


@pytest.mark.parametrize(
    "head, more", [("x,y,w,h,width,height", ",64,48"), ("x,y,width,height", "")]
)
def test_a_box_of_a_table_may_have_a_size_in_place_of_a_second_corner(head, more, tmp_path):
    photo(tmp_path / "1.jpg")
    write(tmp_path / "a.csv", f"filename,class,{head}\n1.jpg,cat,5,6,20,30{more}\n")
    assert boxes(tmp_path) == [[[5, 6, 20, 30]]]


def test_a_table_of_keras_retinanet_has_no_header(tmp_path):
    for i in (1, 2):
        photo(tmp_path / f"{i}.jpg")
    write(tmp_path / "a.csv", "1.jpg,5,6,25,36,cat\n2.jpg,,,,,\n")
    assert boxes(tmp_path) == [[[5, 6, 20, 30]], []]


def test_a_box_over_the_border_is_cut_there(tmp_path):
    photo(tmp_path / "1.jpg")  # 64 x 48
    rows = "1.jpg,cat,-10,-20,30,40\n1.jpg,cat,50,40,80,90\n"
    write(tmp_path / "a.csv", f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
    assert boxes(tmp_path) == [[[0, 0, 30, 40], [50, 40, 14, 8]]]
    assert len(read(tmp_path)[1]["box over the border, cut there"]) == 2


def test_of_two_annotations_alike_the_one_that_tells_the_split_counts(tmp_path):
    for name in ("1.jpg", "2.jpg"):
        photo(tmp_path / name)
    coco(tmp_path / "all.json", [("1.jpg", "a"), ("2.jpg", "a")])
    coco(tmp_path / "train.json", [("1.jpg", "a")])
    assert splits(tmp_path) == {"1.jpg": "train", "2.jpg": ""}


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    photo(tmp_path / "coco/1.jpg")
    categories = [{"id": 2, "name": "a"}, {"id": 1, "name": "b"}]
    coco(tmp_path / "coco/a.json", [("1.jpg", "a")], categories=categories)
    photo(tmp_path / "yolo/1.jpg")
    yolo(tmp_path / "yolo/1.txt")
    write(tmp_path / "yolo/data.yaml", "names: {1: a, 0: b}")
    for layout in ("coco", "yolo"):
        assert read_folder(str(tmp_path / layout)).classes == ["b", "a"]
