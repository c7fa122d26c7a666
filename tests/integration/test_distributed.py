"""Two processes: what the distillation learns is synchronised by DDP."""

import os
import re

import pytest
import torch
from detectron2.engine import create_ddp_model, launch
from detectron2.utils import comm
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses
from test_accumulation import BATCH, EVEN, difference, step
from test_dense import fusion, pair

from crosskd_ifc.modeling.fcos import mean_over_processes

K = "MODEL.CROSSKD."
# An adapter, a fusion with weights, and every loss; masks in their own case.
OPTIONS = (
    *(K + "FUSION.NAME", "attention", K + "FUSION.IN_FEATURES", ("pool", "fc1", "fc2")),
    *("MODEL.PROPOSAL_GENERATOR.NAME", "CrossKDRPN", K + "LOSS.RPN_WEIGHT", 1.0),
    *(K + "LOSS.FEATURE_WEIGHT", 0.01, K + "LOSS.FEATURE_TYPE", "mgd"),
    *(K + "LOSS.FEATURE_COMBINE", False),
    *(K + "DIAGNOSTICS.GRAD_PERIOD", 1),
)


def gradients(model, batch, factor):
    model.zero_grad()
    getattr(model, "module", model).kd_factor = factor
    losses, _ = train_losses(model, batch)
    sum(losses.values()).backward()
    student = getattr(model, "module", model)
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.requires_grad}


def build(kind):
    if kind == "RCNN":
        return distilling(*OPTIONS)[0]
    learned = fusion("attention", ("conv1", "conv2"))
    student, _ = pair(kind, *learned, teacher_opts=("MODEL.FPN.OUT_CHANNELS", 64))
    return student


def work(folder, kind):
    """One process: its own pictures, one of them without boxes in the second process."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    student, alone = build(kind), build(kind)
    batch = tiny_batch(seed=rank, boxes_per_image=(2, 3 * (1 - rank)))
    model = create_ddp_model(student, device_ids=None, broadcast_buffers=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    results = []
    for factor in (1.0, 0.0, 1.0):
        own = gradients(alone, batch, factor)
        shared = gradients(model, batch, factor)
        optimizer.step()
        alone.load_state_dict(student.state_dict())
        results.append((own, shared))
    state = {k: v for k, v in student.state_dict().items()}
    torch.save({"gradients": results, "state": state}, f"{folder}/{rank}.pth")
    comm.synchronize()
    os._exit(0)  # torch may abort a process as it ends; its work is saved


@pytest.fixture(scope="module", params=["RCNN", "RetinaNet", "FCOS"])
def two(tmp_path_factory, request):
    folder = str(tmp_path_factory.mktemp("ddp"))
    launch(work, 2, dist_url="auto", args=(folder, request.param))
    return [torch.load(f"{folder}/{rank}.pth") for rank in range(2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")
def test_the_gradient_is_the_mean_of_both_processes_learned_fusion_included(two):
    for (own_0, shared_0), (own_1, shared_1) in zip(two[0]["gradients"], two[1]["gradients"]):
        assert any(re.match(r"fusion\.(\w+\.)?adapters", n) for n in shared_0)
        assert any(re.match(r"fusion\.(\w+\.)?combine", n) for n in shared_0)
        for name, gradient in shared_0.items():
            torch.testing.assert_close(gradient, shared_1[name], rtol=0, atol=0)
            expected = (own_0[name] + own_1[name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    own, shared = two[0]["gradients"][0]
    learned = [n for n in own if n.endswith("combine.biases")]
    assert learned and not any(torch.equal(own[n], shared[n]) for n in learned)


@pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")
def test_both_processes_end_with_the_same_weights(two):
    for name, value in two[0]["state"].items():
        assert torch.equal(value, two[1]["state"][name]), name


def accumulate():
    """(name -> gradient) of a step in two parts; each process has two of four images."""
    model = tiny_model(tiny_cfg(*EVEN, architecture="GeneralizedRCNN")).train()
    own = BATCH[2 * comm.get_rank() :][:2]
    return step(create_ddp_model(model, device_ids=None), own, 2)[0]


def average(folder):
    torch.set_num_threads(1)
    torch.save(accumulate(), f"{folder}/gradients_{comm.get_rank()}.pth")
    mean = mean_over_processes(torch.tensor(float(comm.get_rank()) + 1))
    torch.save(mean, f"{folder}/mean_{comm.get_rank()}.pth")
    comm.synchronize()
    os._exit(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")
def test_the_divisor_of_fcos_is_the_mean_and_parts_accumulate_in_each_process(tmp_path):
    launch(average, 2, dist_url="auto", args=(str(tmp_path),))
    model = tiny_model(tiny_cfg(*EVEN, architecture="GeneralizedRCNN")).train()
    whole, _ = step(model, BATCH, 1)
    for rank in range(2):
        assert difference(torch.load(tmp_path / f"gradients_{rank}.pth"), whole) < 1e-6
    assert [torch.load(tmp_path / f"mean_{rank}.pth") for rank in range(2)] == [1.5, 1.5]
