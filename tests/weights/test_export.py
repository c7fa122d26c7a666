"""An exported student is a stock detectron2 model, and exactly the student."""

import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN, build_model
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model
from test_lazy_student import RCNN, Run

from crosskd_ifc import ConfigError
from crosskd_ifc.analysis.detector import load_detector
from crosskd_ifc.common.user_code import import_user_code
from crosskd_ifc.weights import export, stock, student
from crosskd_ifc.weights.held_config import differing_keys

ROOT = Path(__file__).resolve().parents[2]
# Another width than the student's: the taps need adapters.
WIDE = ("MODEL.ROI_BOX_HEAD.FC_DIM", 24)
NO_CROSSKD = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "crosskd_ifc":
            raise AssertionError("crosskd_ifc was imported")

sys.meta_path.insert(0, Refuse())
import numpy, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1], allow_unsafe=False)
cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
image = numpy.random.RandomState(0).randint(0, 256, (48, 64, 3)).astype("uint8")
found = DefaultPredictor(cfg)(image)["instances"]
torch.save({"boxes": found.pred_boxes.tensor, "scores": found.scores}, sys.argv[2])
"""


def write_run(folder, model, cfg):
    """What training leaves in its OUTPUT_DIR; returns the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpointer = DetectionCheckpointer(model, str(folder), optimizer=optimizer)
    checkpointer.save("model_final", iteration=7)
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "model_final.pth")


@pytest.fixture
def run(tmp_path):
    """Checkpoint of a distilled student with adapters; its teacher is gone."""
    student, _ = distilling(teacher_opts=WIDE)
    assert any(k.startswith("fusion.") for k in student.state_dict())
    cfg = tiny_cfg("MODEL.CROSSKD.TEACHER.CONFIG_FILE", "gone.yaml", "OUTPUT_DIR", "mine")
    return write_run(tmp_path / "run", student, cfg)


def main(*args):
    """The script's exit status."""
    return runpy.run_path(str(ROOT / "tools" / "export_student.py"))["main"](list(map(str, args)))


def test_export_is_a_stock_config_and_the_student_alone(run, tmp_path):
    done = export.export_student(run, str(tmp_path / "student"))
    assert done.detections > 50
    assert sorted(os.listdir(tmp_path)) == ["run", "student"]
    assert sorted(os.listdir(tmp_path / "student")) == ["config.yaml", "metadata.json", "model.pth"]
    assert (
        "crosskd"
        not in (tmp_path / "student" / "config.yaml").read_text().split("\n", 2)[2].lower()
    )
    assert {"optimizer", "iteration", "fusion.adapters.fc1.weight"} <= set(done.dropped)

    cfg = get_cfg()
    cfg.merge_from_file(done.config, allow_unsafe=False)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert cfg.MODEL.ROI_HEADS.NAME == "StandardROIHeads"
    assert cfg.MODEL.WEIGHTS == done.weights and os.path.isabs(done.weights)
    assert cfg.OUTPUT_DIR == get_cfg().OUTPUT_DIR
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.01

    content = torch.load(done.weights, weights_only=True)
    assert list(content) == ["model"]
    model = build_model(cfg)
    assert type(model) is GeneralizedRCNN
    model.load_state_dict(content["model"], strict=True)
    trained = torch.load(run, weights_only=True)["model"]
    assert all(torch.equal(v, trained[k]) for k, v in content["model"].items())
    assert done.parameters == sum(p.numel() for p in model.parameters())


def test_export_predicts_without_this_package(run, tmp_path):
    done = export.export_student(run, str(tmp_path / "student"))
    found = tmp_path / "found.pth"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", NO_CROSSKD, done.config, str(found)]
    result = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    detections = torch.load(found)
    assert len(detections["scores"]) > 20

    # DefaultPredictor takes the student's own config and checkpoint, too, and needs no teacher.
    cfg = tiny_cfg(*("MODEL.WEIGHTS", run, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0))
    image = np.random.RandomState(0).randint(0, 256, (48, 64, 3)).astype("uint8")
    wanted = DefaultPredictor(cfg)(image)["instances"]
    torch.testing.assert_close(detections["boxes"], wanted.pred_boxes.tensor)
    torch.testing.assert_close(detections["scores"], wanted.scores)


