"""Which checkpoint a run goes on from."""

import os
import re

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from crosskd_ifc.training.checkpointer import CheckpointError, SafeCheckpointer


def fill(folder, *iterations):
    folder.mkdir(exist_ok=True)
    for iteration in iterations:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, iteration)
        SafeCheckpointer(model, str(folder)).save(f"model_{iteration:07d}", iteration=iteration)


def resume(folder):
    """The iteration after which a run in this folder goes on; None: it starts anew."""
    model = torch.nn.Linear(1, 1)
    iteration = SafeCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    iteration = iteration.get("iteration")
    assert iteration is None or model.weight == iteration
    return iteration


def test_without_its_tag_the_newest_checkpoint_is_taken(tmp_path, caplog):
    fill(tmp_path, 1, 2)
    (tmp_path / "last_checkpoint").unlink()
    assert SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).has_checkpoint()
    assert resume(tmp_path) == 2
    assert f"last_checkpoint is missing; resuming from {tmp_path}/model_0000002.pth" in caplog.text


def test_a_file_of_something_else_is_passed_over(tmp_path, caplog):
    fill(tmp_path, 1, 2)
    torch.save([1, 2], tmp_path / "model_0000002.pth")
    assert resume(tmp_path) == 1
    assert "model_0000002.pth: there are no weights in it" in caplog.text


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "model_best.pth").write_text("another's")
    assert not SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).has_checkpoint()
    assert resume(tmp_path) is None and resume(tmp_path / "gone") is None


def resume_as(rank, store, folders, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        answers.put((rank, resume(folders[rank])))
    except CheckpointError as error:
        answers.put((rank, str(error)))


def resume_two(tmp_path, *folders):
    """What two processes make of a folder each."""
    answers = torch.multiprocessing.get_context("fork").SimpleQueue()
    arguments = (str(tmp_path / "store"), folders, answers)
    start_processes(resume_as, arguments, nprocs=2, start_method="fork")
    return [x for _, x in sorted(answers.get() for _ in folders)]


def test_two_processes_resume_from_the_choice_of_the_first(tmp_path):
    fill(tmp_path / "run", 1, 2)
    assert resume_two(tmp_path, tmp_path / "run", tmp_path / "run") == [2, 2]


@pytest.mark.parametrize(
    "theirs, what",
    [
        ((1,), "the main process resumes from model_0000002.pth, but process 1 can't: .*no such"),
        ((), "the main process resumes from model_0000002.pth, but process 1 can't: .*no such"),
        ((2,), ".*process 1 can't: there it is of iteration 7, not 2"),
    ],
    ids=["older", "empty", "another run's"],
)
def test_two_machines_with_a_folder_each_both_stop_with_one_error(tmp_path, theirs, what):
    fill(tmp_path / "0", 1, 2)
    fill(tmp_path / "1", *theirs)
    if theirs == (2,):
        other = SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path / "1"))
        other.save("model_0000002", iteration=7)
    for rank, answer in enumerate(resume_two(tmp_path, tmp_path / "0", tmp_path / "1")):
        folder = os.path.join(tmp_path, str(rank))
        pattern = f"OUTPUT_DIR {folder} must be one folder, which all machines share: {what}"
        assert re.search(pattern, answer)


def test_a_run_is_not_begun_anew_where_only_another_machine_has_checkpoints(tmp_path):
    fill(tmp_path / "0")
    fill(tmp_path / "1", 1)
    for answer in resume_two(tmp_path, tmp_path / "0", tmp_path / "1"):
        assert "the main process finds no checkpoint there, but process 1 does" in answer
