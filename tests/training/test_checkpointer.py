"""Which checkpoint a run goes on from."""

import os
import re

import numpy as np
import pytest
import torch
from helpers import answers_of_two, tiny_cfg

from crosskd_ifc import ConfigError
from crosskd_ifc.training.checkpointer import CheckpointError, SafeCheckpointer
from crosskd_ifc.training.run_config import changed_settings, describe_run
from crosskd_ifc.training.run_folder import last_checkpoint


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


def test_the_last_checkpoint_of_a_folder_is_not_the_final_one_of_an_earlier_training(tmp_path):
    fill(tmp_path, 1, 2)
    (tmp_path / "model_final.pth").write_bytes(b"of one step")
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/model_0000002.pth"
    (tmp_path / "last_checkpoint").unlink()
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/model_final.pth"
    assert last_checkpoint(str(tmp_path / "no folder")) == ""


@pytest.mark.parametrize(
    "tag", [b"/gone/away/model_0000001.pth", b"\x80\x00\xff", b"", b"model_0000009.pth"]
)
def test_whatever_the_tag_says_a_good_checkpoint_of_this_folder_is_taken(tmp_path, tag):
    fill(tmp_path, 1, 2)
    (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resume(tmp_path) == (1 if b"0001" in tag else 2)


def test_a_pipe_in_place_of_the_tag_is_not_waited_for(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / "last_checkpoint").unlink()
    os.mkfifo(tmp_path / "last_checkpoint")
    assert resume(tmp_path) == 1


def test_a_folder_may_have_a_question_mark_in_its_name(tmp_path):
    fill(tmp_path / "really?", 1, 2)
    assert resume(tmp_path / "really?") == 2


def test_without_a_tag_the_iterations_count_and_not_the_clock(tmp_path):
    fill(tmp_path, 9, 10, 11)
    (tmp_path / "model_0000010.pth").rename(tmp_path / "model_final.pth")  # extended later
    (tmp_path / "last_checkpoint").unlink()
    os.utime(tmp_path / "model_0000011.pth", (1, 1))  # as after a copy
    assert resume(tmp_path) == 11
    (tmp_path / "model_0000011.pth").unlink()
    assert resume(tmp_path) == 10


class Counter:
    """A state that a training has beside its weights."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path, caplog):
    model = torch.nn.Linear(1, 1)
    SafeCheckpointer(model, str(tmp_path), trainer=Counter(5)).save("model_0000001", iteration=1)
    torch.save({"model": model.state_dict()}, tmp_path / "model_0000002.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    again = SafeCheckpointer(model, str(tmp_path), trainer=Counter())
    assert again.resume_or_load("")["iteration"] == 1
    assert again.checkpointables["trainer"].number == 5
    assert "model_0000002.pth: weights without the state of a training" in caplog.text
    os.remove(tmp_path / "model_0000001.pth")
    with pytest.raises(CheckpointError, match="it lacks 'iteration', 'trainer'"):
        SafeCheckpointer(model, str(tmp_path), trainer=Counter()).resume_or_load("")


@pytest.mark.parametrize(
    "state, told",
    [
        ({"hooks": {"Mine": {"best": [np.float64(1)]}}}, "hooks.Mine.best.0 is of type numpy.floa"),
        ({np.int64(3): 1}, "3 is of type numpy.int64"),
        ({"of": Counter}, "of is of type builtins.type"),
        ({"call": lambda: 1}, "call is of type builtins.function"),
        ({"x": torch.zeros(1).expand(9)}, "x is an expanded tensor"),
    ],
    ids=["number", "key", "class", "function", "tensor"],
)
def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path, state, told):
    fill(tmp_path, 1)
    writer = SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), trainer=Counter(state))
    with pytest.raises(CheckpointError, match=f"model_0000002.pth .*: trainer.number.{told}"):
        writer.save("model_0000002", iteration=2)
    assert resume(tmp_path) == 1 and not (tmp_path / "model_0000002.pth").exists()


def test_a_state_of_plain_values_is_written(tmp_path):
    state = {"a": (1, 2.0, None, b"x"), 3: torch.nn.Parameter(torch.ones(1)), "size": torch.Size()}
    model, kept = torch.nn.Linear(1, 1), Counter()
    SafeCheckpointer(model, str(tmp_path), c=Counter(state)).save("model_0000001", iteration=1)
    SafeCheckpointer(model, str(tmp_path), c=kept).resume_or_load("")
    assert kept.number == state


def refused(folder, model, message, **others):
    with pytest.raises(CheckpointError, match=f"(?s)this run can't go on from .*: {message}"):
        SafeCheckpointer(model, str(folder), **others).resume_or_load("")


def test_a_checkpoint_that_lacks_a_layer_or_a_part_of_the_state_is_refused(tmp_path):
    fill(tmp_path, 1)
    refused(tmp_path, torch.nn.Linear(1, 2), ".*of another shape: weight")
    refused(tmp_path, torch.nn.Linear(1, 1, bias=False), ".*unexpected: bias")
    content = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    del content["model"]["bias"]
    torch.save({**content, "trainer": {}}, tmp_path / "model_0000001.pth")
    refused(tmp_path, torch.nn.Linear(1, 1), ".*missing: bias")
    refused(tmp_path, torch.nn.Linear(1, 1, bias=False), "KeyError 'number'", trainer=Counter())


def go_on(folder, *opts, model=None):
    """Resume as a run of another config than the one that has written the checkpoint."""
    fill_cfg = tiny_cfg("SEED", 1, "OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", 9)
    model = model or torch.nn.Linear(1, 1)
    if not os.path.exists(folder / "model_0000001.pth"):
        SafeCheckpointer(model, str(folder), cfg=fill_cfg).save("model_0000001", iteration=1)
    cfg = fill_cfg.clone()
    cfg.merge_from_list(list(opts))
    SafeCheckpointer(model, str(folder), cfg=cfg).resume_or_load("")


LOSS, TEACHER = "MODEL.CROSSKD.LOSS.CLS_WEIGHT", "MODEL.CROSSKD.TEACHER."


def test_changed_settings_are_told_then_and_now(tmp_path, caplog):
    named = (TEACHER + "CONFIG_FILE", "t.yaml", "MODEL.CROSSKD.ENABLED", False)
    go_on(tmp_path, LOSS, 2.5, "DATASETS.TRAIN", ("other",), *named)
    rows = [re.split(r"  +", line.strip()) for line in caplog.text.splitlines()]
    assert ["setting", "then", "now"] in rows
    assert [LOSS, "0.5", "2.5"] in rows and ["DATASETS.TRAIN", "[]", "['other']"] in rows
    assert [TEACHER + "CONFIG_FILE", "'no teacher'", "'a teacher'"] in rows
    assert sum(row[0].startswith(("MODEL", "DATASETS")) for row in rows) == 4


def test_files_that_were_moved_with_their_folder_are_not_told(tmp_path, caplog):
    def there(folder):
        teachers = [{"CONFIG_FILE": f"{folder}/t.yaml", "WEIGHTS": f"{folder}/t.pth", "OPTS": []}]
        imports = (f"{folder}/mine.py",)
        return ("MODEL.CROSSKD.TEACHERS", teachers, "MODEL.CROSSKD.IMPORTS", imports)

    def lazy(folder):
        cfg = tiny_cfg(*there(folder))
        cfg.LAZY_CONFIG = f"{folder}/config.py"
        return cfg

    assert changed_settings(describe_run(lazy("/here")), lazy("/there")) == []
    before, changed = describe_run(lazy("/here")), lazy("/here")
    changed.LAZY_CONFIG = "/here/other.py"
    assert changed_settings(before, changed) == [("LAZY_CONFIG", "config.py", "other.py")]


def test_what_doesnt_change_the_experiment_is_not_told(tmp_path, caplog):
    moved = ("OUTPUT_DIR", "elsewhere", "DATASETS.CARDS", ("c.yaml",), "MODEL.WEIGHTS", "w.pth")
    evaluated = ("TEST.EVAL_PERIOD", 7, "DATASETS.TEST", ("x",), "INPUT.MIN_SIZE_TEST", 90)
    reading = ("DATALOADER.NUM_WORKERS", 3, "SOLVER.CHECKPOINT_PERIOD", 2)
    go_on(tmp_path, *moved, *evaluated, *reading, "MODEL.RPN.NMS_THRESH", 0.7)
    assert not [x for x in caplog.records if x.levelname == "WARNING"]


def test_steps_of_another_number_of_processes_are_not_counted_where_it_scales_the_schedule(
    tmp_path,
):
    go_on(tmp_path)
    file = tmp_path / "model_0000001.pth"
    content = torch.load(file, weights_only=True)
    content["config"]["processes"] = 8
    torch.save(content, file)
    go_on(tmp_path)
    with pytest.raises(
        CheckpointError, match="is of 8 processes, and this run has 1: with SOLVER.R"
    ):
        go_on(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 1)


def test_a_checkpoint_that_doesnt_fit_shows_what_has_changed(tmp_path):
    go_on(tmp_path)
    with pytest.raises(CheckpointError, match="(?s)another shape: weight.*RESNETS.DEPTH +50 +18"):
        go_on(tmp_path, "MODEL.RESNETS.DEPTH", 18, model=torch.nn.Linear(1, 3))


def test_a_distilled_run_is_not_gone_on_with_as_a_plain_one_nor_the_other_way(tmp_path):
    """One forgotten OUTPUT_DIR would make both students the same."""
    go_on(tmp_path)  # without a teacher
    told = "(?s)of a run that wasn't distilled .*SCHEDULE.STOP_ITER.*TEACHER.CONFIG_FILE +'no teach"
    with pytest.raises(CheckpointError, match=told):
        go_on(tmp_path, TEACHER + "CONFIG_FILE", "teacher.yaml")
    go_on(tmp_path, TEACHER + "CONFIG_FILE", "teacher.yaml", "MODEL.CROSSKD.ENABLED", False)
    SafeCheckpointer(
        torch.nn.Linear(1, 1), str(tmp_path), cfg=tiny_cfg(TEACHER + "CONFIG_FILE", "teacher.yaml")
    ).save("model_0000001", iteration=1)
    go_on(tmp_path, TEACHER + "CONFIG_FILE", "another.yaml")
    with pytest.raises(CheckpointError, match="of a run that was distilled .* OUTPUT_DIR of"):
        go_on(tmp_path)


def start(folder, weights, model):
    torch.save({"model": weights}, folder / "start.pth")
    checkpointer = SafeCheckpointer(model, str(folder / "run"))
    checkpointer.resume_or_load(str(folder / "start.pth"), resume=False)


def test_weights_that_fit_nothing_are_no_start(tmp_path):
    """torchvision's, for one, have other names."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS '.*start.pth': none .*convert_weights"):
        start(tmp_path, {"layer1.weight": torch.ones(2, 2), "0.weight": torch.ones(3, 3)}, model)
    start(tmp_path, {"0.weight": torch.ones(2, 2)}, model)
    assert torch.equal(model[0].weight, torch.ones(2, 2))


def test_a_frozen_layer_that_the_start_lacks_is_told(tmp_path, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    start(tmp_path, {"1.weight": torch.ones(1, 2)}, model)
    assert "frozen parameters" not in caplog.text
    model[0].requires_grad_(False)
    start(tmp_path, {"1.weight": torch.ones(1, 2)}, model)
    assert (
        "lacks 2 frozen parameters, which keep their initial values: 0.weight, 0.bias;"
        in caplog.text
    )


def test_a_checkpoint_without_its_config_is_resumed_with_a_warning(tmp_path, caplog):
    fill(tmp_path, 1)
    go_on(tmp_path)
    assert "doesn't say its config: no setting can be compared" in caplog.text


@pytest.mark.parametrize("kept", ["x", {"yaml": "a: 1\na: 2"}, {"yaml": 3}, {"yaml": "[1]"}])
def test_a_foreign_config_in_a_checkpoint_is_one_error(tmp_path, kept):
    go_on(tmp_path)
    content = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    torch.save({**content, "config": kept}, tmp_path / "model_0000001.pth")
    with pytest.raises(ConfigError, match="what the checkpoint says of its run can't be read"):
        go_on(tmp_path)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "model_best.pth").write_text("another's")
    assert not SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).has_checkpoint()
    assert resume(tmp_path) is None and resume(tmp_path / "gone") is None


def resume_two(tmp_path, *folders):
    """What two processes make of a folder each."""

    def resume_as(rank):
        try:
            return resume(folders[rank])
        except CheckpointError as error:
            return str(error)

    return answers_of_two(tmp_path, resume_as)


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