def test_a_plain_model_is_exported_into_a_new_folder(tmp_path):
    cfg = tiny_cfg(architecture="GeneralizedRCNN")
    run = write_run(tmp_path / "run", tiny_model(cfg), cfg)
    done = export.export_student(run, str(tmp_path / "new" / "plain"))
    assert sorted(os.listdir(tmp_path / "new" / "plain")) == [
        "config.yaml",
        "metadata.json",
        "model.pth",
    ]
    assert done.architecture == ("GeneralizedRCNN", "GeneralizedRCNN")
    assert done.dropped == ["optimizer", "iteration"]


def test_mask_branch_is_exported_and_compared(tmp_path):
    cfg = tiny_cfg(
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    )
    run = write_run(tmp_path / "run", tiny_model(cfg), cfg)
    assert export.export_student(run, str(tmp_path / "student")).detections > 50
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "student" / "config.yaml"))
    assert cfg.MODEL.MASK_ON


def test_an_export_that_differs_does_not_appear(run, tmp_path, monkeypatch):
    save = torch.save

    def save_other_weights(content, path):
        name = "roi_heads.box_predictor.bbox_pred.bias"
        save({"model": {**content["model"], name: content["model"][name] + 1e-3}}, path)

    monkeypatch.setattr(torch, "save", save_other_weights)
    with pytest.raises(ValueError, match="detections differ"):
        export.export_student(run, str(tmp_path / "student"))
    assert os.listdir(tmp_path) == ["run"]


def test_detections_with_other_fields_or_counts_are_not_equal():
    with torch.no_grad():
        model = tiny_model().eval()
        a, b = (x["instances"] for x in model(tiny_batch()))
    assert export._equal(a, a) and not export._equal(a, b) and not export._equal(a, a[:-1])
    c = a[:]
    c.remove("scores")
    assert not export._equal(a, c)


def test_nothing_is_overwritten_unless_forced(run, tmp_path):
    out = tmp_path / "student"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        export.export_student(run, str(out))
    export.export_student(run, str(out), force=True)
    assert sorted(os.listdir(out)) == ["config.yaml", "metadata.json", "model.pth", "notes.txt"]


@pytest.mark.parametrize("name, left", [("model.pth", "notes.txt"), ("config.yaml", "x.pth")])
def test_a_folder_that_is_no_export_is_refused_even_if_forced(run, name, left, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    for file in (name, left):
        (out / file).write_text("mine")
    with pytest.raises(FileExistsError, match=f"mine: its {name} is not of an export; give anothe"):
        export.export_student(run, str(out), force=True)
    assert sorted(os.listdir(out)) == sorted([name, left])
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["metadata.json", "model.json"])
def test_nor_is_a_file_of_a_name_that_exports_have(run, name, tmp_path):
    (tmp_path / name).write_text('{"camera": "mine"}')
    with pytest.raises(FileExistsError, match=f"{name}: .* it is not of an export: give another"):
        export.export_student(run, str(tmp_path), force=True)
    assert "camera" in (tmp_path / name).read_text()


