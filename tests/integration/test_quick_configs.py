"""Every config of configs/quick trains and evaluates, on a few pictures.

That all of them load, build and fit their teachers is in training/test_trainer.py.
"""

import glob
import json
import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import load_tool

from crosskd_ifc.data.shapes import generate, register_coarse_shapes
from crosskd_ifc.experiments.runs import Run

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
QUICK = os.path.join(ROOT, "configs", "quick")
# One of each kind; the others only repeat them, and their parts have tests of their own.
QUICK_TO_TEST = (
    *("crosskd_ifc_R_18", "crosskd_ifc_mask_rcnn_R_18", "crosskd_ifc_retinanet_R_18"),
    *(
        "crosskd_ifc_fcos_R_18",
        "crosskd_ifc_mobilenetv3_large",
        "options/faster_rcnn_R_34_conv_head",
    ),
    *("options/fgd_R_18", "options/gradients_R_18", "options/other_classes_R_18"),
)
SMALL = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.001)


def configs():
    files = glob.glob(os.path.join(QUICK, "**", "*.yaml"), recursive=True)
    names = sorted(os.path.relpath(f, QUICK) for f in files)
    names = [n for n in names if not os.path.basename(n).startswith("Base")]
    quick = {f"{name}_shapes.yaml" for name in QUICK_TO_TEST}
    assert quick <= set(names)
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder with four generated pictures for each split."""
    root = str(tmp_path_factory.mktemp("pictures") / "shapes")
    sizes = {"train": 4, "val": 2, "test": 2}
    generate(root, num_images=sizes)
    return root, sizes


@pytest.fixture
def few_pictures(pictures, built_in_at):
    """The built-in data sets, with only these pictures."""
    built_in_at(*pictures)
    register_coarse_shapes()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Teacher config -> file of its (random) weights, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}

    def weights(config):
        if config not in made:
            name = os.path.basename(config).replace(".yaml", "")
            torch.manual_seed(0)
            model = build_model(Run("", config, "").cfg())
            DetectionCheckpointer(model, str(folder)).save(name)
            made[config] = str(folder / f"{name}.pth")
        return made[config]

    return weights


@pytest.mark.parametrize("config", configs())
def test_a_quick_config_trains_and_evaluates(config, few_pictures, teachers, tmp_path):
    path = os.path.join("quick", config)
    cfg = Run("", path, "").cfg()
    opts = [*SMALL, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 1]
    opts += ["OUTPUT_DIR", tmp_path / "run", "TEST.EVAL_PERIOD", 0]
    teacher = cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE
    if teacher:
        opts += ["MODEL.CROSSKD.TEACHER.WEIGHTS", teachers(teacher)]
    if cfg.MODEL.CROSSKD.DIAGNOSTICS.GRAD_PERIOD:
        opts += ["MODEL.CROSSKD.DIAGNOSTICS.GRAD_PERIOD", 1]
    arguments = ["--config-file", path, *map(str, opts)]
    load_tool("train_net").main(default_argument_parser().parse_args(arguments))
    first, last = (
        torch.load(tmp_path / "run" / f"model_{name}.pth", weights_only=True)
        for name in ("0000000", "final")
    )
    assert last["iteration"] == 1 and last["model"].keys() == first["model"].keys()
    for name, value in last["model"].items():
        assert torch.isfinite(value).all(), name
    # What the distillation learns is in the checkpoint, and moves.
    learned = [n for n in last["model"] if n.startswith("fusion.")]
    for name in learned:
        # FGD's blocks start with a last layer of zeros, which holds back what is behind it.
        is_behind = "_context." in name and ".transform.3." not in name
        assert is_behind or not torch.equal(first["model"][name], last["model"][name]), name
    with open(tmp_path / "run" / "metrics.json") as f:
        lines = [json.loads(line) for line in f]
    assert max(line["iteration"] for line in lines if "total_loss" in line) >= 1
    evaluated = {key.split("/")[0] for line in lines for key in line if key.endswith("/AP")}
    assert evaluated == ({"bbox", "segm"} if cfg.MODEL.MASK_ON else {"bbox"})
    distilled = {key for line in lines for key in line if key.endswith("_kd")}
    assert distilled == expected_losses(cfg)
    if cfg.MODEL.CROSSKD.DIAGNOSTICS.GRAD_PERIOD:
        assert any("crosskd/grad_cosine_pyramid" in line for line in lines)


def expected_losses(cfg):
    kd = cfg.MODEL.CROSSKD
    if not kd.TEACHER.CONFIG_FILE:
        return set()
    is_cascade = "Cascade" in cfg.MODEL.ROI_HEADS.NAME
    stages = [f"_stage{k}" for k in range(3)] if is_cascade else [""]
    wanted = {f"loss_{x}{stage}_kd": True for x in ("cls", "box_reg") for stage in stages}
    wanted["loss_mask_kd"] = cfg.MODEL.MASK_ON and kd.LOSS.MASK_WEIGHT > 0
    wanted["loss_feature_kd"] = kd.LOSS.FEATURE_WEIGHT > 0
    wanted["loss_rpn_kd"] = kd.LOSS.RPN_WEIGHT > 0
    return {key for key, is_wanted in wanted.items() if is_wanted}
