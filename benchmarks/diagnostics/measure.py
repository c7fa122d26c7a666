#!/usr/bin/env python
"""What a step with gradient diagnostics costs beside one without, interleaved in one run.

OMP_NUM_THREADS=2 python benchmarks/diagnostics/measure.py > benchmarks/diagnostics/cost.json
"""

import json
import platform
import statistics
import time

import detectron2
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from crosskd_ifc import add_crosskd_ifc_config, attach_teacher
from crosskd_ifc.common.config_files import find_config, merge_from_file

STEPS = 15
CASES = {
    "fc1 + fc2": ("mean", ("fc1", "fc2"), ""),
    "pool": ("none", ("pool",), "pool"),
}


def load(name, *opts):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    merge_from_file(cfg, find_config(name, key="config")[0], key="config")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
    return cfg


def images(count=2, size=(320, 480), classes=80, boxes=8):
    batch = []
    for _ in range(count):
        x = Instances(size)
        corner = torch.rand(boxes, 2) * 200
        x.gt_boxes = Boxes(torch.cat([corner, corner + 20 + torch.rand(boxes, 2) * 90], dim=1))
        x.gt_classes = torch.randint(classes, (boxes,))
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        batch.append({"image": image, "instances": x, "height": size[0], "width": size[1]})
    return batch


def measure(name, taps, entry):
    torch.manual_seed(0)
    prefix = "MODEL.CROSSKD.FUSION."
    cfg = load(
        "COCO-Detection/crosskd_ifc_R_18_FPN_1x.yaml",
        *(prefix + "NAME", name, prefix + "IN_FEATURES", taps, prefix + "ENTRY", entry),
        *("MODEL.CROSSKD.DIAGNOSTICS.GRAD_PERIOD", 1),
    )
    student = build_model(cfg).train()
    teacher = build_model(load("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    attach_teacher(student, cfg, teacher=teacher)
    diagnose, batch = student.distiller.diagnose, images()
    seconds = {"plain": [], "diagnosed": []}
    for i in range(2 * (STEPS + 2)):
        kind = ("plain", "diagnosed")[i % 2]
        student.distiller.diagnose = diagnose if kind == "diagnosed" else lambda losses: None
        torch.manual_seed(i // 2)
        start = time.perf_counter()
        with EventStorage():
            sum(student(batch).values()).backward()
        student.zero_grad()
        if i >= 4:
            seconds[kind].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds.values())]
    return {
        "taps": list(taps),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "steps": STEPS,
    }


def main():
    print(
        json.dumps(
            {
                "command": "OMP_NUM_THREADS=2 python benchmarks/diagnostics/measure.py",
                "note": "Seconds of a step with diagnostics over one without: R18 <- R50-FPN, 80 "
                "classes, 2 images of 320x480, 512 RoIs each, random weights, interleaved.",
                "versions": {
                    "detectron2": detectron2.__version__,
                    "torch": torch.__version__.split("+")[0],
                    "python": platform.python_version(),
                },
                "hardware": f"{torch.get_num_threads()} CPU threads",
                "cases": {case: measure(*CASES[case]) for case in CASES},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
