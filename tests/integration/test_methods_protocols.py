"""The arms of the protocols that compare methods: each builds, distils and learns for two steps."""

import os

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import tiny_batch

from crosskd_ifc import attach_teacher
from crosskd_ifc.config import distillation_requested
from crosskd_ifc.experiments.protocol import load_protocol
from crosskd_ifc.modeling.attach import load_teacher_config

PROTOCOLS = os.path.join(os.path.dirname(__file__), "..", "..", "benchmarks", "protocols")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["methods", "methods_retinanet", "methods_bccd"])
def test_every_arm_trains(name):
    protocol = load_protocol(os.path.join(PROTOCOLS, f"{name}.yaml"))
    teachers = {}
    for arm in protocol.arms.values():
        if arm.group:
            continue  # other weights
        cfg = protocol.run(arm.name, arm.seeds[0], "x").cfg()
        student = build_model(cfg).train()
        if distillation_requested(cfg):
            theirs = load_teacher_config(cfg)[0]
            key = cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE
            teachers[key] = teachers.get(key) or build_model(theirs)
            attach_teacher(student, cfg, teacher=teachers[key])
            student.inherit_weights()
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
        before = [p.detach().clone() for p in student.parameters()]
        for step in range(2):
            with EventStorage(step):
                losses = student(tiny_batch())
            assert torch.isfinite(sum(losses.values())), arm.name
            kd = {key: float(v) for key, v in losses.items() if key.endswith("_kd")}
            assert bool(kd) == distillation_requested(cfg) and any(kd.values()) == bool(
                kd
            ), arm.name
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        moved = [not torch.equal(p, b) for p, b in zip(student.parameters(), before)]
        assert sum(moved) > len(moved) / 2, arm.name
