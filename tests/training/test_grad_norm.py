"""What is logged of the gradient's norm."""

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from crosskd_ifc.training.accumulation import accumulating
from crosskd_ifc.training.grad_norm import GradientNorm


class Line(nn.Module):
    """Its gradient is (3, 4) times the mean of its input, of norm 5 times that."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        return {"loss": (3 * self.a + 4 * self.b).sum() * torch.tensor(batch).mean()}


def logged(batches, parts=1):
    model = Line()
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([GradientNorm()])
    trainer.iter, trainer.max_iter = 0, len(batches)
    seen = []
    with EventStorage(0) as storage, accumulating(trainer, parts):
        for _ in batches:
            trainer.run_step()
            seen.append({k: v for k, (v, _) in storage.latest().items() if "grad" in k})
            storage.step()
    return seen


def test_the_norm_is_that_of_the_whole_gradient_and_its_variation_that_of_20_steps():
    seen = logged([[1.0], *[[2.0], [4.0]] * 10])
    norms = [x["crosskd/grad_norm"] for x in seen]
    assert norms == pytest.approx([5.0, *[10.0, 20.0] * 10])
    assert "crosskd/grad_norm_variation" not in seen[18]
    # Ten of 10 and ten of 20: the mean is 15, each is 5 from it.
    variation = seen[20]["crosskd/grad_norm_variation"]
    assert variation == pytest.approx(math.sqrt(20 * 25 / 19) / 15)


def test_a_step_in_parts_has_the_norm_of_its_sum():
    assert logged([[1.0, 3.0]], parts=2)[0] == {"crosskd/grad_norm": pytest.approx(10.0)}
