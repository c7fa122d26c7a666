"""The map between two label sets, and predictions that are compared through it."""

import json

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import distilling, tiny_batch, tiny_cfg, tiny_model, train_losses

from crosskd_ifc import ConfigError, attach_teacher
from crosskd_ifc.distillation.compatibility.class_map import ClassMap, parse, resolve

K = "MODEL.CROSSKD."
STUDENT_HEAD = (K + "MIMIC", "student_head")


def table(setting, *, student=("cat", "dog", "tv"), teacher=("dog", "television", "cat", "cow")):
    counts = (len(student), len(teacher))
    found = resolve(setting, num_classes=counts, names=(student, teacher), needed_by="this")
    return found.teacher_classes


def test_names_and_pairs_give_the_teachers_classes():
    assert table(("names", ("tv", "television"))) == (2, 0, 1)
    assert table((("cat", "cat"), ("dog", "dog"), ("tv", "television"))) == (2, 0, 1)
    assert table(((0, 2), (1, 0), (2, 1))) == (2, 0, 1)
    assert table(("names", ("tv", ""))) == (2, 0, -1)
    assert table(("names", ("dog", "cow"), ("tv", ""))) == (2, 3, -1)
    assert table((), teacher=("cat", "dog", "tv")) == (0, 1, 2)


REFUSED = {
    ("names",): "1 of 3 student classes have no teacher class: 'tv'; add pairs",
    (("cat", "cat"),): "2 of 3 student classes have no teacher class: 'dog', 'tv'",
    ("names", ("tv", "screen")): "the teacher has no class 'screen'; it has dog, television",
    ("names", ("bird", "cow")): "the student has no class 'bird'; it has cat, dog, tv",
    ("names", ("tv", "dog")): "teacher class 'dog' stands for two student classes",
    ("names", ("tv", ""), ("tv", "cow")): "student class 'tv' stands in two pairs",
    ("names", (3, 1)): "the student has no class 3, only 0 to 2",
    ("names", (2, 4)): "the teacher has no class 4, only 0 to 3",
    (("cat", ""), ("dog", ""), ("tv", "")): "no student class has a teacher class",
    (): r"the student has 3 classes and the teacher 4; give \('names',\) or pairs",
    ("teacher",): "have nothing in common, but this compares them",
}


@pytest.mark.parametrize("setting", REFUSED, ids=str)
def test_a_map_that_cannot_work_is_refused_with_the_reason(setting):
    with pytest.raises(ValueError, match=REFUSED[setting]):
        table(setting)


def test_equal_counts_with_other_names_are_refused_only_where_classes_are_compared():
    names = (("cat", "dog"), ("dog", "cat"))
    with pytest.raises(ValueError, match="class 0 is 'cat' for the student and 'dog' for the"):
        resolve((), num_classes=(2, 2), names=names, needed_by="this")
    assert resolve((), num_classes=(2, 2), names=names) is None
    assert resolve((), num_classes=(2, 2), names=(names[0], None)).is_identity
    assert resolve(("names",), num_classes=(2, 2), names=names).teacher_classes == (1, 0)


def test_other_counts_are_refused_with_a_way_out_that_works():
    with pytest.raises(ValueError, match=r"give \('teacher',\) if its classes are others"):
        resolve((), num_classes=(3, 5), names=(None, None))
    assert resolve(("teacher",), num_classes=(3, 5), names=(None, None)) is None
    with pytest.raises(ValueError, match=r"give \('names',\) or pairs: this compares class by"):
        resolve((), num_classes=(3, 5), names=(None, None), needed_by="this")


def test_unknown_names_ask_for_indices():
    with pytest.raises(ValueError, match="student's class names are not known.*indices"):
        resolve(("names",), num_classes=(2, 2), names=(None, ("a", "b")))


@pytest.mark.parametrize("setting", [("other",), (1,), (("a", "b", "c"),), ("teacher", ("a", "b"))])
def test_other_forms_are_refused_showing_the_possible_ones(setting):
    with pytest.raises(ValueError, match=r"possible: \(\).*\('teacher',\).*\('names',\).*pairs"):
        parse(setting)


def test_unmapped_teacher_classes_become_background_and_probabilities_add_up():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))  # 4 classes
    found = ClassMap([2, 0, -1], 4).teacher_logits(logits).softmax(dim=1)
    p = logits.softmax(dim=1)
    expected = torch.stack([p[:, 2], p[:, 0], p[:, 1] + p[:, 3] + p[:, 4]], dim=1)
    torch.testing.assert_close(found, expected)


