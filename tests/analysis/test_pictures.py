"""tools/visualize.py and what it calls."""

import os

import numpy as np
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from helpers import distilling, load_tool, tiny_cfg, tiny_model
from PIL import Image

from crosskd_ifc import ConfigError
from crosskd_ifc.analysis.detections import COLUMNS
from crosskd_ifc.analysis.pictures import choose_records, load_inputs, names_by_column
from crosskd_ifc.data.shapes import CLASSES, COARSE_CLASSES, generate
from crosskd_ifc.training.preflight import check_evaluation_config

CLASS_COUNT = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))


visualize = load_tool("visualize")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a data set, its card, a teacher's config and weights, a student's, and images."""
    folder = tmp_path_factory.mktemp("visualize")
    generate(str(folder / "data"), num_images={"test": 3}, image_size=64, seed=3)
    card = {
        "name": "fewpictures",
        "format": "coco",
        "root": "data",
        "splits": {"test": {"json": "annotations/test.json", "images": "test"}},
        "classes": list(CLASSES),
        "evaluator": "coco",
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    cfg = tiny_cfg(*CLASS_COUNT, architecture="GeneralizedRCNN")
    (folder / "teacher.yaml").write_text(cfg.dump())
    DetectionCheckpointer(tiny_model(cfg, seed=7), str(folder)).save("teacher")
    settings = {
        "MODEL.CROSSKD.TEACHER.CONFIG_FILE": str(folder / "teacher.yaml"),
        "MODEL.CROSSKD.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
        "MODEL.WEIGHTS": str(folder / "student.pth"),
        "DATASETS.CARDS": (str(folder / "card.yaml"),),
        "DATASETS.TEST": ("fewpictures_test",),
        "INPUT.MIN_SIZE_TEST": 48,
    }
    cfg = tiny_cfg(*CLASS_COUNT, *(x for pair in settings.items() for x in pair))
    (folder / "student.yaml").write_text(cfg.dump())
    student = tiny_model(cfg, seed=8)
    DetectionCheckpointer(student, str(folder)).save("student")
    student.roi_heads.box_head.fc1 = torch.nn.Linear(3, 3, bias=False)
    DetectionCheckpointer(student, str(folder)).save("partial")
    Image.new("RGB", (60, 40), (200, 30, 90)).save(folder / "wide.jpg")
    Image.new("L", (30, 50)).save(folder / "TEST.png")
    (folder / "text.jpg").write_text("no image")
    Image.fromarray(np.full((40, 40), 700, dtype=np.uint16)).save(folder / "16.png")
    return folder


def run(files, *arguments):
    visualize.invoke_main(["--config-file", str(files / "student.yaml"), *map(str, arguments)])


def test_a_data_set_is_drawn_with_its_ground_truth(files, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    run(files, "--num", 2, "--threshold", 0.1, "--output", out)
    assert sorted(os.listdir(out)) == ["detections.png", "features.png"]
    width, height = Image.open(out / "detections.png").size
    assert width == 300 * len(COLUMNS) and 600 < height < 700  # 2 rows
    assert capsys.readouterr().out.split("\n")[0] == f"Wrote {out / 'detections.png'}"


def test_images_are_drawn_without_and_keys_may_follow_them(files, tmp_path):
    images = (files / "wide.jpg", files / "TEST.png")
    out = tmp_path / "pair.png"
    run(files, "--output", out, "--images", *images, "MODEL.CROSSKD.MIMIC", "student_head")
    assert sorted(os.listdir(tmp_path)) == ["pair_detections.png", "pair_features.png"]
    assert Image.open(tmp_path / "pair_detections.png").size[0] == 300 * 2  # teacher, student


def test_the_pictures_lie_in_the_runs_folder_and_are_replaced_only_on_demand(files, tmp_path):
    opts = ("--images", files / "wide.jpg", "OUTPUT_DIR", tmp_path)
    run(files, *opts)
    picture = tmp_path / "pictures" / "detections.png"
    os.remove(tmp_path / "pictures" / "features.png")
    before = os.stat(picture).st_mtime_ns
    with pytest.raises(SystemExit, match="^error: --output: .*detections.png exists.* --force"):
        run(files, *opts)
    assert os.stat(picture).st_mtime_ns == before and len(os.listdir(picture.parent)) == 1
    run(files, "--force", *opts)
    assert os.stat(picture).st_mtime_ns > before and len(os.listdir(picture.parent)) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--images", "gone.jpg"), "--images: gone.jpg: the image is missing"),
        (("--images", "{files}/text.jpg"), "--images: .*text.jpg: not an image"),
        (("--images", "{files}/16.png"), "--images: .*16.png: more than 8 bits per channel"),
        (("--dataset", "nothing"), "DATASETS.TEST: no data set is called 'nothing'"),
        (("--dataset", "voc_2007_test"), "MODEL.ROI_HEADS.NUM_CLASSES is 8"),
        (("--num", "0"), "--num is 0"),
        (("DATASETS.TEST", "()"), "DATASETS.TEST is empty"),
        (("MODEL.WEIGHTS", "gone.pth"), "MODEL.WEIGHTS: there is no file 'gone.pth'"),
        (("MODEL.WEIGHTS", ""), "MODEL.WEIGHTS is empty"),
        (("MODEL.WEIGHTS", "{files}/text.jpg"), "MODEL.WEIGHTS '.*text.jpg' can't be read"),
        (
            ("MODEL.WEIGHTS", "{files}/partial.pth"),
            "MODEL.WEIGHTS '.*partial.pth' does not fit the model of its config. Weights "
            "missing: roi_heads.box_head.fc1.bias; of another shape: roi_heads.box_head.fc1.weight",
        ),
        (
            ("MODEL.CROSSKD.TEACHER.WEIGHTS", "gone.pth"),
            "MODEL.CROSSKD.TEACHER.WEIGHTS: there is no file 'gone.pth'",
        ),
        (("MODEL.CROSSKD.ENABLED", "False"), "the config has no teacher"),
        (("MODEL.CROSSKD.NAME", "x"), "command line: Non-existent key: MODEL.CROSSKD.NAME"),
        (("--output", "{files}/text.jpg/x"), "--output: "),
        (("--output", "{files}/text.jpg"), "--output: .*text.jpg is a file; expected a folder"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_what_cannot_work_is_one_line_and_writes_nothing(files, tmp_path, arguments, message):
    out = () if "--output" in arguments else ("--output", tmp_path / "out")
    arguments = [a.format(files=files) for a in arguments]
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        run(files, *out, *arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_data_set_that_cannot_be_used_is_named(files):
    lost = {"file_name": "lost.jpg", "annotations": []}
    for load, message in (
        (lambda: 1 / 0, "data set 'broken' can't be loaded: ZeroDivisionError"),
        (lambda: [], "data set 'broken' has no images"),
        (lambda: [lost], "data set 'broken': lost.jpg: the image is missing"),
    ):
        DatasetCatalog.register("broken", load)
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            run(files, "--dataset", "broken")
        DatasetCatalog.remove("broken")


def test_a_data_set_of_other_classes_than_the_trainings_is_refused(files):
    """Its ground truth would be named as the model's classes are."""
    load = lambda: [{"file_name": str(files / "wide.jpg"), "annotations": []}]  # noqa: E731
    for name, classes in (("trained_on", CLASSES), ("turned", CLASSES[::-1])):
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).thing_classes = list(classes)
    try:
        with pytest.raises(SystemExit, match="^error: DATASETS.TEST: 'turned' has other classes"):
            run(files, "--dataset", "turned", "DATASETS.TRAIN", "('trained_on',)")
    finally:
        for name in ("trained_on", "turned"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_a_config_without_a_teacher_is_refused(files):
    with pytest.raises(SystemExit, match="^error: the config has no teacher.*CONFIG_FILE is ''"):
        visualize.invoke_main(["--config-file", str(files / "teacher.yaml")])


def test_images_that_are_none_are_a_usage_error(files, capsys):
    with pytest.raises(SystemExit):
        run(files, "--images", "MODEL.WEIGHTS", "x.pth")
    assert "--images: there is none before" in capsys.readouterr().err


def test_images_are_prepared_as_by_the_test_loader(files):
    cfg = tiny_cfg(*CLASS_COUNT, "DATASETS.CARDS", (str(files / "card.yaml"),))
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 48, "INPUT.FORMAT", "RGB"])
    cfg.merge_from_list(["DATASETS.TEST", ("fewpictures_test",)])
    check_evaluation_config(cfg)
    expected = next(iter(build_detection_test_loader(cfg, "fewpictures_test")))[0]
    (found,) = load_inputs(cfg, [{"file_name": expected["file_name"]}], "--images")
    assert torch.equal(found["image"], expected["image"]) and found["image"].shape == (3, 48, 48)
    assert found["height"] == found["width"] == 64


