"""A LazyConfig's student is exported as its YAML twin is: a model of stock detectron2."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from PIL import Image

from crosskd_ifc import ConfigError
from crosskd_ifc.analysis.detector import load_detector
from crosskd_ifc.common.lazy_config import load_lazy_config
from crosskd_ifc.weights.deployed import DeployedModel
from crosskd_ifc.weights.evaluating import evaluate_checkpoint
from crosskd_ifc.weights.export import export_student
from crosskd_ifc.weights.lazy_student import build_lazy_student

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# A shrunk zoo model; `crosskd` would be read by the training only.
RCNN = """
from crosskd_ifc import CrossKDRCNN, CrossKDROIHeads
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
import detectron2.data.transforms as T
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model._target_, model.roi_heads._target_ = CrossKDRCNN, CrossKDROIHeads
stages = model.backbone.bottom_up.stages
stages.depth = 18
del stages["stride_in_1x1"]
model.backbone.out_channels = model.proposal_generator.head.in_channels = 16
heads = model.roi_heads
heads.num_classes = 3
heads.box_head.input_shape.channels = 16
heads.box_head.fc_dims = [16, 16]
heads.box_predictor.input_shape.channels = 16
heads.box_predictor.test_score_thresh = 0.01
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    del heads[key]
crosskd = dict(TEACHER=dict(CONFIG_FILE="x.yaml"))
resize = L(T.ResizeShortestEdge)(short_edge_length=[64], max_size=96)
dataloader = dict(test=L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="crosskd_shapes_test", filter_empty=False),
    mapper=L(DatasetMapper)(is_train=False, augmentations=[resize], image_format="BGR"),
))
"""
FCOS_CONFIG = """
from crosskd_ifc import CrossKDFCOS
from detectron2 import model_zoo

model = model_zoo.get_config("common/models/fcos.py").model
model._target_ = CrossKDFCOS
model.update(num_classes=3, input_format="RGB", test_score_thresh=0.0)
dataloader = dict(test=dict(mapper=dict(augmentations=[])))
"""

WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["crosskd_ifc"] = None
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
cfg = LazyConfig.load(sys.argv[1])
model = instantiate(cfg.model).eval()
DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
with torch.no_grad():
    found = model([{"image": torch.load(sys.argv[2])}])[0]["instances"]
torch.save(found.scores, sys.argv[3])
"""


class Run:
    """A LazyConfig file, and what a training by it leaves."""

    def __init__(self, folder, text, *overrides):
        self.config, self.folder = str(folder / "config.py"), folder / "run"
        Path(self.config).write_text(text)
        config = load_lazy_config(self.config, overrides, key="test")
        torch.manual_seed(0)
        self.model = instantiate(config.model).eval()
        weights = {**self.model.state_dict(), "fusion.adapters.fc1.weight": torch.zeros(3)}
        self.checkpoint = str(self.folder / "model_final.pth")
        self.folder.mkdir()
        torch.save({"model": weights, "iteration": 3}, self.checkpoint)
        LazyConfig.save(config, str(self.folder / "config.yaml"))

    def export(self, out, **options):
        return export_student(self.checkpoint, str(out), config_file=self.config, **options)

    @torch.no_grad()
    def detect(self, image):
        return self.model([{"image": image}])[0]["instances"]


@pytest.fixture
def image():
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (3, 96, 128), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("text, kind", [(RCNN, GeneralizedRCNN), (FCOS_CONFIG, FCOS)])
def test_it_becomes_a_model_that_stock_detectron2_builds(text, kind, image, tmp_path):
    run = Run(tmp_path, text)
    done = run.export(tmp_path / "out")
    assert done.is_lazy and done.architecture[1] == kind.__name__ and done.detections > 0
    assert done.dropped == ["iteration", "fusion.adapters.fc1.weight"]
    built = LazyConfig.load(done.config)
    assert type(instantiate(built.model)) is kind
    assert built.train.init_checkpoint == done.weights
    assert dict(built.input) == (
        {"format": "BGR", "min_size": 64, "max_size": 96}
        if kind is GeneralizedRCNN
        else {"format": "RGB", "min_size": 0, "max_size": 0}
    )
    torch.save(image, tmp_path / "image.pth")
    files = [done.config, str(tmp_path / "image.pth"), str(tmp_path / "scores.pth")]
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, *files]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "scores.pth"), run.detect(image).scores)


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_it_becomes_one_file(format, image, tmp_path):
    run = Run(tmp_path, RCNN)
    done = run.export(tmp_path / "out", format=format)
    assert done.detections > 0 and not done.is_lazy
    deployed = DeployedModel(str(tmp_path / "out"))
    assert (deployed.info.shortest_edge, deployed.info.longest_edge) == (64, 96)
    assert deployed.info.channels == "BGR" and len(deployed.info.classes) == 3
    (found,) = deployed([{"image": image}])
    torch.testing.assert_close(found["instances"].scores, run.detect(image).scores)


