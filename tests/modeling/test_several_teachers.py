"""Students of several teachers: TEACHERS and TEACHERS_LOSS."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import tiny_batch, tiny_cfg, tiny_model, train_losses
from test_dense import dense_cfg, telling

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.config import distillation_requested, teacher_configs
from crosskd_ifc.modeling.summary import describe_distillation
from crosskd_ifc.training.preflight import check_training_config

K = "MODEL.CROSSKD."
# All parts: box, feature and RPN losses, and learned parameters.
ALL = (
    *(
        K + "LOSS.FEATURE_WEIGHT",
        0.1,
        K + "LOSS.FEATURE_TYPE",
        "fgd",
        K + "LOSS.FEATURE_COMBINE",
        False,
        K + "LOSS.RPN_WEIGHT",
        1.0,
    ),
    *(K + "FUSION.NAME", "weighted", "MODEL.PROPOSAL_GENERATOR.NAME", "CrossKDRPN"),
)
ONE = (K + "TEACHERS_LOSS", "one")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings of two teachers of one config with different weights, and a wider one."""
    folder, found = tmp_path_factory.mktemp("teachers"), []
    for i, opts in enumerate([(), (), ("MODEL.ROI_BOX_HEAD.FC_DIM", 24)]):
        cfg = tiny_cfg(*opts, architecture="GeneralizedRCNN")
        (folder / f"{i}.yaml").write_text(cfg.dump())
        DetectionCheckpointer(tiny_model(cfg, seed=10 + i), str(folder)).save(str(i))
        found.append(
            {"CONFIG_FILE": str(folder / f"{i}.yaml"), "WEIGHTS": str(folder / f"{i}.pth")}
        )
    return found


def student_of(teachers, *opts):
    cfg = tiny_cfg(*ALL, K + "TEACHERS", teachers, *opts)
    student = tiny_model(cfg, seed=1)
    torch.manual_seed(5)  # of what is learned
    attach_teacher(student, cfg)
    return student.train()


def kd_losses(student, iteration=0):
    found, storage = train_losses(student, tiny_batch(), iteration=iteration)
    return {k: v for k, v in found.items() if k.endswith("_kd")}, storage


def test_a_list_of_one_is_the_single_teacher_bit_for_bit(trained):
    by_list = student_of(trained[:1])
    cfg = tiny_cfg(*ALL, *(x for k, v in trained[0].items() for x in (f"{K}TEACHER.{k}", v)))
    single = tiny_model(cfg, seed=1)
    torch.manual_seed(5)
    attach_teacher(single.train(), cfg)
    assert by_list.state_dict().keys() == single.state_dict().keys()
    for student in (by_list, single):
        sum(kd_losses(student)[0].values()).backward()
    ours, theirs = (dict(m.named_parameters()) for m in (by_list, single))
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name
        assert (p.grad is None) == (theirs[name].grad is None), name
        assert p.grad is None or torch.equal(p.grad, theirs[name].grad), name


def alone(student, which):
    """The same student, with one of its teachers."""
    single = copy.copy(student)
    single._modules = dict(student._modules)
    single.distiller = student.distiller.distillers[which]
    return single


def test_the_losses_are_the_mean_of_those_of_each_teacher_alone(trained):
    student = student_of([trained[0], trained[2]])
    found, storage = kd_losses(student, iteration=19)
    parts = [kd_losses(alone(student, i), iteration=19)[0] for i in range(2)]
    assert set(found) == {"loss_cls_kd", "loss_box_reg_kd", "loss_feature_kd", "loss_rpn_kd"}
    for key, value in found.items():
        assert not torch.isclose(parts[0][key], parts[1][key], rtol=1e-2)
        torch.testing.assert_close(value, (parts[0][key] + parts[1][key]) / 2)
    sum(found.values()).backward()
    names = {n.split(".")[1] for n, p in student.named_parameters() if n.startswith("fusion.")}
    assert names == {"teacher_1", "teacher_2"}
    assert all(p.grad is not None for n, p in student.named_parameters() if n.startswith("fusion."))
    latest = storage.latest()
    assert latest["crosskd/factor"][0] == latest["teacher_2/crosskd/factor"][0] == 0.5
    ours, theirs = (latest[x + "crosskd/teacher_confidence"][0] for x in ("", "teacher_2/"))
    assert ours != theirs