def test_images_are_picked_by_name_or_seed():
    records = [{"file_name": f"/data/{folder}/{i}.jpg"} for folder in "ab" for i in range(5)]
    for name in ("/data/b/3.jpg",):
        assert choose_records(records, 4, names=[name]) == [records[8]]
    assert choose_records(records[5:], 4, names=["3.jpg", "0"]) == [records[8], records[5]]
    with pytest.raises(ConfigError, match="--names: 2 images are called '3'"):
        choose_records(records, 4, names=["3"])
    with pytest.raises(ConfigError, match="--names: no image.* called 'x'; .* such as 0.jpg"):
        choose_records(records, 4, names=["x"])
    first, again, other = (choose_records(records, 4, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and len({r["file_name"] for r in first}) == 4


def test_names_may_stand_before_the_first_key(files, tmp_path):
    run(
        files,
        "--output",
        tmp_path / "x.png",
        "--names",
        "000001",
        "MODEL.CROSSKD.MIMIC",
        "student_head",
    )
    assert Image.open(tmp_path / "x_detections.png").size[1] < 400  # one row


def test_it_says_when_nothing_reaches_the_threshold(files, tmp_path, caplog):
    image = ("--images", files / "wide.jpg")
    run(files, "--output", tmp_path / "a.png", "--threshold", 1.0, *image)
    assert "student: no detection reaches 1, the highest score is 0." in caplog.text
    caplog.clear()
    run(files, "--output", tmp_path / "b.png", "--threshold", 0.0, *image)
    assert "reaches" not in caplog.text


@pytest.mark.parametrize(
    "late", [("--force",), ("--num", "2"), ("--output", "x"), ("--config-file", "x.yaml")]
)
def test_options_after_keys_are_refused(files, late):
    keys = ("MODEL.CROSSKD.MIMIC", "student_head")
    with pytest.raises(SystemExit, match=f"^error: command line: {late[0]} stands .* come first"):
        run(files, *keys, *late)
    with pytest.raises(SystemExit, match=f"^error: command line: {late[0]} stands .* come first"):
        visualize.invoke_main([*keys, *late])


class TestClassNames:
    TRAIN = "DATASETS.TRAIN"
    MAP = "MODEL.CROSSKD.TEACHER.CLASS_MAP"

    def names(self, student_opts, teacher_opts, teacher_has_cfg=True):
        student, _ = distilling(*student_opts, teacher_opts=teacher_opts)
        student.teacher.cfg = tiny_cfg(*teacher_opts) if teacher_has_cfg else None
        found = names_by_column(tiny_cfg(*student_opts), student.teacher)
        assert set(found) == set(COLUMNS)
        assert found["ground truth"] == found["student"]
        assert found["cross-head"] == found["teacher"]
        return list(found["student"]), list(found["teacher"])

    def test_are_those_of_each_networks_data(self):
        ours = (*CLASS_COUNT, self.TRAIN, ("crosskd_shapes_train",), self.MAP, ("teacher",))
        theirs = ("MODEL.ROI_HEADS.NUM_CLASSES", len(COARSE_CLASSES))
        theirs += (self.TRAIN, ("crosskd_shapes_coarse_train",))
        assert self.names(ours, theirs) == (list(CLASSES), list(COARSE_CLASSES))

    def test_are_the_students_for_an_unknown_teacher_of_the_same_classes(self):
        ours = (*CLASS_COUNT, self.TRAIN, (), "DATASETS.TEST", ("crosskd_shapes_test",))
        assert self.names(ours, CLASS_COUNT, False) == (list(CLASSES), list(CLASSES))

    def test_are_those_of_a_teachers_own_card(self, tmp_path):
        splits = "{train: {json: gone.json, images: .}}"
        card = f"{{name: theirs, format: coco, root: ., splits: {splits}, classes: [c, b, a]}}"
        (tmp_path / "card.yaml").write_text(card)
        ours = (self.TRAIN, ("crosskd_shapes_train",), self.MAP, ("teacher",))
        theirs = (self.TRAIN, ("theirs_train",), "DATASETS.CARDS", (str(tmp_path / "card.yaml"),))
        assert self.names(ours, theirs) == (["0", "1", "2"], ["c", "b", "a"])

    def test_are_numbers_where_they_are_unknown(self):
        ours = (self.TRAIN, ("unknown",), self.MAP, ("teacher",))
        theirs = ("MODEL.ROI_HEADS.NUM_CLASSES", 2, self.TRAIN, ("crosskd_shapes_train",))
        assert self.names(ours, theirs) == (["0", "1", "2"], ["0", "1"])
