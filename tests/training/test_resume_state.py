"""What a checkpoint holds of each process."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

from crosskd_ifc.training.resume import ResumeState


def hook_of(normalizer=None):
    hook, model = ResumeState(), nn.Linear(1, 1)
    if normalizer is not None:
        model.loss_normalizer = normalizer
    loader = SimpleNamespace(data_loader=SimpleNamespace())
    hook.trainer = SimpleNamespace(iter=3, start_iter=0, model=model, _trainer=loader)
    return hook, model


def stop_and_go_on(rank, store, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    hook, _ = hook_of(torch.tensor(10.0 * (rank + 1)))
    hook.gather()
    held = [hook.state_dict()]  # of the main process is what a checkpoint has
    dist.broadcast_object_list(held, src=0)
    again, model = hook_of()
    again.load_state_dict(held[0])
    again.before_step()
    answers.put((rank, model.loss_normalizer))
    dist.destroy_process_group()


def test_each_process_goes_on_with_its_own_normalizer(tmp_path):
    answers = torch.multiprocessing.get_context("fork").SimpleQueue()
    arguments = (str(tmp_path / "store"), answers)
    start_processes(stop_and_go_on, args=arguments, nprocs=2, start_method="fork")
    assert dict(answers.get() for _ in range(2)) == {0: 10.0, 1: 20.0}


def test_a_checkpoint_of_before_has_the_main_processs_normalizer_alone():
    hook, _ = hook_of(7.0)
    state = hook.state_dict()
    del state["random"][0]["loss_normalizer"]
    again, model = hook_of()
    again.load_state_dict(state)
    again.before_step()
    assert model.loss_normalizer == 7.0
