"""tools/predict.py and what it calls."""

import errno
import json
import os
import runpy
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from helpers import tiny_cfg, tiny_model
from PIL import Image
from test_fcos import TINY as TINY_FCOS
from test_fcos import fcos_cfg

from crosskd_ifc import ConfigError
from crosskd_ifc.analysis import prediction
from crosskd_ifc.analysis.detector import Detector, load_detector
from crosskd_ifc.analysis.inputs import find_sources
from crosskd_ifc.weights.export import export_student

TOOL = Path(__file__).resolve().parents[2] / "tools" / "predict.py"
predict = runpy.run_path(str(TOOL))["invoke_main"]
NAMES = ["cat", "$dog", "bird"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """run/ of a distilled student and its teacher, student/ exported, photos/ and a video."""
    folder = tmp_path_factory.mktemp("predict")
    teacher = tiny_cfg(architecture="GeneralizedRCNN")
    cfg = tiny_cfg("MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(folder / "teacher" / "config.yaml"))
    cfg.MODEL.CROSSKD.TEACHER.WEIGHTS = str(folder / "teacher" / "model_final.pth")
    for name, one, seed in (("teacher", teacher, 7), ("run", cfg, 8)):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(one.dump())
        state = tiny_model(one, seed=seed).state_dict()
        torch.save({"model": state}, folder / name / "model_final.pth")
    export_student(str(folder / "run" / "model_final.pth"), str(folder / "student"))
    metadata = json.loads((folder / "student" / "metadata.json").read_text())
    assert metadata == {"classes": None, "score_threshold": 0.01, "nms_threshold": 0.5}
    metadata["classes"] = NAMES
    (folder / "student" / "metadata.json").write_text(json.dumps(metadata))
    photos, g = folder / "photos", np.random.default_rng(0)
    (photos / "more").mkdir(parents=True)
    for name, size in (("a.JPG", (60, 80)), ("b.png", (64, 64)), ("more/a.webp", (50, 40))):
        Image.fromarray(g.integers(0, 256, (*size, 3), dtype=np.uint8)).save(photos / name)
    torch.save({"model": {}}, folder / "alone.pth")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.json").write_text("{}")
    (folder / "lazy.py").write_text("model = dict()")
    cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE = str(folder / "lazy.py")
    (folder / "of_lazy.yaml").write_text(cfg.dump())
    video = cv2.VideoWriter(str(folder / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(4):
        video.write(g.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    video.release()
    return folder


def run(*words):
    predict([str(word) for word in words])


def test_an_exported_student_detects_what_stock_detectron2_does(files):
    cfg = get_cfg()
    cfg.merge_from_file(str(files / "student" / "config.yaml"))
    image = cv2.imread(str(files / "photos" / "b.png"))
    expected = DefaultPredictor(cfg)(image)["instances"]
    opts = ("MODEL.DEVICE", "cpu")
    for weights in (files / "student", files / "run", files / "run" / "model_final.pth"):
        found = load_detector(str(weights), opts=opts).detect(image)
        assert len(expected) > 0 and torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert load_detector(str(files / "student")).class_names == NAMES
    assert load_detector(str(files / "run")).class_names == ["0", "1", "2"]


def test_a_checkpoints_own_config_counts_as_for_its_export(files, tmp_path, caplog):
    content = torch.load(files / "run" / "model_final.pth", weights_only=True)
    held = tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2)
    torch.save({**content, "config": {"yaml": held.dump()}}, tmp_path / "model_0000009.pth")
    (tmp_path / "config.yaml").write_text(tiny_cfg("INPUT.FORMAT", "RGB").dump())
    weights = str(tmp_path / "model_0000009.pth")
    found = load_detector(weights, opts=("MODEL.DEVICE", "cpu")).cfg
    assert (found.INPUT.FORMAT, found.MODEL.ROI_HEADS.SCORE_THRESH_TEST) == ("BGR", 0.2)
    assert not caplog.messages
    named = load_detector(weights, config_file=str(tmp_path / "config.yaml"))
    assert named.cfg.INPUT.FORMAT == "RGB"
    assert "INPUT.FORMAT, MODEL.ROI_HEADS.SCORE_THRESH_TEST differ from the config" in caplog.text


def test_other_weights_in_an_exports_folder_dont_get_its_names(files, tmp_path):
    shutil.copytree(files / "student", tmp_path / "student")
    for suffix in ("yaml", "pth"):
        there = {"yaml": "config.yaml", "pth": "model_final.pth"}[suffix]
        shutil.copy(files / "teacher" / there, tmp_path / "student" / f"teacher.{suffix}")
    assert load_detector(str(tmp_path / "student" / "teacher.pth")).class_names == ["0", "1", "2"]
    assert load_detector(str(tmp_path / "student" / "model.pth")).class_names == NAMES


@pytest.mark.parametrize("order, channels", [("RGB", 3), ("L", 1), ("YUV-BT.601", 3)])
def test_an_image_is_read_in_the_order_of_the_channels_of_the_training(files, order, channels):
    stats = ("MODEL.PIXEL_MEAN", [9.0] * channels, "MODEL.PIXEL_STD", [60.0] * channels)
    cfg = tiny_cfg("INPUT.FORMAT", order, *stats, architecture="GeneralizedRCNN")
    path, seen = str(files / "photos" / "b.png"), []
    model = build_model(cfg)
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0][0]["image"]))
    Detector(model, cfg, NAMES).detect(cv2.imread(path))
    wanted = DatasetMapper(cfg, is_train=False)({"file_name": path})["image"]
    assert torch.equal(seen[0], wanted.float())


def test_an_exported_fcos_detects_what_its_lazyconfig_does(tmp_path):
    cfg = fcos_cfg(*TINY_FCOS, "INPUT.MIN_SIZE_TEST", 64, "MODEL.FCOS.NORM", "")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "run" / "model_final.pth")
    export_student(str(tmp_path / "run" / "model_final.pth"), str(tmp_path / "student"))
    config = tmp_path / "student" / "config.yaml"
    lazy = LazyConfig.load(str(config))
    model = instantiate(lazy.model).eval()
    DetectionCheckpointer(model).load(lazy.train.init_checkpoint)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model([{"image": torch.as_tensor(image.transpose(2, 0, 1).copy())}])
    expected = expected[0]["instances"]
    found = load_detector(str(tmp_path / "student"), opts=("MODEL.DEVICE", "cpu")).detect(image)
    assert len(expected) > 0 and torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    opts = ("MODEL.DEVICE", "cpu", "MODEL.FCOS.SCORE_THRESH_TEST", float(found.scores[3]))
    assert len(load_detector(str(tmp_path / "student"), opts=opts).detect(image)) == 3
    about = json.loads((tmp_path / "student" / "metadata.json").read_text())
    del about["config"]
    (tmp_path / "student" / "metadata.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="LazyConfig"):
        load_detector(str(tmp_path / "student"))


def test_a_folder_makes_pictures_and_coco_results(files, tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "new" / "r.json"
    run(files / "student", files / "photos", "--output", out, "--json", results)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names == {"a.JPG", "b.png", "more/a.webp.png"}
    assert Image.open(out / "b.png").size == (320, 320)  # small ones are enlarged
    found = json.loads(results.read_text())
    assert {x["image_id"] for x in found} == {1, 2, 3}
    assert {x["file_name"] for x in found} == {"a.JPG", "b.png", "more/a.webp"}
    for one in found:
        assert NAMES[one["category_id"] - 1] == one["category"]
        assert len(one["bbox"]) == 4 and 0 < one["score"] <= 1
    printed = capsys.readouterr().out
    assert f"3 images, {len(found)} detections" in printed and "images/s" in printed


@pytest.mark.parametrize("names", [("v.avi", "v.mov"), ("b.bmp", "b.bmp.png")])
def test_two_inputs_are_never_written_to_one_file(names, files, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit, match="error: .* would be written to the same file"):
        run(files / "student", tmp_path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_would_be_clipped_is_not_read(files, tmp_path, capsys):
    Image.fromarray(np.full((40, 40), 700, dtype=np.uint16)).save(tmp_path / "16.png")
    with pytest.raises(SystemExit):
        run(files / "student", tmp_path / "16.png", "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "16.png").exists()
    assert "16.png" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_no_unreadable_input(files, tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(prediction, "replacing", full)
    with pytest.raises(SystemExit, match="^error: .*No space left on device.*b.png"):
        run(files / "student", files / "photos" / "b.png", "--output", tmp_path / "out")
    assert "Not read" not in capsys.readouterr().err


@pytest.mark.parametrize("teacher", ["config", "{files}/teacher"])
def test_the_teacher_is_drawn_beside_the_student(files, tmp_path, teacher):
    photo = files / "photos" / "b.png"
    words = ("--teacher", teacher.format(files=files), "--output", tmp_path, "--threshold", 0.1)
    run(files / "run", photo, *words)
    assert Image.open(tmp_path / "b.png").size == (640, 320 + 28)


def test_a_video_makes_a_video(files, tmp_path, capsys):
    run(files / "student", files / "v.avi", "--output", tmp_path, "--frames", 3)
    capture = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    frames = 0
    while capture.read()[0]:
        frames += 1
    assert frames == 3 and capture.get(cv2.CAP_PROP_FPS) == 5
    assert "3 images" in capsys.readouterr().out


def test_an_input_that_cannot_be_read_does_not_stop_the_others(files, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_text("no image")
    (tmp_path / "in" / "1.mp4").write_text("no video")
    os.symlink(files / "photos" / "b.png", tmp_path / "in" / "2.png")
    with pytest.raises(SystemExit) as end:
        run(files / "student", tmp_path / "in", "--output", tmp_path / "in" / "out")
    assert end.value.code == 1
    assert os.listdir(tmp_path / "in" / "out") == ["2.png"]
    assert "0.jpg" in capsys.readouterr().err
    # The second time, what was written is no input.
    assert len(find_sources([str(tmp_path / "in")], excluded=str(tmp_path / "in" / "out"))) == 3


def test_an_image_too_thin_for_the_network_does_not_stop_the_others(files, tmp_path, caplog):
    Image.new("RGB", (3000, 1)).save(tmp_path / "a.png")
    shutil.copy(files / "photos" / "b.png", tmp_path)
    with pytest.raises(SystemExit):
        run(
            files / "student", tmp_path, "--json", tmp_path / "r.json", "--output", tmp_path / "out"
        )
    assert "a.png: 3000x1 pixels, too thin to be resized" in caplog.text
    assert {x["file_name"] for x in json.loads((tmp_path / "r.json").read_text())} == {"b.png"}


def test_what_was_found_before_an_error_of_the_model_is_kept(files, tmp_path, monkeypatch):
    detect, seen = Detector.detect, []

    def fail_the_second_time(self, image):
        seen.append(image)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return detect(self, image)

    monkeypatch.setattr(Detector, "detect", fail_the_second_time)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(files / "student", files / "v.avi", "--json", tmp_path / "r.json", "--output", tmp_path)
    assert json.loads((tmp_path / "r.json").read_text())


def test_linked_folders_are_looked_through_once(files, tmp_path):
    os.symlink(files / "photos", tmp_path / "linked")
    os.symlink(tmp_path, tmp_path / "round")
    os.symlink(files / "photos", tmp_path / "again")
    found = find_sources([str(tmp_path)])
    assert len(found) == 3 and len({os.path.realpath(x.path) for x in found}) == 3
    os.symlink(files / "photos" / "more", files / "photos" / "more again")
    assert len(find_sources([str(files / "photos")])) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (("{files}/gone", "{files}/photos"), "gone: no such file or folder of weights"),
        (("{files}/photos", "{files}/photos"), "there is no model.pth and no checkpoint"),
        (("{files}/photos/b.png", "{files}/photos"), "b.png: .*weights"),
        (("{files}/alone.pth", "{files}/photos"), "there is no config in it, .* by --config-file"),
        (("{files}/onnx", "{files}/photos"), "an export for TorchScript or ONNX, .*checkpoint"),
        (("{files}/student", "gone.jpg"), "gone.jpg: no such file or folder"),
        (("{files}/student", "{files}/student"), "there is no image or video in this folder"),
        (("{files}/run", "{files}/photos", "--device", "tpu"), "the device is 'tpu', expected cpu"),
        (("{files}/student", "camera:x"), "a camera is named camera:0"),
        (("{files}/student", "{files}/student/model.pth"), "model.pth: not one of .jpg"),
        (
            ("{files}/student", "{files}/photos", "--teacher", "config"),
            "--teacher config: the student's config names no teacher",
        ),
        (
            ("{files}/run", "{files}/photos", "--teacher", "config")
            + ("--config-file", "{files}/of_lazy.yaml"),
            "--teacher config: .* of a LazyConfig; give its files: --teacher WEIGHTS --teacher-con",
        ),
        (
            ("{files}/run", "{files}/photos", "--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "5"),
            "does not fit the model of its config",
        ),
        (("{files}/run", "{files}/photos", "--opts", "SEED"), "--opts: 3 items; expected KEY"),
    ],
)
def test_what_cannot_work_is_one_line(files, tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        run(*(word.format(files=files) for word in words), "--output", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_for_pictures_that_is_a_file_is_refused(files):
    photo = files / "photos" / "b.png"
    with pytest.raises(SystemExit, match="^error: --output: .*config.yaml is a file; expected a f"):
        run(files / "student", photo, "--output", files / "run" / "config.yaml")


def test_files_that_macos_puts_beside_images_are_no_images(files, tmp_path):
    (tmp_path / "._b.png").write_bytes(b"\0\5\x16\7")
    os.symlink(files / "photos" / "b.png", tmp_path / "b.png")
    assert [source.name for source in find_sources([str(tmp_path)])] == ["b.png"]


def test_nothing_is_overwritten_without_force(files, tmp_path):
    photo, out = files / "photos" / "b.png", ("--output", tmp_path)
    run(files / "student", photo, *out)
    with pytest.raises(SystemExit, match="^error: --output: .*b.png exists.* --force"):
        run(files / "student", photo, *out)
    run(files / "student", photo, *out, "--force")
    results = ("--no-pictures", "--json", tmp_path / "r.json")
    run(files / "student", photo, *results)
    with pytest.raises(SystemExit, match="^error: --json: .*r.json exists; give another --json"):
        run(files / "student", photo, *results)
    with pytest.raises(SystemExit, match="this would overwrite the input"):
        run(files / "student", photo, "--output", photo.parent, "--force")


def test_an_input_named_twice_is_done_once(files, tmp_path):
    photo = files / "photos" / "b.png"
    assert len(find_sources([str(photo), str(files / "photos" / ".." / "photos" / "b.png")])) == 1


def test_only_what_was_written_is_told(files, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    shutil.copy(files / "photos" / "b.png", tmp_path / "in" / "b.png")
    run(files / "student", tmp_path / "in", "--output", tmp_path / "out")
    assert "Wrote" in capsys.readouterr().out
    (tmp_path / "in" / "b.png").write_text("no image any more")
    with pytest.raises(SystemExit):
        run(files / "student", tmp_path / "in", "--output", tmp_path / "out", "--force")
    assert "Wrote" not in capsys.readouterr().out


def test_a_video_that_ends_early_is_told(files, tmp_path, caplog):
    whole = (files / "v.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) * 6 // 10])
    run(files / "student", tmp_path / "half.avi", "--output", tmp_path / "out")
    assert "half.avi: only 2 of its 4 pictures could be read" in caplog.text


def test_a_thin_picture_is_drawn_within_bounds(files, tmp_path):
    Image.fromarray(np.zeros((4, 1000, 3), np.uint8)).save(tmp_path / "thin.png")
    run(files / "student", tmp_path / "thin.png", "--output", tmp_path / "out")
    assert cv2.imread(str(tmp_path / "out" / "thin.png")).shape[:2] == (8, 2000)
