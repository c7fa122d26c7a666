#!/usr/bin/env python
"""How far the distillation losses of a teacher in low precision are from those of one in float32.

A student is trained with the float32 teacher; in each step the losses are also computed with the
teacher in low precision, on the same images, RoIs and weights. For example, after `make demo`:

    python benchmarks/precision/measure.py \
        --config-file configs/quick/options/mean_R_18_shapes.yaml \
        --output benchmarks/precision/bfloat16.json OUTPUT_DIR output/precision
"""

import argparse
import json
import os
import shlex
import statistics
import sys

import torch
from detectron2.config import get_cfg
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from crosskd_ifc import CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import find_config, merge_from_file, merge_from_list
from crosskd_ifc.common.environment import hardware, versions
from crosskd_ifc.common.random_state import same_random_state


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", required=True)
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parser.parse_args()


class Comparing(torch.nn.Module):
    """A student whose losses are also computed with the other teacher."""

    def __init__(self, student, dtype):
        super().__init__()
        self.student, self.dtype, self.differences = student, dtype, {}

    @property
    def device(self):
        return self.student.device

    def forward(self, batch):
        teacher = self.student.teacher
        state = {k: v.clone() for k, v in self.student.state_dict().items()}
        normalizer = getattr(self.student, "loss_normalizer", None)
        with same_random_state(self.device), EventStorage(), torch.no_grad():
            teacher.dtype = self.dtype
            low = self.student(batch)
            teacher.dtype = torch.float32
        self.student.load_state_dict(state)  # the norms' statistics
        if normalizer is not None:
            self.student.loss_normalizer = normalizer
        elif hasattr(self.student, "loss_normalizer"):
            del self.student.loss_normalizer
        losses = self.student(batch)
        for name, value in losses.items():
            if name.endswith("_kd"):
                relative = (low[name] - value).abs() / value.abs()
                self.differences.setdefault(name, []).append(relative.item())
            else:
                assert torch.equal(low[name], value.detach()), name  # the same RoIs
        return losses


def main():
    args = parse_args()
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    merge_from_file(cfg, find_config(args.config_file, key="--config-file")[0], key="--config-file")
    merge_from_list(cfg, args.opts, key="command line")
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    seed_all_rng(max(cfg.SEED, 0))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = CrossKDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model = Comparing(trainer.model, getattr(torch, args.precision)).train()
    trainer._trainer.model = model
    with EventStorage() as storage:
        for step in range(args.steps):
            trainer._trainer.iter = step
            trainer._trainer.run_step()
            trainer.scheduler.step()
            storage.step()
    found = {
        "command": shlex.join(["python", "benchmarks/precision/measure.py", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(cfg.MODEL.DEVICE, torch.get_num_threads()),
        "steps": args.steps,
        "relative_difference": {
            name: {
                "median": statistics.median(values),
                "95 %": statistics.quantiles(values, n=20)[-1],
                "largest": max(values),
            }
            for name, values in model.differences.items()
        },
    }
    with open(args.output, "w") as f:
        json.dump(found, f, indent=1)
    print(json.dumps(found["relative_difference"], indent=1))


if __name__ == "__main__":
    main()
