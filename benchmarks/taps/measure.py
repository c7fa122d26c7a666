#!/usr/bin/env python
"""What each tap of a trained student is worth alone: AP of what the teacher's head detects in it.

Give the folders of finished runs with a fusion of several taps, or with one; for each: the AP of
the student's own detections, of the cross-head's as trained and, for several taps, of the
cross-head's on each of them alone. All on the first data set in DATASETS.TEST.

    python tools/compare.py benchmarks/protocols/shapes_faster_rcnn.yaml --seeds 3 4 5
    r=output/compare/shapes_faster_rcnn
    python benchmarks/taps/measure.py $r/crosskd_[345] $r/fc2_[345] $r/crosskd_ifc_[345] \
        $r/weighted_[345] $r/sum_[34] $r/through_[34] $r/through_pool_fc1_fc2_[34] \
        > benchmarks/taps/shapes_faster_rcnn.json
"""

import contextlib
import json
import os
import sys
import tempfile

import torch
from detectron2.config import get_cfg
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from crosskd_ifc import CrossKDTrainer, add_crosskd_ifc_config, attach_teacher
from crosskd_ifc.weights.reading import StrictReader

FUSION = "MODEL.CROSSKD.FUSION."


class CrossHead(torch.nn.Module):
    """A student as its teacher's head reads it."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, batched_inputs):
        return self.student.cross_head_inference(batched_inputs)


def load(folder, *opts):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.merge_from_file(os.path.join(folder, "config.yaml"))
    cfg.merge_from_list(list(opts))
    student = build_model(cfg)
    attach_teacher(student, cfg)  # first, since a fusion may have learned weights
    StrictReader(student).load(os.path.join(folder, "model_final.pth"))
    return cfg, student.eval()


def score(cfg, model):
    name = cfg.DATASETS.TEST[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        loader = CrossKDTrainer.build_test_loader(cfg, name)
        evaluator = CrossKDTrainer.build_evaluator(cfg, name, folder)
        return round(inference_on_dataset(model, loader, evaluator)["bbox"]["AP"], 2)


def measure(folder):
    cfg, student = load(folder)
    found = {"run": os.path.basename(os.path.normpath(folder)), "own": score(cfg, student)}
    found["cross_head"] = score(cfg, CrossHead(student))
    taps = cfg.MODEL.CROSSKD.FUSION.IN_FEATURES
    if cfg.MODEL.CROSSKD.FUSION.NAME == "weighted":
        weights = student.fusion.combine.scores.softmax(dim=0).tolist()
        found["weights"] = {tap: round(weight, 3) for tap, weight in zip(taps, weights)}
    for tap in taps if len(taps) > 1 else ():
        alone = load(folder, FUSION + "NAME", "none", FUSION + "IN_FEATURES", (tap,))
        found[f"cross_head_{tap}"] = score(alone[0], CrossHead(alone[1]))
    return found


if __name__ == "__main__":
    note = (
        "AP on the test images: own, of the student's own detections; cross_head, of what its "
        "teacher's head detects in its features, as trained; cross_head_TAP, in that tap alone; "
        "weights: what the fusion has learned."
    )
    found = {"script": "benchmarks/taps/measure.py", "note": note}
    print(json.dumps({**found, "runs": [measure(folder) for folder in sys.argv[1:]]}, indent=1))