def test_predict_runs_it_from_the_file_that_the_user_names(tmp_path):
    run = Run(tmp_path, RCNN)
    picture = np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype="uint8")
    wanted = run.detect(torch.from_numpy(picture).permute(2, 0, 1).float())
    run.export(tmp_path / "out")
    files = run.checkpoint, str(tmp_path / "out" / "model.pth")
    for weights, file in zip((str(run.folder), str(tmp_path / "out")), files):
        found = load_detector(weights, config_file=run.config, device="cpu").detect(picture)
        assert torch.equal(found.scores, wanted.scores) and len(found) > 0
        with pytest.raises(ConfigError, match="a LazyConfig, .* by --config-file FILE.py"):
            load_detector(weights)
        with pytest.raises(ConfigError, match="a LazyConfig, .* by --config-file FILE.py"):
            export_student(file, str(tmp_path / "new"))
    opts = ["+model.roi_heads.box_predictor.test_topk_per_image=7"]
    fewer = load_detector(str(run.folder), config_file=run.config, opts=opts, device="cpu")
    assert len(fewer.detect(picture)) == 7


def test_the_script_says_how_to_look_at_what_the_student_finds(tmp_path, capsys):
    override = "+model.roi_heads.box_predictor.test_topk_per_image=7"
    run, out = Run(tmp_path, RCNN, override), tmp_path / "out"
    main = runpy.run_path(str(TOOLS / "export_student.py"))["main"]
    options = ["--config-file", run.config, "--overrides", override]
    assert main([run.checkpoint, str(out), *options]) == 0
    told = shlex.split(capsys.readouterr().out.split("finds: python tools/predict.py")[1])
    assert told == [str(out), "PHOTOS", *options[:2], "--opts", override]
    Image.fromarray(np.zeros((64, 96, 3), dtype="uint8")).save(tmp_path / "photo.png")
    told[1] = str(tmp_path / "photo.png")
    predict = runpy.run_path(str(TOOLS / "predict.py"))
    predict["main"](predict["parse"]([*told, "--output", str(tmp_path / "pictures")]))
    assert (tmp_path / "pictures" / "photo.png").is_file()


def test_an_override_fills_in_what_a_file_leaves_open(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("model = dict(channels='???', classes=3)\n")
    config = load_lazy_config(str(path), ["model.channels=4"], key="test")
    assert config.model == {"channels": 4, "classes": 3}
    with pytest.raises(ConfigError, match="there is no model.size"):
        load_lazy_config(str(path), ["model.size=4"], key="test")


def test_overrides_of_the_training_are_asked_for(tmp_path):
    override = "model.pixel_mean=[1.0,2.0,3.0]"  # the weights fit without it
    run = Run(tmp_path, RCNN, override)
    with pytest.raises(
        ConfigError, match=r"model.pixel_mean.0 is 103.53, but the run had 1.0 .*--o"
    ):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="but the run had 1.0"):
        load_detector(str(run.folder), config_file=run.config, device="cpu")
    with pytest.raises(ConfigError, match="but the run had 1.0"):
        other = (
            "model.roi_heads.box_predictor.test_score_thresh=0.5"  # doesn't switch the check off
        )
        load_detector(str(run.folder), config_file=run.config, opts=[other], device="cpu")
    load_detector(str(run.folder), config_file=run.config, opts=[override], device="cpu")
    assert run.export(tmp_path / "out", overrides=[override]).detections > 0
    os.remove(run.folder / "config.yaml")  # nothing to compare with
    assert run.export(tmp_path / "other").detections > 0