def test_deltas_and_channels_follow_their_classes_and_agnostic_ones_stay():
    m = ClassMap([2, 0, -1], 4)
    theirs = torch.arange(16.0).view(1, 16)
    assert m.teacher_deltas(theirs).tolist() == [[8, 9, 10, 11, 0, 1, 2, 3]]
    ours = torch.arange(12.0).view(1, 12)
    assert m.student_deltas(ours).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    agnostic = torch.arange(4.0).view(1, 4)
    assert torch.equal(m.teacher_deltas(agnostic), agnostic)
    assert m.student_logits(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[1, 2, 4]]
    assert m.to_teacher(torch.tensor([0, 1, 2, 3])).tolist() == [2, 0, -1, 4]
    assert m.to_student(torch.tensor([0, 1, 2, 3, 4])).tolist() == [1, 3, 0, 3, 3]


def test_the_same_classes_in_the_same_order_change_nothing():
    x, m = torch.randn(2, 4), ClassMap(range(3), 3)
    assert m.is_identity and m.teacher_logits(x) is x and m.student_logits(x) is x


def permuted(model, order):
    """The same detector with its classes in another order: new class i is old class order[i]."""
    predictor = model.roi_heads.box_predictor
    rows = torch.tensor([*order, 3])
    boxes = torch.cat([torch.arange(4 * i, 4 * i + 4) for i in order])
    with torch.no_grad():
        for p, index in ((predictor.cls_score, rows), (predictor.bbox_pred, boxes)):
            p.weight.copy_(p.weight[index])
            p.bias.copy_(p.bias[index])
    return model


@pytest.mark.parametrize("box_type", ["l1", "giou"])
def test_a_student_with_its_own_weights_as_teacher_in_another_order_has_no_loss(box_type):
    """Old classes 0, 1, 2 are the teacher's 1, 2, 0."""
    opts = (*STUDENT_HEAD, K + "LOSS.BOX_TYPE", box_type)
    cfg = tiny_cfg(*opts, K + "TEACHER.CLASS_MAP", ((0, 1), (1, 2), (2, 0)))
    student, teacher = tiny_model(cfg), permuted(tiny_model(cfg), (2, 0, 1))
    attach_teacher(student, cfg, teacher=teacher)
    losses, storage = train_losses(student.train(), tiny_batch(), iteration=19)
    assert 0 <= losses["loss_cls_kd"] <= 1e-5 and 0 <= losses["loss_box_reg_kd"] <= 1e-5
    assert storage.latest()["crosskd/agreement_student"][0] == 1
    wrong = tiny_cfg(*opts, K + "TEACHER.CLASS_MAP", ((0, 0), (1, 1), (2, 2)))
    student = tiny_model(wrong)
    attach_teacher(student, wrong, teacher=teacher)
    assert train_losses(student.train(), tiny_batch())[0]["loss_cls_kd"] > 1e-3


@pytest.fixture
def named():
    """Registers data sets of given class names; forgotten afterwards."""

    def register(name, classes):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(thing_classes=list(classes))
        return ("DATASETS.TRAIN", (name,))

    return register


def teacher_files(folder, *opts):
    """Options that name a teacher's config and weights, made with ``opts``."""
    cfg = tiny_cfg(*opts)
    (folder / "teacher.yaml").write_text(cfg.dump())
    torch.save({"model": tiny_model(cfg, seed=2).state_dict()}, folder / "teacher.pth")
    return (
        *(K + "TEACHER.CONFIG_FILE", str(folder / "teacher.yaml")),
        *(K + "TEACHER.WEIGHTS", str(folder / "teacher.pth")),
    )


def found_map(*opts):
    """The map of a student-head student with these options."""
    cfg = tiny_cfg(*STUDENT_HEAD, *opts)
    student = tiny_model(cfg)
    attach_teacher(student, cfg)
    assert train_losses(student.train(), tiny_batch())[0]["loss_cls_kd"] > 0
    return student.distiller.box.mimic._class_map.teacher_classes


NAMES = (K + "TEACHER.CLASS_MAP", ("names",))


