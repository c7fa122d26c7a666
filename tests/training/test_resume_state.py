"""What a checkpoint holds of each process."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers import answers_of_two
from torch import nn

from crosskd_ifc.training.resume import ResumeState


def hook_of(normalizer=None):
    hook, model = ResumeState(), nn.Linear(1, 1)
    if normalizer is not None:
        model.loss_normalizer = normalizer
    loader = SimpleNamespace(data_loader=SimpleNamespace())
    hook.trainer = SimpleNamespace(iter=3, start_iter=0, model=model, _trainer=loader)
    return hook, model


def stop_and_go_on(rank):
    hook, _ = hook_of(torch.tensor(10.0 * (rank + 1)))
    hook.gather()
    held = [hook.state_dict()]  # of the main process is what a checkpoint has
    dist.broadcast_object_list(held, src=0)
    again, model = hook_of()
    again.load_state_dict(held[0])
    again.before_step()
    return model.loss_normalizer


def test_each_process_goes_on_with_its_own_normalizer(tmp_path):
    assert answers_of_two(tmp_path, stop_and_go_on) == [10.0, 20.0]


def test_a_checkpoint_of_before_has_the_main_processs_normalizer_alone():
    hook, _ = hook_of(7.0)
    state = hook.state_dict()
    del state["random"][0]["loss_normalizer"]
    again, model = hook_of()
    again.load_state_dict(state)
    again.before_step()
    assert model.loss_normalizer == 7.0