@pytest.mark.parametrize(
    "override, key",
    [
        ("dataloader.test.mapper.image_format=RGB", "dataloader.test.mapper.image_format"),
        ("dataloader.test.mapper.augmentations.0.max_size=80", "augmentations.0.max_size"),
    ],
)
def test_overrides_of_the_images_are_asked_for_too(override, key, tmp_path):
    run = Run(tmp_path, RCNN, override)
    with pytest.raises(ConfigError, match=f"{key} is .*, but the run had .*--overrides"):
        run.export(tmp_path / "out")


@pytest.mark.parametrize(
    "text, message",
    [
        (RCNN.replace("[resize]", "[resize, resize]"), "augmentations is not one ResizeShortest"),
        (RCNN.replace("[64]", "[64, 80]"), "augmentations is not one ResizeShortestEdge of one"),
        (RCNN.replace("dataloader =", "unused ="), "dataloader.test.mapper.augmentations is not"),
        (FCOS_CONFIG.replace('input_format="RGB", ', ""), "channel order of the images"),
        (RCNN.replace("num_classes = 3", "num_classes = 4"), "doesn't fit the model of its conf"),
        ("model = 3", "defines no `model`"),
    ],
)
def test_a_file_that_does_not_tell_enough_is_one_error(text, message, tmp_path):
    run = Run(tmp_path, RCNN)
    os.remove(run.folder / "config.yaml")
    Path(run.config).write_text(text)
    with pytest.raises(ValueError, match=message):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_below_one_of_this_package_is_refused(tmp_path):
    own = "class Own(CrossKDRCNN):\n    pass\n\nmodel._target_ = Own\nstages ="
    run = Run(tmp_path, RCNN.replace("stages =", own, 1))
    with pytest.raises(ConfigError, match="without stock counterpart: Own|can't be written as YA"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overrides_are_for_a_lazyconfig(tmp_path):
    with pytest.raises(ConfigError, match="--overrides are for a LazyConfig"):
        export_student(Run(tmp_path, RCNN).checkpoint, str(tmp_path / "out"), overrides=["a=1"])


def test_the_checkpoints_ap_can_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("crosskd_ifc.weights.evaluating.dataset_records", few_records)
    text = RCNN.replace("num_classes = 3", "num_classes = 8")
    run = Run(tmp_path, text)
    found = evaluate_checkpoint(run.checkpoint, "crosskd_shapes_test", run.config)
    assert 0 <= found["bbox"]["AP"] < 5


def test_what_was_exported_is_exported_and_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr("crosskd_ifc.weights.evaluating.dataset_records", few_records)
    run = Run(tmp_path, RCNN.replace("num_classes = 3", "num_classes = 8"))
    done = run.export(tmp_path / "out")
    options = dict(config_file=run.config, format="torchscript")
    again = export_student(done.weights, str(tmp_path / "again"), **options)
    assert again.detections > 0
    found, wanted = (
        evaluate_checkpoint(weights, "crosskd_shapes_test", run.config)["bbox"]["AP"]
        for weights in (done.weights, run.checkpoint)
    )
    assert found == wanted


def few_records(name):
    from detectron2.data import DatasetCatalog

    return DatasetCatalog.get(name)[:4]


def test_of_a_cascade_the_last_stages_threshold_is_told(tmp_path):
    (tmp_path / "c.py").write_text(
        "from detectron2 import model_zoo\n"
        "model = model_zoo.get_config('common/models/cascade_rcnn.py').model\n"
        "for p, t in zip(model.roi_heads.box_predictors, (0.1, 0.2, 0.3)):\n"
        "    p.test_score_thresh = t\n"
        "mapper = dict(augmentations=[], image_format='BGR')\n"
        "dataloader = dict(test=dict(mapper=mapper))\n"
    )
    found = build_lazy_student(str(tmp_path / "c.py"))
    assert found.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.3


def test_the_padding_is_the_models_own_mean(tmp_path):
    (tmp_path / "c.py").write_text(RCNN)
    found = build_lazy_student(str(tmp_path / "c.py"), ["model.pixel_mean=[1.0,2.0,3.0]"])
    assert found.cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
