"""The demo: four runs of a protocol, one table, a picture and curves."""

import json
import os

import pytest
import torch
from detectron2.modeling import build_model
from helpers import load_tool

from crosskd_ifc.data.cards import register_cards
from crosskd_ifc.experiments.protocol import load_protocol

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
ARMS = ("teacher", "student", "crosskd", "crosskd_ifc")


# Stands for tools/train_net.py: leaves what a finished run leaves, with the weights of its config.
SCRIPT = """
import json, os, shutil, sys
config = sys.argv[sys.argv.index("--config-file") + 1]
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
weights = os.path.basename(config).replace(".yaml", ".pth")
shutil.copy(weights, os.path.join(folder, "model_final.pth"))
with open(os.path.join(folder, "metrics.json"), "w") as f:
    for iteration, ap in ((0, 1.0), (2, 3.0)):
        line = {"iteration": iteration, "time": 0.5, "loss_cls": 1.0, "loss_cls_kd": 2.0}
        f.write(json.dumps({**line, "bbox/AP": ap, "bbox/AP50": 2 * ap}) + "\\n")
"""


@pytest.fixture
def demo(tiny_protocol, tmp_path, monkeypatch):
    tool = load_tool("demo")
    config = {"config": "student.yaml", "opts": {"TEST.EVAL_PERIOD": 1}}
    arms = {"student": {"config": "teacher.yaml"}, "crosskd": config, "crosskd_ifc": {**config}}
    path = tiny_protocol(name="demo", seeds=[1], validation=None, arms=arms)
    protocol = load_protocol(path)
    for arm, file in (("teacher", "teacher.pth"), ("crosskd", "student.pth")):
        torch.save({"model": build_model(protocol.run(arm, 1, "x").cfg()).state_dict()}, file)
    (tmp_path / "train_net.py").write_text(SCRIPT)
    monkeypatch.setattr(tool, "TOOLS", str(tmp_path))
    register_cards(["card.yaml"])
    return lambda: tool.main(["--output", "out"], path)


def test_the_demo_makes_a_table_a_picture_and_curves_and_skips_what_is_there(demo, capsys):
    assert demo() == []
    first = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")]
    assert rows == ["run", *ARMS]
    names = ("detections.png", "features.png", "curves.png")
    assert all(f"out/{name}" in first for name in names)
    for name in names:
        assert os.path.getsize(f"out/{name}") > 5000
    with open("out/results.json") as f:
        content = json.load(f)
    assert [run["arm"] for run in content["runs"]] == list(ARMS)
    assert content["runs"][3]["curve"] == [[1, 1.0], [2, 3.0]]
    # Again: only what is missing.
    os.remove("out/crosskd_1/model_final.pth")
    assert demo() == []
    second = capsys.readouterr().out
    assert second.count(": started") == 1 and "crosskd, seed 1: started" in second


def test_the_demo_is_what_the_comparison_does_with_seed_1_but_for_its_own_default():
    folder = os.path.join(ROOT, "benchmarks", "protocols")
    demo, compared = (load_protocol(f"{folder}/{n}.yaml") for n in ("demo", "shapes_faster_rcnn"))
    assert tuple(demo.arms) == ARMS and demo.seeds == (1,)
    for arm in ("teacher", "student", "crosskd"):
        ours, theirs = (p.run(arm, 1, "x").cfg().clone() for p in (demo, compared))
        for cfg in (ours, theirs):
            cfg.defrost()
            # An evaluation leaves the random state as it was.
            cfg.TEST.EVAL_PERIOD, cfg.DATASETS.TEST, cfg.SOLVER.CHECKPOINT_PERIOD = 0, (), 0
        assert ours == theirs