def test_equal_teachers_teach_as_one(trained):
    two, one = student_of([trained[0]] * 2), student_of(trained[:1])
    found, wanted = kd_losses(two)[0], kd_losses(one)[0]
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key])


def test_one_is_drawn_in_each_step_and_the_others_are_not_run(trained):
    student = student_of([trained[0], trained[2]], *ONE)
    ran = []
    for i, teacher in enumerate(student.teachers):
        teacher.model.backbone.register_forward_hook(lambda *_, i=i: ran.append(i))
    drawn = []
    for iteration in range(12):
        found, _ = kd_losses(student, iteration)
        (which,) = ran
        drawn.append(which)
        ran.clear()
        if iteration < 2:
            for key, value in kd_losses(alone(student, which), iteration)[0].items():
                torch.testing.assert_close(found[key], value)
            ran.clear()
    assert 3 <= sum(drawn) <= 9
    # A resumed run, another process and another random state draw the same.
    again = student_of([trained[0], trained[2]], *ONE)
    torch.manual_seed(99)
    for iteration in (11, 4):
        factors = [step.factor for step in _steps(again, iteration)]
        assert factors == [1.0 - drawn[iteration], float(drawn[iteration])]
    other = student_of([trained[0], trained[2]], *ONE, "SEED", 7)
    assert [int(_steps(other, i)[1].factor) for i in range(12)] != drawn
    # The optimizer and DDP see a gradient for each parameter in each step.
    sum(kd_losses(student, 0)[0].values()).backward()
    for name, p in student.named_parameters():
        assert not name.startswith("fusion.") or p.grad is not None, name


def _steps(student, iteration):
    with EventStorage(iteration):
        with student.distiller.recording(student, tiny_batch(), 1.0) as steps:
            return steps


@pytest.mark.parametrize("loss", ["mean", "one"])
def test_a_factor_of_0_runs_no_teacher(trained, loss):
    student = student_of(trained[:2], K + "TEACHERS_LOSS", loss)
    student.kd_factor = 0.0
    for teacher in student.teachers:
        teacher.model.backbone = None
    assert all(value == 0 for value in kd_losses(student)[0].values())


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS"])
def test_dense_students_have_several_teachers_too(kind, tmp_path):
    entries = []
    for i in range(2):
        cfg = dense_cfg(kind, stock=True)
        (tmp_path / f"{i}.yaml").write_text(cfg.dump())
        torch.manual_seed(i)
        DetectionCheckpointer(telling(build_model(cfg), i), str(tmp_path)).save(str(i))
        entries.append({"WEIGHTS": str(tmp_path / f"{i}.pth")})
    cfg = dense_cfg(
        kind, K + "TEACHER.CONFIG_FILE", str(tmp_path / "0.yaml"), K + "TEACHERS", entries
    )
    student = telling(build_model(cfg), 5).train()
    attach_teacher(student, cfg)
    found, _ = kd_losses(student)
    parts = [kd_losses(alone(student, i))[0] for i in range(2)]
    for key, value in found.items():
        torch.testing.assert_close(value, (parts[0][key] + parts[1][key]) / 2)


