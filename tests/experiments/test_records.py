"""What results.json keeps of runs, which of them count, and how they are paired."""

import re
import shutil

import pytest
from test_comparison import DISTILLED, PLAIN, Case, fc2, table_of

from crosskd_ifc.experiments.report import report_text
from crosskd_ifc.experiments.run_training import train
from crosskd_ifc.experiments.stability import stability
from crosskd_ifc.experiments.tables import Table


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_scores_are_of_the_test_set_and_the_curve_of_the_validation_set(case):
    done = train(case.runs["student", 1], str(case.folder / "script.py"))
    splits = {
        "crosskd_shapes_test": {"AP": 1.0, "AP50": 2.0, "curve": [[220, 1.0]]},
        "crosskd_shapes_val": {"AP": 3.0, "AP50": 4.0, "curve": [[220, 3.0]]},
    }
    case.results.add({("student", 1): {**done, "splits": splits}})
    entry = case.recorded()["student", 1]
    found = [entry[key] for key in ("AP", "AP50", "AP_val", "AP50_val", "curve")]
    assert found == [1.0, 2.0, 3.0, 4.0, [[220, 3.0]]]


def test_what_other_weights_made_outdated_stays_so_and_pairs_with_nothing(tmp_path):
    start = tmp_path / "start.pth"
    start.write_text("labels as they were")
    teacher = {
        "config": "quick/faster_rcnn_R_34_shapes.yaml",
        "opts": {"MODEL.WEIGHTS": str(start)},
    }

    def again():
        return Case(tmp_path, teacher=teacher, ablations=None, seeds=[1])

    again().do()
    start.write_text("corrected")
    again().do()
    found = Table(again().results.content()).difference("crosskd_ifc", "student")
    assert found.pairs == 1, "the student of the new teacher, and the plain one that needs none"
    start.unlink()  # as in a fresh clone
    clone = again()
    clone.results.add({})
    flags = [(run["arm"], bool(run.get("outdated"))) for run in clone.all_recorded()]
    assert flags == [
        *(("teacher", True), ("teacher", False), ("student", False)),
        *(("crosskd_ifc", True), ("crosskd_ifc", False)),
    ]


def test_replicates_of_an_included_file_stay_apart(case, tmp_path_factory, monkeypatch):
    other = Case(tmp_path_factory.mktemp("other"))
    for bonus in "12":
        monkeypatch.setenv("BONUS", bonus)
        other.do([("student", 1)])
        shutil.rmtree(other.folder / "runs")
    assert case.results.include(other.path) == 2
    assert [run.get("replicate", 1) for run in case.all_recorded()] == [1, 2]


def test_a_contrast_is_planned_for_the_seeds_that_both_arms_have(tmp_path):
    pairs = [["crosskd_ifc", "fc2"], ["fc2", "crosskd_ifc"]]
    taps = {"taps": {"fc2": fc2(seeds=[1, 2])}}
    case = Case(tmp_path, seeds=[1, 2, 3], ablations=taps, contrasts=pairs)
    assert case.results.content()["planned_seeds"] == [2, 2]


def test_arms_with_one_given_teacher_share_it():
    runs = [(arm, s, 1, 30.0 + s * (1 + (arm == "a"))) for arm in "ab" for s in (1, 2, 3)]
    table = table_of(*runs)
    assert table.difference("a", "b").teachers == 3
    table.arms["a"].update(taught=False, opts=["MODEL.CROSSKD.TEACHER.WEIGHTS", "x.pth"])
    assert table.difference("a", "b").teachers == table.difference("b", "a").teachers == 1


def test_a_teacher_of_the_model_zoo_is_one_for_all_seeds(tmp_path):
    zoo = "COCO-Detection/crosskd_ifc_R_18_FPN_1x.yaml"
    arms = {"student": {"config": PLAIN}, "zoo": {"config": zoo}, "taught": {"config": DISTILLED}}
    arms = Case(tmp_path, arms=arms, ablations=None).results.content()["arms"]
    assert [arm["arm"] for arm in arms if arm.get("given_teacher")] == ["zoo"]


def test_a_ratio_of_deviations_leaves_out_the_distance_of_teachers():
    scores = {"a": (30.0, 31.0, 40.0, 41.0), "b": (30.0, 32.0, 30.0, 32.0)}
    runs = [(arm, seed, 1, ap) for arm, found in scores.items() for seed, ap in enumerate(found)]
    table = table_of(*runs, versus=["b"])
    for found in table.runs.values():
        for seed, entries in found.items():
            entries[0]["teacher_seed"] = seed // 2
    assert re.search(r"\| `a` .* 0\.50 \(", "\n".join(stability(table, table.sections()[0])))


def test_a_repetition_counts_once_in_a_difference_of_means():
    runs = [("a", 1, n, ap) for n, ap in ((1, 10.0), (2, 10.0), (3, 13.0))]
    assert table_of(*runs, ("b", 1, 4, 8.0)).difference("a", "b").values == {1: 3.5}


def test_how_many_teachers_the_seeds_of_a_difference_share_is_told(tmp_path):
    teacher = {"config": "quick/faster_rcnn_R_34_shapes.yaml", "seeds": [1, 2, 3]}
    case = Case(tmp_path, seeds=[1, 2, 3, 4, 5, 6], teacher=teacher, ablations=None)
    case.do(case.todo(arms=["student", "crosskd_ifc"]))
    assert "n = 6 (3 teachers)" in report_text(case.results.content())