def test_names_come_from_the_training_data_of_both(named, tmp_path):
    ours, theirs = named("map_student", "abc"), named("map_teacher", "bxcad")
    files = teacher_files(tmp_path, *theirs, "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    assert found_map(*ours, *files, *NAMES) == (3, 0, 2)


def card(folder, name, classes):
    """A card of a data set whose files are not there."""
    content = {"name": name, "format": "coco", "root": ".", "classes": list(classes)}
    content |= {"splits": {"train": {"json": "t.json", "images": "t"}}, "evaluator": "coco"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ("DATASETS.CARDS", (str(folder / f"{name}.yaml"),), "DATASETS.TRAIN", (f"{name}_train",))


def test_names_that_stand_in_the_cards_of_both_are_compared_by_default_too(tmp_path):
    ours = card(tmp_path, "ours", "abc")
    files = teacher_files(tmp_path, *card(tmp_path, "theirs", "cab"))
    assert found_map(*ours, *files, *NAMES) == (1, 2, 0)
    with pytest.raises(ConfigError, match="class 0 is 'a' for the student and 'c' for the teacher"):
        found_map(*ours, *files)


@pytest.fixture
def late(tmp_path):
    """Registers data sets whose names are known only when they are loaded."""
    names = []

    def register(name, classes):
        categories = [{"id": i + 1, "name": c} for i, c in enumerate(classes)]
        coco = {"images": [], "annotations": [], "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(coco))
        register_coco_instances(name, {}, str(tmp_path / f"{name}.json"), str(tmp_path))
        names.append(name)
        return ("DATASETS.TRAIN", (name,))

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_names_that_a_data_set_knows_only_when_it_is_loaded_are_compared(late, tmp_path):
    ours = late("late_student", "abc")
    files = teacher_files(tmp_path, *late("late_teacher", "cab"))
    with pytest.raises(ConfigError, match="class 0 is 'a' for the student and 'c' for the teacher"):
        found_map(*ours, *files)
    assert found_map(*ours, *files, *NAMES) == (1, 2, 0)


def test_names_that_are_nowhere_are_taken_as_equal_with_a_warning(named, tmp_path, caplog):
    gone = ("DATASETS.CARDS", ("nowhere.yaml",), "DATASETS.TRAIN", ("gone_train",))
    files = teacher_files(tmp_path, *gone)
    ours = named("known_student", "abc")
    assert found_map(*ours, *files) == (0, 1, 2)
    assert "names of the teacher's classes aren't known" in caplog.text
    indices = (K + "TEACHER.CLASS_MAP", ((0, 1), (1, 0), (2, 2)))
    assert found_map(*ours, *files, *indices) == (1, 0, 2)
    with pytest.raises(ConfigError, match="the teacher's class names are not known"):
        found_map(*ours, *files, *NAMES)


@pytest.mark.parametrize("names", ["named", "late"])
def test_classes_that_differ_give_cross_head_no_statistics_by_class(names, tmp_path, request):
    register = request.getfixturevalue(names)
    ours, theirs = register("map_student", "abc"), register("map_teacher", "cab")
    cfg = tiny_cfg(*ours, *teacher_files(tmp_path, *theirs))
    student = tiny_model(cfg)
    attach_teacher(student, cfg)
    _, storage = train_losses(student.train(), tiny_batch(), iteration=19)
    assert "crosskd/agreement_pool" in storage.latest()
    assert "crosskd/disagreement_truth" not in storage.latest()
    cfg.MODEL.CROSSKD.TEACHER.EVAL_AT_START = True
    with pytest.raises(ConfigError, match="EVAL_AT_START compares class by class, but class 0"):
        attach_teacher(tiny_model(cfg), cfg)


@pytest.mark.parametrize("opts", [STUDENT_HEAD, (K + "INHERIT", ("roi_heads.box_predictor",))])
def test_other_classes_without_a_map_are_refused_where_they_are_compared(opts):
    with pytest.raises(ConfigError, match="TEACHER.CLASS_MAP: the student has 3 .* 5.*NUM_CLASSES"):
        distilling(*opts, teacher_opts=("MODEL.ROI_HEADS.NUM_CLASSES", 5))


def test_masked_student_classes_get_no_gradient_from_distillation():
    setting = ((0, 1), (1, 0), (2, ""))
    student, _ = distilling(*STUDENT_HEAD, K + "TEACHER.CLASS_MAP", setting)
    losses, _ = train_losses(student, tiny_batch())
    (losses["loss_cls_kd"] + losses["loss_box_reg_kd"]).backward()
    gradient = student.roi_heads.box_predictor.cls_score.weight.grad
    assert gradient[2].abs().sum() == 0 and all(gradient[i].abs().sum() > 0 for i in (0, 1, 3))
    assert student.roi_heads.box_predictor.bbox_pred.weight.grad[8:].abs().sum() == 0


@pytest.mark.parametrize("setting", [("teacher",), ((0, 1), (1, 0), (2, 2))])
def test_a_teacher_of_other_classes_is_not_evaluated_on_the_students(setting):
    opts = (K + "TEACHER.EVAL_AT_START", True, K + "TEACHER.CLASS_MAP", setting)
    with pytest.raises(ConfigError, match="EVAL_AT_START True needs.*3 classes in the same order"):
        distilling(*opts)