def test_an_entry_takes_what_it_does_not_say_from_teacher(trained):
    shared = (
        K + "TEACHER.CONFIG_FILE",
        trained[0]["CONFIG_FILE"],
        K + "TEACHER.PRECISION",
        "bfloat16",
    )
    shared += (K + "TEACHER.WEIGHTS", "shared.pth", K + "TEACHER.OPTS", ("SEED", 3))
    entries = [{"WEIGHTS": "a.pth"}, {"CONFIG_FILE": "other.yaml", "PRECISION": "float32"}]
    (_, first), (_, second) = teacher_configs(tiny_cfg(*shared, K + "TEACHERS", entries))
    first, second = first.MODEL.CROSSKD.TEACHER, second.MODEL.CROSSKD.TEACHER
    assert first.CONFIG_FILE == trained[0]["CONFIG_FILE"] and first.WEIGHTS == "a.pth"
    assert first.PRECISION == "bfloat16" and tuple(first.OPTS) == ("SEED", 3)
    # Weights belong to their config.
    assert second.CONFIG_FILE == "other.yaml" and second.WEIGHTS == "" and second.OPTS == ()
    assert second.PRECISION == "float32"


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"WEIGHTS": "gone.pth"}, "MODEL.CROSSKD.TEACHER.WEIGHTS: there is no file 'gone.pth'"),
        (
            {"OPTS": ["MODEL.ROI_BOX_HEAD.FC_DIM", 20]},
            ".*TEACHER.WEIGHTS .* does not fit the model",
        ),
        ({"OPTS": ["MODEL.ROI_HEADS.NUM_CLASSES", 4]}, ".*TEACHER.CLASS_MAP"),
        ({"PRECISION": "half"}, "MODEL.CROSSKD.TEACHER.PRECISION is 'half'; possible values"),
        ({"STAGE": 2}, "MODEL.CROSSKD.TEACHER.STAGE is 2"),
        ({"WEIGHT": "a.pth"}, ".*WEIGHT"),
        ({"STAGE": "second"}, ".*STAGE"),
        ("a.pth", "'a.pth' is not a section"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_said_as_ever_with_its_number(trained, entry, message):
    if isinstance(entry, dict) and set(entry) & {"OPTS", "STAGE", "PRECISION"}:
        entry = {**trained[1], **entry}
    with pytest.raises(ConfigError, match=rf"^MODEL\.CROSSKD\.TEACHERS\[1\]: {message}"):
        entries = [{"WEIGHTS": trained[0]["WEIGHTS"]}, entry]
        student_of(entries, K + "TEACHER.CONFIG_FILE", trained[0]["CONFIG_FILE"])


def test_a_teacher_that_none_of_several_falls_back_to_is_refused(trained):
    with pytest.raises(ConfigError, match="TEACHER.CONFIG_FILE is .*each of TEACHERS has a CONFIG"):
        student_of(trained[1:2], K + "TEACHER.CONFIG_FILE", trained[0]["CONFIG_FILE"])
    with pytest.raises(ConfigError, match="TEACHER.WEIGHTS is 'a.pth', but each of TEACHERS"):
        student_of(trained[:2], K + "TEACHER.WEIGHTS", "a.pth")


def test_a_stage_may_be_a_number_for_one_and_a_word_for_another(trained):
    entries = [{**trained[0], "STAGE": "mean"}, {**trained[1], "STAGE": 2}, trained[2]]
    cfg = tiny_cfg(K + "TEACHERS", entries, K + "TEACHER.STAGE", 3)
    stages = [one.MODEL.CROSSKD.TEACHER.STAGE for _, one in teacher_configs(cfg)]
    assert stages == ["mean", 2, 3]


def test_several_teachers_make_a_config_distil_and_are_checked_before_training(trained):
    assert distillation_requested(tiny_cfg(K + "TEACHERS", trained))
    with pytest.raises(
        ConfigError, match=r"TEACHERS\[1\]: MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty"
    ):
        distillation_requested(tiny_cfg(K + "TEACHERS", [trained[0], {"WEIGHTS": "a.pth"}]))
    gone = [trained[0], {**trained[1], "WEIGHTS": "gone.pth"}]
    with pytest.raises(ConfigError, match=r"TEACHERS\[1\]: .*there is no file 'gone.pth'"):
        check_training_config(tiny_cfg(K + "TEACHERS", gone))
    with pytest.raises(
        ConfigError, match="TEACHERS_LOSS is 'one', but TEACHERS doesn't list several"
    ):
        student_of(trained[:1], *ONE)
    with pytest.raises(ConfigError, match="TEACHERS_LOSS is 'sum'; possible values: 'mean', 'one'"):
        student_of(trained[:2], K + "TEACHERS_LOSS", "sum")


def test_the_student_keeps_its_contracts(trained):
    student = student_of([trained[0], trained[2]], *ONE)
    assert student.teacher is student.teachers[0] and len(student.teachers) == 2
    assert not [n for n, _ in student.named_modules() if "teacher" in n and "fusion" not in n]
    student.to(torch.device("cpu"))
    assert all(not p.requires_grad for t in student.teachers for p in t.model.parameters())
    text = describe_distillation(
        student, tiny_cfg(*ALL, K + "TEACHERS", [trained[0], trained[2]], *ONE)
    )
    assert "teacher 1" in text and "teacher 2" in text and "one of them, drawn in each step" in text
    assert student.eval().cross_head_inference(tiny_batch())
