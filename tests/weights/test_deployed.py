"""One file of a student finds what the student finds, in its own runtime."""

import json
import os
import runpy
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, Instances
from helpers import tiny_cfg, tiny_model
from PIL import Image
from test_dense import dense_cfg, telling
from test_export import write_run

from crosskd_ifc import ConfigError
from crosskd_ifc.weights import export, graphs, held_config
from crosskd_ifc.weights.deployed import DeployedModel, difference
from crosskd_ifc.weights.export import export_student
from crosskd_ifc.weights.held_config import classes_of
from crosskd_ifc.weights.student import load_student

ROOT = Path(__file__).resolve().parents[2]
MASK = (
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
)
KEYPOINT = (
    *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)),
)
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
CASCADE += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
DENSE = ("RetinaNet", "FCOS")
KINDS = {
    "Faster R-CNN": lambda: tiny_cfg(),
    "Mask R-CNN": lambda: tiny_cfg(*MASK),
    "Keypoint R-CNN": lambda: tiny_cfg(*KEYPOINT),
    "Cascade R-CNN": lambda: tiny_cfg(*CASCADE, architecture="GeneralizedRCNN"),
    **{kind: lambda kind=kind: dense_cfg(kind) for kind in DENSE},
}
THRESHOLD = "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
SIZES = [(64, 64), (96, 70), (50, 120)]


def make(kind, folder, *opts):
    """(checkpoint, the student in evaluation mode)."""
    cfg = KINDS[kind]()
    # Group norm refuses a level of one pixel with one channel in each group.
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 130, "INPUT.MAX_SIZE_TEST", 200, *opts])
    if kind in DENSE:
        model = telling(build_model(cfg), 1)
    elif kind == "Cascade R-CNN":
        torch.manual_seed(1)
        model = build_model(cfg)
    else:
        model = tiny_model(cfg, seed=1)
    return write_run(folder, model, cfg), model.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Paths of pictures of several sizes."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    paths = [str(folder / f"{i}.png") for i in range(len(SIZES))]
    for path, size in zip(paths, SIZES):
        Image.fromarray(random.randint(0, 256, (*size, 3), dtype="uint8")).save(path)
    return paths


RARE = [pytest.param("onnx", kind, marks=pytest.mark.slow) for kind in KINDS if kind[0] in "CK"]