def test_an_out_that_is_a_file_is_refused_even_if_forced(run, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file; give the name of a folder"):
        export.export_student(run, str(tmp_path / "out"), force=True)


@pytest.mark.parametrize("format", ["detectron2", "torchscript"])
def test_the_folder_of_a_training_is_refused_even_if_forced(run, format, tmp_path):
    folder = Path(run).parent
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["config"] = {"yaml": (folder / "config.yaml").read_text()}
    torch.save(checkpoint, run)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "last_checkpoint" in kept
    for _ in range(2):
        with pytest.raises(FileExistsError, match="run: a training's folder; give another OUT"):
            export.export_student(run, str(folder), format=format, force=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
        # An export into it by an earlier version doesn't make it one.
        (folder / "model.json").write_text("{}")
        kept["model.json"] = b"{}"


def test_a_checkpoints_own_folder_keeps_its_config(run, tmp_path):
    folder = tmp_path / "student"
    export.export_student(run, str(folder))
    config = (folder / "config.yaml").read_text()
    shutil.copy(run, folder / "other.pth")
    with pytest.raises(FileExistsError, match="config.yaml: this would overwrite the input"):
        options = dict(config_file=str(Path(run).with_name("config.yaml")), force=True)
        export.export_student(str(folder / "other.pth"), str(folder), **options)
    assert (folder / "config.yaml").read_text() == config


def test_a_forced_export_leaves_nothing_of_an_earlier_one(run, tmp_path):
    out = tmp_path / "student"
    export.export_student(run, str(out), safetensors=True)
    (out / "model.onnx").write_text("of an earlier one")
    (out / "notes.txt").write_text("mine")
    export.export_student(run, str(out), force=True)
    assert sorted(os.listdir(out)) == ["config.yaml", "metadata.json", "model.pth", "notes.txt"]


def test_all_files_can_be_read_by_the_same_people(run, tmp_path):
    out = tmp_path / "student"
    export.export_student(run, str(out), safetensors=True)
    modes = {name: stat.S_IMODE(os.stat(out / name).st_mode) for name in os.listdir(out)}
    assert len(modes) == 4 and set(modes.values()) == {0o666 & ~umask()}


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize("out", ["", "student.pth"])
def test_an_out_that_is_no_folders_name_is_refused(run, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"OUT is '{out}'; give the name of a folder"):
        export.export_student(run, out)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("text", ["A: " + "[" * 3000, "_BASE_: config.yaml"])
def test_a_deep_or_cyclic_config_is_one_error(run, text, tmp_path):
    Path(run).with_name("config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml: it is nested too deeply, or its _BASE_"):
        export.export_student(run, str(tmp_path / "student"))


def test_a_checkpoints_own_config_counts_and_not_what_lies_beside_it(run, tmp_path):
    config = Path(run).with_name("config.yaml").read_text()
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["config"] = {"yaml": config, "processes": 1}
    torch.save(checkpoint, tmp_path / "model.pth")
    other = tiny_cfg("INPUT.MIN_SIZE_TEST", 90, "MODEL.RESNETS.DEPTH", 101)
    (tmp_path / "config.yaml").write_text(other.dump())
    done = export.export_student(str(tmp_path / "model.pth"), str(tmp_path / "student"))
    exported = yaml.safe_load(Path(done.config).read_text())
    assert exported["INPUT"]["MIN_SIZE_TEST"] == yaml.safe_load(config)["INPUT"]["MIN_SIZE_TEST"]
    checkpoint["config"]["yaml"] = "MODEL: {NOT_A_KEY: 1}"
    torch.save(checkpoint, tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="model.pth: the config in it: .*NOT_A_KEY"):
        export.export_student(str(tmp_path / "model.pth"), str(tmp_path / "again"))


def test_config_file_stands_in_for_a_missing_one(run, tmp_path):
    config = os.path.join(os.path.dirname(run), "config.yaml")
    os.rename(config, tmp_path / "moved.yaml")
    with pytest.raises(FileNotFoundError, match="--config-file"):
        export.export_student(run, str(tmp_path / "student"))
    export.export_student(run, str(tmp_path / "student"), config_file=str(tmp_path / "moved.yaml"))


def test_a_checkpoint_of_an_url_without_a_config_is_one_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "load_weights", lambda _: torch.load(run, weights_only=True))
    with pytest.raises(
        FileNotFoundError, match="^http://x/a.pth: there is no config in it.*--conf"
    ):
        export.export_student("http://x/a.pth", str(tmp_path / "student"))


def test_a_checkpoint_of_an_url_is_exported_with_its_lazyconfig(tmp_path, monkeypatch):
    lazy = Run(tmp_path, RCNN)
    monkeypatch.setattr(student, "load_weights", lambda _: torch.load(lazy.checkpoint))
    options = dict(config_file=lazy.config)
    assert export.export_student("http://x/a.pth", str(tmp_path / "out"), **options).detections > 0


def test_a_grey_student_is_exported(tmp_path):
    cfg = tiny_cfg("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [1.0])
    run = write_run(tmp_path / "run", build_model(cfg), cfg)
    assert export.export_student(run, str(tmp_path / "student")).detections > 50


def test_a_named_config_that_finds_something_else_is_told(run, tmp_path, caplog):
    checkpoint = torch.load(run, weights_only=True)
    checkpoint["config"] = {"yaml": tiny_cfg().dump(), "processes": 1}
    torch.save(checkpoint, run)
    config = tmp_path / "mine.yaml"
    opts = ["INPUT.FORMAT", "RGB", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3]
    opts += ["MODEL.FPN.FUSE_TYPE", "avg", "SOLVER.BASE_LR", 9.0]
    for name, more, told in (("a", [], False), ("b", opts, True)):
        config.write_text(tiny_cfg(*more).dump())
        export.export_student(run, str(tmp_path / name), config_file=str(config))
        assert bool(caplog.messages) == told
    assert (
        "mine.yaml: INPUT.FORMAT, MODEL.FPN.FUSE_TYPE, MODEL.ROI_HEADS.SCORE_THRESH_TEST differ"
        in caplog.text
    )


def test_a_plain_config_for_a_distilled_checkpoint_finds_the_same(run, tmp_path, caplog):
    checkpoint = torch.load(run, weights_only=True)
    held = tiny_cfg("MODEL.CROSSKD.FUSION.IN_FEATURES", ("pool", "fc1"))
    checkpoint["config"] = {"yaml": held.dump(), "processes": 1}
    torch.save(checkpoint, run)
    (tmp_path / "plain.yaml").write_text(tiny_cfg().dump())
    export.export_student(run, str(tmp_path / "a"), config_file=str(tmp_path / "plain.yaml"))
    assert not caplog.messages
    other = tiny_cfg("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"])
    (tmp_path / "other.yaml").write_text(other.dump())
    load_detector(run, config_file=str(tmp_path / "other.yaml"))
    assert "other.yaml: MODEL.ROI_HEADS.IN_FEATURES differ from the config" in caplog.text
    names = {"build_fcos_resnet_fpn_backbone", "build_crosskd_fcos_resnet_fpn_backbone"}
    held.MODEL.BACKBONE.NAME, other.MODEL.BACKBONE.NAME = names  # of one backbone
    checkpoint["config"] = {"yaml": held.dump(), "processes": 1}
    assert differing_keys(checkpoint, other, evaluation=True) == ["MODEL.ROI_HEADS.IN_FEATURES"]
    held.LAZY_CONFIG = "a.py"  # whose model isn't in these keys
    checkpoint["config"] = {"yaml": held.dump(), "processes": 1}
    assert differing_keys(checkpoint, other, evaluation=True) == []


def test_a_named_config_has_the_class_count_of_its_card(run, tmp_path):
    splits = "{train: {json: gone.json, images: .}}"
    card = f"{{name: counted, format: coco, root: ., splits: {splits}, classes: [a, b, c]}}"
    (tmp_path / "card.yaml").write_text(card)
    data = ("DATASETS.CARDS", ("card.yaml",), "DATASETS.TRAIN", ("counted_train",))
    cfg = tiny_cfg(*data, "MODEL.ROI_HEADS.NUM_CLASSES", 80)  # detectron2's own
    config = tmp_path / "mine.yaml"
    config.write_text(cfg.dump())
    export.export_student(run, str(tmp_path / "student"), config_file=str(config))
    exported = yaml.safe_load((tmp_path / "student" / "config.yaml").read_text())
    assert exported["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 3
    assert load_detector(run, config_file=str(config)).class_names == ["a", "b", "c"]
    os.remove(tmp_path / "card.yaml")
    with pytest.raises(ConfigError, match="card.yaml"):
        load_detector(run, config_file=str(config))
    opts = ("DATASETS.CARDS", (), "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    assert len(load_detector(run, config_file=str(config), opts=opts).class_names) == 3


def test_wrong_input_is_one_clear_error(run, tmp_path):
    out = str(tmp_path / "student")
    config = Path(run).with_name("config.yaml")

    def refused(error, match):
        with pytest.raises(error, match=match):
            export.export_student(run, out)
        assert not os.path.exists(out)

    right = config.read_text()
    config.write_text(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 5).dump())
    refused(ValueError, "of another shape: roi_heads.box_predictor.cls_score.weight")
    config.write_text("MODEL: {NOT_A_KEY: 1}")
    refused(ConfigError, "NOT_A_KEY")
    config.write_text("MODEL: [")
    refused(ConfigError, "the config .*config.yaml: ")
    config.write_text(right.replace("NAME: build_resnet_fpn_backbone", "NAME: my_backbone"))
    refused(ConfigError, "my_backbone")
    config.write_text(right)

    content = torch.load(run)
    bias = content["model"].pop("roi_heads.box_predictor.cls_score.bias")
    torch.save(content, run)
    refused(ValueError, "missing: roi_heads.box_predictor.cls_score.bias")
    content["model"]["roi_heads.box_predictor.cls_score.bias"] = bias * float("nan")
    torch.save(content, run)
    refused(ValueError, "model_final.pth: 1 of its tensors hold NaN or infinity: .*cls_score.bias")
    torch.save(content["optimizer"], run)
    refused(ValueError, "no weights named 'model'")
    Path(run).write_bytes(b"cut off")
    refused(ValueError, "torch can't read it")
    os.remove(run)
    refused(FileNotFoundError, "model_final.pth: no such file")


def test_parts_without_stock_counterpart_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.delitem(stock.STOCK_CLASSES, "CrossKDROIHeads")
    with pytest.raises(ConfigError, match="CrossKDROIHeads"):
        export.export_student(run, str(tmp_path / "student"))


OWN = """
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

@BACKBONE_REGISTRY.register()
def build_{}(cfg, input_shape):
    return build_resnet_fpn_backbone(cfg, input_shape)
"""


def test_code_of_the_users_own_is_named_where_the_model_needs_it(tmp_path, capsys):
    names = ("own_part", "own_other")
    files = [str(tmp_path / f"{name}.py") for name in names]
    for name, file in zip(names, files):
        Path(file).write_text(OWN.format(name))
    cfg = tiny_cfg("MODEL.CROSSKD.IMPORTS", files)
    import_user_code(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_own_part"
    run, out = write_run(tmp_path / "run", tiny_model(cfg), cfg), tmp_path / "out"
    assert main(run, out, "--config-file", Path(run).with_name("config.yaml")) == 0
    where = f"wherever detectron2 is installed, with code of your own: {files[0]}:\n"
    assert where in capsys.readouterr().out
    assert f"# It needs code of your own: {files[0]!r}.\n" in (out / "config.yaml").read_text()


def test_an_exported_config_has_no_key_that_detectron2s_release_0_6_lacks(run, tmp_path):
    """Unless it says something."""
    export.export_student(run, str(tmp_path / "a"))
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    head, solver = written["MODEL"]["ROI_BOX_HEAD"], written["SOLVER"]
    assert "FC_DIM" in head and not [key for key in head if "FED_LOSS" in key or "SIGMOID" in key]
    assert "BASE_LR" in solver
    assert not {"BASE_LR_END", "NUM_DECAYS", "RESCALE_INTERVAL"} & solver.keys()
    config = tmp_path / "sigmoid.yaml"
    config.write_text(tiny_cfg("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True).dump())
    export.export_student(run, str(tmp_path / "b"), config_file=str(config))
    head = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["MODEL"]["ROI_BOX_HEAD"]
    assert head["USE_SIGMOID_CE"] is True


def test_script_prints_what_was_written_and_how_to_use_it(run, tmp_path, capsys):
    out = tmp_path / "student"
    assert main(run, out) == 0
    printed = capsys.readouterr().out
    assert str(out / "model.pth") in printed and "CrossKDRCNN -> GeneralizedRCNN" in printed
    code = printed.split("installed:")[1].split("Or look")[0]
    snippet = [line.strip() for line in code.splitlines()]
    scope = {"image": tiny_batch()[0]["image"].permute(1, 2, 0).numpy()}
    exec("\n".join(snippet), scope)
    assert scope["detections"].has("pred_boxes")
    assert main(run, out) == 1
    assert capsys.readouterr().err == (
        f"export_student: {out} exists; give another OUT, or --force to replace it\n"
    )


def test_of_x_pth_the_config_is_x_yaml_before_config_yaml(run):
    other = Path(run).with_name("x.pth")
    shutil.copy(run, other)
    other.with_suffix(".yaml").write_text(tiny_cfg("INPUT.FORMAT", "RGB").dump())
    assert student.load_student(str(other)).cfg.INPUT.FORMAT == "RGB"
    assert student.load_student(run).cfg.INPUT.FORMAT == "BGR"


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[9], [16], [32], [48], [64]]),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (20.0, 20.0, 10.0, 10.0)),
        ("MODEL.RPN.NMS_THRESH", 0.9),
    ],
)
def test_what_changes_predictions_under_the_same_weights_is_told(key, value):
    held = {"config": {"yaml": tiny_cfg().dump()}}
    assert differing_keys(held, tiny_cfg(key, value), evaluation=False) == [key]