@pytest.mark.parametrize(
    "format, kind",
    [
        *(("torchscript", kind) for kind in KINDS),
        *(("onnx", kind) for kind in KINDS if kind[0] not in "CK"),
        *RARE,
    ],
)
def test_a_file_finds_what_the_student_finds_at_any_size(kind, format, tmp_path, images):
    run, student = make(kind, tmp_path / "run")
    done = export_student(run, str(tmp_path / "out"), format=format, images=images)
    name = {"torchscript": "model.ts", "onnx": "model.onnx"}[format]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["model.json", name])
    assert done.detections > 50 and done.architecture[1] == format

    image = torch.rand((3, 75, 135), generator=torch.Generator().manual_seed(1)) * 255
    if format == "onnx":
        session = onnxruntime.InferenceSession(done.weights)
        found = session.run(["boxes", "scores", "classes"], {"image": image.numpy()})
        boxes, scores, classes = map(torch.from_numpy, found)
    else:
        boxes, scores, classes = torch.jit.load(done.weights)(image)[:3]
    found = Instances((75, 135), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    found.pred_boxes.clip((75, 135))
    found = found[found.pred_boxes.nonempty()]
    with torch.no_grad():
        wanted = student([{"image": image}])[0]["instances"]
    assert len(wanted) > 10
    for field in ("pred_masks", "pred_keypoints", "pred_keypoint_heatmaps"):
        if wanted.has(field):
            wanted.remove(field)
    assert difference(found, wanted) == ""

    # As a detectron2 model, with all that postprocessing adds, in another size.
    inputs = [{"image": image, "height": 150, "width": 303}] * 2
    deployed = DeployedModel(str(tmp_path / "out"))
    with torch.no_grad():
        for found, wanted in zip(deployed(inputs), student(inputs)):
            found, wanted = found["instances"], wanted["instances"]
            assert set(found.get_fields()) == set(wanted.get_fields())
            assert found.image_size == (150, 303) and difference(found, wanted) == ""
            if wanted.has("pred_keypoints"):  # but for ties
                assert (found.pred_keypoints - wanted.pred_keypoints).abs().median() < 0.1


def test_a_file_says_what_goes_in_and_comes_out(tmp_path, images):
    run, _ = make("Mask R-CNN", tmp_path / "run", "DATASETS.TRAIN", ("crosskd_shapes_train",))
    done = export_student(run, str(tmp_path / "out"), format="torchscript", images=images)
    info = json.loads(Path(done.config).read_text())
    assert info["outputs"] == ["boxes", "scores", "classes", "masks"]
    assert info["channels"] == "BGR" and info["file"] == "model.ts"
    assert (info["size"], info["shortest_edge"], info["longest_edge"]) == (None, 130, 200)
    assert info["classes"] == ["0", "1", "2"]  # the data set has eight: not the student's


def test_a_file_has_the_class_names_of_an_unregistered_card_or_of_its_weights(tmp_path):
    splits = "{train: {json: gone.json, images: .}}"
    card = f"{{name: exported, format: coco, root: ., splits: {splits}, classes: [a, ß, c]}}"
    (tmp_path / "card.yaml").write_text(card)
    data = ("DATASETS.CARDS", (str(tmp_path / "card.yaml"),), "DATASETS.TRAIN", ("exported_train",))
    assert classes_of({}, tiny_cfg(*data), "weights") == ["a", "ß", "c"]
    held = {"config": {"classes": ["a", "d", "c"]}}
    assert classes_of(held, tiny_cfg(*data), "weights") == ["a", "ß", "c"]  # renamed since
    assert classes_of(held, tiny_cfg(), "weights") == ["a", "d", "c"]
    assert graphs.describe(tiny_cfg(), ("a", "d", "c"), "onnx", None).classes == ("a", "d", "c")


def test_classes_have_changed_places_only_where_a_name_is_gone_from_its_own(monkeypatch):
    def check(held, now):
        monkeypatch.setattr(held_config, "class_names", lambda *_, **__: now)
        held_config.check_class_order({"config": {"classes": held}}, tiny_cfg(), "weights")

    check(["fruit", "apple", "fruit"], ["fruit", "apple", "fruit"])
    check(["cat", "dog"], ["Cat", "dog"])
    check(["cat", "dog"], None)
    for now in (["dog", "zebra"], ["a", "cat", "dog"]):
        with pytest.raises(ConfigError, match="^weights: class '(dog|cat)' had the index"):
            check(["cat", "dog"], now)


@pytest.mark.parametrize("kind", ["Faster R-CNN", "Mask R-CNN", "FCOS"])
def test_a_fixed_size_pads_what_is_smaller_with_the_mean(kind, tmp_path, images):
    run, student = make(kind, tmp_path / "run")
    options = dict(format="onnx", images=images, size=(64, 160))
    done = export_student(run, str(tmp_path / "out"), **options)
    session = onnxruntime.InferenceSession(done.weights)
    assert session.get_inputs()[0].shape == [3, 64, 160]
    deployed = DeployedModel(str(tmp_path / "out"))
    image = deployed.info.mapper()({"file_name": images[1]})["image"]
    assert image.shape == (3, 64, 47)  # of 96 x 70
    found = deployed([{"image": image}])[0]["instances"]
    padded = student.pixel_mean.repeat(1, 64, 160)
    padded[:, :, :47] = image
    with torch.no_grad():
        wanted = student([{"image": padded}])[0]["instances"]
    reach_out = (wanted.pred_boxes.tensor[:, 2] > 47).sum()
    assert reach_out > 3
    wanted.pred_boxes.clip((64, 47))
    wanted = wanted[wanted.pred_boxes.nonempty()]
    if wanted.has("pred_masks"):
        wanted.pred_masks = wanted.pred_masks[:, :, :47]
    assert len(wanted) > 10 and difference(found, wanted) == ""
    with pytest.raises(ValueError, match="65 x 20 pixels is larger than"):
        deployed([{"image": torch.zeros(3, 65, 20)}])


def test_an_image_without_detections_runs(tmp_path):
    run, student = make("Mask R-CNN", tmp_path / "run")
    plain = [torch.full((3, 130, 130), grey) for grey in (0, 128, 255)]
    with torch.no_grad():
        best = [student([{"image": x}])[0]["instances"].scores.max().item() for x in plain]
    run, _ = make("Mask R-CNN", tmp_path / "run", THRESHOLD, (min(best) + max(best)) / 2)
    some, none = plain[np.argmax(best)], plain[np.argmin(best)]
    Image.fromarray(some.permute(1, 2, 0).numpy().astype("uint8")).save(tmp_path / "some.png")
    for format in ("torchscript", "onnx"):
        out = str(tmp_path / format)
        export_student(run, out, format=format, images=[str(tmp_path / "some.png")])
        found = DeployedModel(out)([{"image": none, "height": 80, "width": 80}])
        assert found[0]["instances"].pred_masks.shape == (0, 80, 80)


def test_a_file_that_finds_something_else_does_not_appear(tmp_path, images, monkeypatch):
    run, student = make("Faster R-CNN", tmp_path / "run")

    def write_another(detector, *args):
        detector.roi_heads.box_predictor.bbox_pred.bias.data += 0.01
        graphs.write_graph(detector, *args)
        detector.roi_heads.box_predictor.bbox_pred.bias.data -= 0.01

    monkeypatch.setattr(export, "write_graph", write_another)
    with pytest.raises(ValueError, match="differ from the student's .*another box.*nothing was"):
        export_student(run, str(tmp_path / "out"), format="torchscript", images=images)
    assert os.listdir(tmp_path) == ["run"]


def test_a_file_that_cannot_run_on_another_size_is_one_error(tmp_path, images, monkeypatch):
    run, _ = make("Faster R-CNN", tmp_path / "run")

    def fail(self, inputs):
        raise RuntimeError("shape '[1, 64, 8, 2, 8, 2]' is invalid for input of size 12288")

    monkeypatch.setattr(DeployedModel, "__call__", fail)
    message = (
        r"can't run on an image of \(130, 130\) pixels.*--size.*\[1, 64, 8.*othing was written"
    )
    with pytest.raises(ValueError, match=message):
        export_student(run, str(tmp_path / "out"), format="torchscript", images=images)
    assert os.listdir(tmp_path) == ["run"]


def test_a_comparison_without_detections_is_none(tmp_path, images):
    run, _ = make("Faster R-CNN", tmp_path / "run", THRESHOLD, 1.1)
    with pytest.raises(ValueError, match="detects nothing in the 4 images .*--images"):
        export_student(run, str(tmp_path / "out"), format="torchscript", images=images)
    assert os.listdir(tmp_path) == ["run"]


def test_without_images_those_of_the_test_set_are_compared(tmp_path):
    run, _ = make("Faster R-CNN", tmp_path / "run", "DATASETS.TEST", ("not_registered",))
    with pytest.raises(ConfigError, match="--images; .*not_registered"):
        export_student(run, str(tmp_path / "out"), format="torchscript")
    assert os.listdir(tmp_path) == ["run"]


def test_a_missing_runtime_is_one_error_before_anything_is_written(tmp_path, images, monkeypatch):
    run, _ = make("Faster R-CNN", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="--format onnx needs onnxruntime; .*extra 'deploy'"):
        export_student(run, str(tmp_path / "out"), format="onnx", images=images)
    assert os.listdir(tmp_path) == ["run"]


def instances(boxes, scores, classes):
    boxes = Boxes(torch.tensor(boxes, dtype=torch.float))
    fields = dict(scores=torch.tensor(scores), pred_classes=torch.tensor(classes))
    return Instances((9, 9), pred_boxes=boxes, **fields)


def test_detections_are_compared_in_any_order_and_within_tolerances():
    wanted = instances([[0, 0, 4, 4], [1, 1, 5, 5]], [0.9, 0.89995], [0, 1])
    assert difference(wanted[[1, 0]], wanted) == ""
    assert difference(wanted[[0]], wanted) == "1 detections instead of 2"
    for boxes, scores, classes in (
        ([[0, 0, 4, 4.02], [1, 1, 5, 5]], [0.9, 0.89995], [0, 1]),
        ([[0, 0, 4, 4], [1, 1, 5, 5]], [0.9, 0.8997], [0, 1]),
        ([[0, 0, 4, 4], [1, 1, 5, 5]], [0.9, 0.89995], [0, 0]),
        ([[0, 0, 4, 4], [0, 0, 4, 4]], [0.9, 0.89995], [0, 0]),
    ):
        assert "of 2 have another box" in difference(instances(boxes, scores, classes), wanted)
    found, wanted = wanted[:], wanted[:]
    found.pred_masks, wanted.pred_masks = torch.zeros(2, 2, 9, 9, dtype=torch.bool)
    assert difference(found, wanted) == ""
    found.pred_masks[1, 3, 3] = True
    assert "a mask differs in 1.23%" in difference(found, wanted)


@pytest.mark.parametrize("kind", ["Keypoint R-CNN", "Cascade R-CNN", "RetinaNet"])
def test_a_kind_is_exported_for_stock_detectron2(kind, tmp_path):
    run, _ = make(kind, tmp_path / "run")
    done = export_student(run, str(tmp_path / "out"))
    stock = "RetinaNet" if kind == "RetinaNet" else "GeneralizedRCNN"
    assert done.detections > 10 and done.architecture[1] == stock


def test_an_fcos_is_written_for_stock_detectron2_with_a_lazyconfig(tmp_path):
    run, student = make("FCOS", tmp_path / "run")
    done = export_student(run, str(tmp_path / "out"))
    assert done.architecture == ("CrossKDFCOS", "FCOS") and done.detections > 50
    cfg = LazyConfig.load(done.config)
    assert "crosskd" not in Path(done.config).read_text().split("\n", 2)[2].lower()
    model = instantiate(cfg.model).eval()
    assert type(model) is fcos.FCOS and cfg.train.init_checkpoint == done.weights
    assert cfg.input == {"format": "BGR", "min_size": 130, "max_size": 200}
    model.load_state_dict(torch.load(done.weights)["model"])
    for name, value in vars(student).items():
        if isinstance(value, (int, float, list)) and not name.startswith("_"):
            assert getattr(model, name) == value, name
    with torch.no_grad():
        found, wanted = (
            m([{"image": torch.ones(3, 140, 70)}])[0]["instances"] for m in (model, student)
        )
    assert torch.equal(found.scores, wanted.scores) and len(found) > 10


def test_an_fcos_of_other_parts_is_refused(tmp_path, monkeypatch):
    run, _ = make("FCOS", tmp_path / "run")
    monkeypatch.setattr("crosskd_ifc.weights.stock.ResNet", object)
    with pytest.raises(ConfigError, match="MODEL.BACKBONE.NAME .* makes FPN, ResNet"):
        export_student(run, str(tmp_path / "out"))


def test_in_int8_convolutions_are_quantized_and_most_is_found(tmp_path, images):
    run, student = make("Faster R-CNN", tmp_path / "run", "DATASETS.TRAIN", ("not_registered",))
    options = dict(format="onnx", images=images, int8=True)
    with pytest.raises(ConfigError, match="--calibrate; .*DATASETS.TRAIN.*not_registered"):
        export_student(run, str(tmp_path / "out"), **options)
    assert os.listdir(tmp_path) == ["run"]
    done = export_student(run, str(tmp_path / "out"), **options, calibrate=images)
    assert sorted(os.listdir(tmp_path / "out")) == ["model.json", "model.onnx"]
    assert json.loads(Path(done.config).read_text())["precision"] == "int8"
    nodes = onnx.load(done.weights).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    for kind in ("Conv", "Gemm"):
        inputs = [made_by.get(node.input[0]) for node in nodes if node.op_type == kind]
        assert set(inputs) == {"DequantizeLinear"}
    image = [{"image": torch.from_numpy(np.array(Image.open(images[0]))).permute(2, 0, 1)}]
    with torch.no_grad():
        found, wanted = (
            m(image)[0]["instances"] for m in (DeployedModel(str(tmp_path / "out")), student)
        )
    assert abs(found.scores[:10].mean() - wanted.scores[:10].mean()) < 0.05
    for wrong in ({"format": "torchscript", "int8": True}, {"calibrate": ["x"]}):
        with pytest.raises(ValueError, match="--int8 is for --format onnx"):
            export_student(run, str(tmp_path / "again"), **wrong)


def test_another_kind_of_model_and_a_size_of_nothing_are_refused(tmp_path, images):
    cfg = tiny_cfg("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    run = write_run(tmp_path / "run", build_model(cfg), cfg)
    options = dict(format="torchscript", images=images)
    with pytest.raises(ConfigError, match="META_ARCHITECTURE ProposalNetwork can't be exported as"):
        export_student(run, str(tmp_path / "out"), **options)
    with pytest.raises(ValueError, match="--size is 0 x 9"):
        export_student(run, str(tmp_path / "out"), **options, size=(0, 9))
    assert os.listdir(tmp_path) == ["run"]


def test_options_of_other_formats_are_refused(tmp_path):
    for options in ({"images": ["x"]}, {"size": (4, 4)}, {"format": "onnx", "safetensors": True}):
        with pytest.raises(ValueError, match="for --format"):
            export_student("gone.pth", str(tmp_path / "out"), **options)


def test_the_script_tells_how_to_use_each_format(tmp_path, images, capsys, monkeypatch):
    main = runpy.run_path(str(ROOT / "tools" / "export_student.py"))["main"]
    run, _ = make("FCOS", tmp_path / "run")
    assert main([run, str(tmp_path / "lazy")]) == 0
    printed = capsys.readouterr().out
    code = printed.split("installed:")[1].split("Or look")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 140)).save("photo.jpg")
    scope = {}
    exec(textwrap.dedent(code), scope)
    assert scope["detections"].has("pred_boxes") and scope["detections"].image_size == (140, 64)
    options = ["--format", "onnx", "--images", *images, "--size", "64", "160"]
    assert main([run, str(tmp_path / "onnx"), *options]) == 0
    printed = capsys.readouterr().out
    assert "model.onnx: " in printed and "docs/deploy.md" in printed


def test_an_image_is_resized_to_the_shortest_edge_but_not_beyond_the_longest(tmp_path, images):
    found = load_student(make("Faster R-CNN", tmp_path / "run")[0])  # 130, at most 200
    for mapper in (found.mapper(), graphs.describe(found.cfg, None, "onnx", None).mapper()):
        sizes = [tuple(mapper({"file_name": x})["image"].shape[1:]) for x in images]
        assert sizes == [(130, 130), (178, 130), (83, 200)]
