"""Comparisons: protocols, the order of runs, what is kept of them, and the report's numbers."""

import fcntl
import glob
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import portalocker
import pytest
import yaml
from helpers import load_tool
from test_recipe import make_card

from crosskd_ifc import ConfigError
from crosskd_ifc.config import class_count
from crosskd_ifc.distillation.compatibility.settings import check_crosskd_config
from crosskd_ifc.experiments.child_process import RunFailed
from crosskd_ifc.experiments.comparison import Comparison, all_runs, plan, select
from crosskd_ifc.experiments.figures import _common_points
from crosskd_ifc.experiments.protocol import load_protocol
from crosskd_ifc.experiments.report import _power, report_text, write_report
from crosskd_ifc.experiments.results import Results
from crosskd_ifc.experiments.run_training import train
from crosskd_ifc.experiments.stability import stability
from crosskd_ifc.experiments.tables import Table
from crosskd_ifc.modeling.attach import load_teacher_config

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
PLAIN, DISTILLED = "quick/faster_rcnn_R_18_shapes.yaml", "quick/crosskd_ifc_R_18_shapes.yaml"
ZOO = "COCO-Detection/crosskd_ifc_R_18_FPN_1x.yaml"

# Stands for tools/train_net.py: leaves what a finished run leaves, or fails, or takes its time.
SCRIPT = """
import json, os, sys, time
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
with open(os.path.join(os.path.dirname(folder), "order"), "a") as f:
    f.write(os.path.basename(folder) + "\\n")
if os.path.basename(folder) in os.environ.get("FAILING", "").split():
    sys.exit("the disk is on fire")
if os.environ.get("SLOW"):
    with open(os.path.join(folder, "pid"), "w") as f:
        f.write(str(os.getpid()))
    time.sleep(60)
ap = 10 + 2 * ("student" not in folder) + int(folder[-1]) + int(os.environ.get("BONUS", 0))
line = {"iteration": 100000, "time": 0.5}  # beyond SOLVER.MAX_ITER: its last
if "crosskd" in folder:
    line.update({"crosskd/fused_length": 1.5, "crosskd/factor": 1.0})
for name in ("crosskd_shapes_test", "crosskd_shapes_val"):
    line.update({name + "/bbox/AP": ap, name + "/bbox/AP50": 2 * ap})
with open(os.path.join(folder, "metrics.json"), "w") as f:
    f.write(json.dumps(line) + "\\n")
with open(os.path.join(folder, "model_final.pth"), "w") as f:
    f.write(os.environ.get("WEIGHTS", ""))
"""


def content(**changes):
    arms = {"student": {"config": PLAIN}, "crosskd_ifc": {"config": DISTILLED, "title": "IFC"}}
    protocol = {
        "name": "test",
        "seeds": [1, 2],
        "validation": "crosskd_shapes_val",
        "test": "crosskd_shapes_test",
        "teacher": {"config": "quick/faster_rcnn_R_34_shapes.yaml"},
        "arms": arms,
        "ablations": {"taps": {"fc2": fc2()}},
    }
    protocol.update(changes)
    return {key: value for key, value in protocol.items() if value is not None}


def fc2(**more):
    opts = {"MODEL.CROSSKD.FUSION.NAME": "none", "MODEL.CROSSKD.FUSION.IN_FEATURES": ["fc2"]}
    return {"config": DISTILLED, "opts": opts, "seeds": [1], **more}


class Case:
    """A protocol in a folder, with its runs and results; tools/train_net.py is SCRIPT."""

    def __init__(self, folder, **changes):
        self.folder = folder
        (folder / "protocol.yaml").write_text(yaml.safe_dump(content(**changes), sort_keys=False))
        (folder / "script.py").write_text(SCRIPT)
        self.protocol = load_protocol(str(folder / "protocol.yaml"))
        self.runs = all_runs(self.protocol, str(folder / "runs"))
        self.path = str(folder / "out" / "results.json")
        self.results = Results(self.protocol, self.path, self.runs, command="python x")
        self.lines = []
        self.jobs = 1

    def todo(self, **selection):
        return plan(self.runs, select(self.protocol, self.runs, **selection), self.results)

    def do(self, todo=None, say=None, **options):
        script = str(self.folder / "script.py")
        say = say or self.lines.append
        comparison = Comparison(self.runs, self.results, script, jobs=self.jobs, say=say, **options)
        comparison.collect()
        return comparison.train(self.todo() if todo is None else todo)

    def order(self):
        return (self.folder / "runs" / "order").read_text().split()

    def all_recorded(self):
        with open(self.path) as f:
            return json.load(f)["runs"]

    def recorded(self):
        return {(r["arm"], r["seed"]): r for r in self.all_recorded()}


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


WRONG = {
    "unknown key": (dict(seed=1), "seed: unknown key; known are name, title, seeds"),
    "missing key": (dict(test=None), "test: the key is missing"),
    "no seeds": (dict(seeds=[]), r"seeds is \[\]; List should have at least 1 item"),
    "a seed twice": (dict(seeds=[1, 1]), r"seeds is \[1, 1\]; expected different values"),
    "a seed in words": (dict(seeds=["1"]), "seeds.0 is '1'; it should be a valid integer"),
    "a seed below 0": (dict(seeds=[-1]), "seeds.0 is -1; it should be greater than or equal to 0"),
    "a name that is no folder's": (dict(name="../x"), "name is '../x'"),
    "no arms": (dict(arms={}), "arms is {}; Dictionary should have at least 1 item"),
    "an arm that is no mapping": (dict(arms={"x": "y"}), "arms.x is 'y'"),
    "an arm's unknown key": (
        dict(arms={"x": {"conf": "y"}}),
        "arms.x.conf: unknown key; known are config",
    ),
    "an arm without config": (dict(arms={"x": {"title": "y"}}), "arms.x.config: the key is miss"),
    "no such config": (dict(arms={"x": {"config": "gone.yaml"}}), "arms.x.*'gone.yaml' was not f"),
    "an unknown config key": (
        dict(arms={"x": {"config": PLAIN, "opts": {"SOLVER.STEP": 1}}}),
        "arms.x: .*SOLVER.STEP",
    ),
    "an unknown config key for all": (dict(opts={"SOLVER.STEP": 1}), "opts: .*SOLVER.STEP"),
    "nested opts": (dict(opts={"SOLVER": {"STEPS": 1}}), "opts.SOLVER is.*MODEL.CROSSKD.KEY"),
    "a key of the protocol's own": (
        dict(opts={"SEED": 1}),
        "opts.SEED: expected .* other than SEED, OUT",
    ),
    "a value of another type": (
        dict(ablations={"taps": {"fc2": fc2(opts={"SOLVER.MAX_ITER": "many"})}}),
        "ablations.taps.fc2: .*SOLVER.MAX_ITER",
    ),
    "an arm twice": (
        dict(ablations={"a": {"student": fc2()}}),
        "ablations.a.student: there is another",
    ),
    "an unknown baseline": (
        dict(ablations={"taps": {"fc2": fc2(versus="fc3")}}),
        "fc2.versus is 'fc3'; expected other arms: teacher, student",
    ),
    "a seed of an arm alone": (
        dict(ablations={"taps": {"fc2": fc2(seeds=[9])}}),
        r"fc2.seeds is \[9\]; expected some of seeds, \[1, 2\]",
    ),
    "a contrast of an unknown arm": (
        dict(contrasts=[["student", "fc3"]]),
        "contrasts.0 is 'fc3'; expected arms: teacher, student, crosskd_ifc, fc2",
    ),
    "a contrast of one arm": (dict(contrasts=[["student"]]), "contrasts.0 is .* at least 2 items"),
    "a contrast of an arm and itself": (
        dict(contrasts=[["student", "student"]]),
        "contrasts.0 is .*; expected different values",
    ),
    "a contrast of arms with one seed in common": (
        dict(contrasts=[["crosskd_ifc", "fc2"]]),
        r"contrasts.0 is \['crosskd_ifc', 'fc2'\]; expected arms with at least two seeds in common",
    ),
    "a contrast twice": (
        dict(contrasts=[["crosskd_ifc", "student"], ["crosskd_ifc", "student"]]),
        "contrasts is .*; expected different values",
    ),
    "a margin of 0": (
        dict(contrasts=[["crosskd_ifc", "student"]], margin=0),
        "margin is 0; it should be greater than 0",
    ),
    "a margin without contrasts": (dict(margin=0.5), "margin is 0.5; expected contrasts, which"),
    "no teacher": (dict(teacher=None), "crosskd_ifc: .*faster_rcnn_R_34.* teacher.config is 'mi"),
    "another teacher": (
        dict(teacher={"config": PLAIN}),
        "crosskd_ifc: its config's teacher is .* teacher.config is .*make them the same",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_protocol_is_refused_naming_file_and_key(name, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"^{tmp_path}/protocol.yaml: {message}") as error:
        Case(tmp_path, **changes)
    assert str(error.value).count("protocol.yaml") == 1


@pytest.mark.parametrize("text", ["a: [", "- a", "a: !!python/name:os.system"])
def test_what_is_no_safe_yaml_mapping_is_refused_naming_the_file(text, tmp_path):
    (tmp_path / "protocol.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/protocol.yaml: "):
        load_protocol(str(tmp_path / "protocol.yaml"))


@pytest.mark.parametrize("file", sorted(glob.glob(os.path.join(ROOT, "benchmarks/protocols/*"))))
def test_the_protocols_of_this_repository_are_sound(file):
    protocol = load_protocol(file)
    assert os.path.basename(file) == f"{protocol.name}.yaml"
    for name, arm in protocol.arms.items():
        check_crosskd_config(protocol.run(name, arm.seeds[0], "x").cfg())


def test_contrasts_and_margin_are_pairs_of_arms_and_ap(tmp_path):
    named = dict(contrasts=[["crosskd_ifc", "student"]], margin=1)
    protocol = Case(tmp_path, **named).protocol
    assert protocol.contrasts == (("crosskd_ifc", "student"),) and protocol.margin == 1.0


def test_lists_in_yaml_reach_the_config(case):
    cfg = case.runs["fc2", 1].cfg()
    assert cfg.MODEL.CROSSKD.FUSION.IN_FEATURES == ("fc2",)
    assert cfg.DATASETS.TEST == ("crosskd_shapes_test", "crosskd_shapes_val")
    assert cfg.SEED == 1 and cfg.OUTPUT_DIR.endswith("runs/fc2_1")


def test_a_student_starts_from_the_teacher_of_its_seed(case):
    run = case.runs["crosskd_ifc", 2]
    teacher = case.runs["teacher", 2]
    assert run.cfg().MODEL.CROSSKD.TEACHER.WEIGHTS == teacher.weights
    assert [needed.digest() for needed in run.needs] == [teacher.digest()]
    assert not case.runs["student", 2].needs


def test_fewer_teachers_than_seeds_are_taken_in_turn(tmp_path):
    teacher = {"config": "quick/faster_rcnn_R_34_shapes.yaml", "seeds": [7, 9]}
    case = Case(tmp_path, seeds=[7, 9, 3], teacher=teacher, ablations=None)
    assert case.todo(arms=["crosskd_ifc"], seeds=[3]) == [("teacher", 7), ("crosskd_ifc", 3)]
    assert case.runs["crosskd_ifc", 3].needs[0].folder == case.runs["teacher", 7].folder
    assert case.do() == {} and sum(name.startswith("teacher") for name in case.order()) == 2
    entries = case.recorded()
    assert [entries["crosskd_ifc", seed]["teacher_seed"] for seed in (7, 9, 3)] == [7, 9, 7]
    assert "teacher_seed" not in entries["student", 3]
    assert "share the others'" in report_text(case.results.content())


def test_a_report_tells_which_arms_have_one_given_teacher_for_all_seeds(tmp_path):
    case = Case(tmp_path, ablations=None)
    assert case.do() == {}
    content = case.results.content()
    assert "Each seed has its own teacher.\n" in report_text(content)
    for arm in content["arms"]:
        arm["opts"] += ["MODEL.CROSSKD.TEACHER.WEIGHTS", "x.pth"] * (arm["arm"] == "crosskd_ifc")
    told = "Each seed has its own teacher, but that of crosskd_ifc is one for all seeds."
    assert told in report_text(content)


def test_what_changes_the_teachers_model_is_told_to_its_students(tmp_path):
    opts = {"MODEL.FPN.OUT_CHANNELS": 32, "SOLVER.MAX_ITER": 10}
    theirs = {"MODEL.RESNETS.DEPTH": 50, "INPUT.FORMAT": "RGB"}
    teacher = {"config": "quick/faster_rcnn_R_34_shapes.yaml", "opts": theirs}
    protocol = Case(tmp_path, opts=opts, teacher=teacher).protocol
    told = protocol.run("crosskd_ifc", 1, "x").cfg().MODEL.CROSSKD.TEACHER.OPTS
    wanted = {"MODEL.FPN.OUT_CHANNELS": "32", "MODEL.RESNETS.DEPTH": "50", "INPUT.FORMAT": "RGB"}
    assert dict(zip(told[::2], told[1::2])) == wanted


def test_a_teacher_has_the_classes_of_the_data_that_a_protocol_names(tmp_path):
    card = Path(make_card(tmp_path))
    card.write_text(card.read_text().replace("name: recipe", "name: of_a_protocol"))
    opts = {"DATASETS.CARDS": [str(card)], "DATASETS.TRAIN": ["of_a_protocol_train"]}
    teacher = {"config": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "opts": {}}
    arms = {"crosskd": {"config": "COCO-Detection/crosskd_R_18_FPN_1x.yaml"}}
    names = dict(test="of_a_protocol_test", validation="of_a_protocol_val")
    options = dict(arms=arms, teacher=teacher, ablations=None, **names)
    student = Case(tmp_path, opts=opts, **options).protocol.run("crosskd", 1, "x").cfg()
    loaded, _ = load_teacher_config(student)
    assert class_count(student)[1] == class_count(loaded)[1] == 3


def test_a_report_needs_no_photos(tmp_path):
    card = Path(make_card(tmp_path))
    text = card.read_text().replace("name: recipe", "name: gone").replace("root: .", "root: photos")
    card.write_text(f"{text}classes: [a, b, c]\n")
    shutil.copytree(tmp_path, tmp_path / "photos")
    opts = {"DATASETS.CARDS": [str(card)], "DATASETS.TRAIN": ["gone_train"]}
    arms = {"plain": {"config": "COCO-Detection/faster_rcnn_R_18_FPN_1x.yaml"}}
    given = [str(card)], ["gone_train"], str(tmp_path / "script.py")
    keys = ("CONFIG_FILE", "OPTS", "WEIGHTS")
    opts_of_teacher = ["DATASETS.CARDS", repr(given[0]), "DATASETS.TRAIN", repr(given[1])]
    values = ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", opts_of_teacher, given[2])
    distilled = {f"MODEL.CROSSKD.TEACHER.{k}": v for k, v in zip(keys, values)}
    arms["distilled"] = {"config": "COCO-Detection/crosskd_R_18_FPN_1x.yaml", "opts": distilled}
    options = dict(opts=opts, arms=arms, teacher=None, ablations=None)
    before = Case(tmp_path, **options)
    assert before.do() == {}
    shutil.rmtree(tmp_path / "photos")
    after = Case(tmp_path, **options)
    assert after.protocol.run("plain", 1, "x").cfg().MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert not any(entry.get("outdated") for entry in after.results.content()["runs"])


def test_a_teacher_of_the_model_zoo_or_given_weights_needs_no_run(tmp_path):
    weights = {"MODEL.CROSSKD.TEACHER.WEIGHTS": "teacher.pth"}
    arms = {"zoo": {"config": ZOO}, "given": {"config": DISTILLED, "opts": weights}}
    protocol = Case(tmp_path, arms=arms, teacher=None, ablations=None, validation=None).protocol
    assert not protocol.taught and "teacher" not in protocol.arms
    assert protocol.run("zoo", 1, "x").cfg().DATASETS.TEST == ("crosskd_shapes_test",)


def test_main_arms_come_before_ablations_and_all_arms_of_a_seed_before_the_next(case):
    first = [("teacher", 1), ("student", 1), ("crosskd_ifc", 1)]
    second = [("teacher", 2), ("student", 2), ("crosskd_ifc", 2)]
    assert list(case.runs) == [*first, *second, ("fc2", 1)]
    assert case.do() == {}
    assert case.order() == [f"{arm}_{seed}" for arm, seed in case.runs]


def test_a_selection_brings_the_teachers_that_it_needs(case):
    assert case.todo(arms=["student"], seeds=[2]) == [("student", 2)]
    assert case.todo(arms=["fc2"]) == [("teacher", 1), ("fc2", 1)]
    with pytest.raises(ConfigError, match="no arm 'fc3'; there are teacher, student"):
        case.todo(arms=["fc3"])
    with pytest.raises(ConfigError, match="no seed '7'; there are 1, 2"):
        case.todo(seeds=[7])


def test_finished_runs_are_not_done_again(case):
    case.do(case.todo(seeds=[1]))
    assert case.todo() == [(arm, 2) for arm in ("teacher", "student", "crosskd_ifc")]
    # Nor if the results were lost, but the folders weren't, ...
    os.remove(case.path)
    again = Case(case.folder)
    again.do([])
    assert again.todo() == case.todo() and again.recorded().keys() == set(case.runs) - set(
        case.todo()
    )
    # ... or the other way round, as in a fresh clone.
    shutil.rmtree(case.folder / "runs")
    assert Case(case.folder).todo(seeds=[1]) == []


def test_a_teacher_whose_folder_is_gone_is_trained_again_only_for_its_students(case):
    case.do(case.todo(seeds=[1], arms=["teacher", "student"]))
    shutil.rmtree(case.folder / "runs")
    assert case.todo(seeds=[1], arms=["teacher", "student"]) == []
    assert case.todo(seeds=[1], arms=["crosskd_ifc"]) == [("teacher", 1), ("crosskd_ifc", 1)]
    case.do(case.todo(seeds=[1], arms=["teacher"]))
    os.makedirs(case.folder / "runs" / "teacher_1", exist_ok=True)
    assert case.todo(seeds=[1], arms=["fc2"]) == [("teacher", 1), ("fc2", 1)]


def test_a_teacher_without_its_weights_is_trained_again(case):
    case.do(case.todo(seeds=[1], arms=["teacher"]))
    os.remove(case.runs["teacher", 1].weights)
    assert case.do(case.todo(seeds=[1], arms=["fc2"])) == {}
    assert case.order() == ["teacher_1", "teacher_1", "fc2_1"]


def test_an_entry_has_both_splits_and_what_it_was_made_with(case):
    case.do(case.todo(seeds=[1], arms=["student"]))
    entry = case.recorded()["student", 1]
    scores = {key: entry[key] for key in ("AP", "AP50", "AP_val", "AP50_val")}
    assert scores == {"AP": 11, "AP50": 22, "AP_val": 11, "AP50_val": 22}
    assert entry["config_sha256"] == case.runs["student", 1].digest()
    assert entry["curve"] == [[220, 11]] and entry["seconds_per_step"] == 0.5
    assert {"seconds", "versions", "hardware", "iterations"} <= set(entry)
    case.do(case.todo(seeds=[1], arms=["crosskd_ifc"]))
    logged = case.recorded()["crosskd_ifc", 1]["statistics"]
    assert logged == {"fused_length": 1.5, "factor": 1.0} and entry["statistics"] == {}


def test_a_run_of_earlier_settings_is_marked_and_stays(case):
    case.do(case.todo(seeds=[1]))
    old = case.recorded()
    changed = Case(case.folder, opts={"SOLVER.BASE_LR": 0.5})
    assert [key for key in changed.todo() if key[1] == 1] == [k for k in old]
    changed.do([("student", 1)])
    first, second = [run for run in changed.all_recorded() if run["arm"] == "student"]
    assert first == {**old["student", 1], "outdated": True}
    assert second["config_sha256"] != first["config_sha256"] and "outdated" not in second
    assert "replicate" not in second  # the first of its settings
    assert changed.recorded()["fc2", 1] == {**old["fc2", 1], "outdated": True}
    text = " ".join(report_text(changed.results.content()).split())
    assert "| `fc2` | fc2 | 0 | | | 13.0* | |" in text  # in no mean
    assert "| `fc2` | +" not in text  # nor difference
    assert "4 runs are of earlier settings" in text
    # Settings that are as they were once find their runs again.
    assert Case(case.folder).todo(seeds=[1]) == []


def test_runs_that_diverge_are_counted_where_the_protocol_asks(tmp_path):
    versus = {"config": DISTILLED, "versus": ["student"]}
    arms = {"student": {"config": PLAIN}, "crosskd_ifc": versus}
    case = Case(tmp_path, seeds=[1, 2, 3, 4], arms=arms, ablations={}, stability=True)
    assert case.runs["student", 1].may_diverge and not case.runs["teacher", 1].may_diverge
    case.do()
    told = case.results.content()
    assert told["stability"] is True
    scores = {
        "student": [10, 12, 14, 3],
        "crosskd_ifc": [11, 12, 13, 0],
    }  # median but for the 0: 12
    for run in told["runs"]:
        if run["arm"] in scores:
            run["AP"] = scores[run["arm"]][run["seed"] - 1]
    told["runs"][-1]["diverged"] = 7
    text = " ".join(report_text(told).split())
    assert "AP is below 4.0, a third of the main arms' median" in text
    assert "| `student` | 1 of 4 | 2.00 | |" in text
    # Of three values each: F(2, 2) at 97.5 % is 39, its root 6.24.
    assert "| `crosskd_ifc` | 1 of 4 | 1.00 | 0.50 (0.08 to 3.12) of `student` |" in text
    assert "diverged" not in report_text({**told, "stability": False})


def test_a_run_that_diverged_does_not_count_if_the_protocol_no_more_asks_for_it(tmp_path):
    case = Case(tmp_path, ablations=None, stability=True)
    case.do([("student", 1), ("student", 2)])
    for file in (case.path, str(tmp_path / "runs" / "student_2" / "run.json")):
        with open(file) as f:
            found = json.load(f)
        (found if "digest" in found else found["runs"][1])["diverged"] = 7
        with open(file, "w") as f:
            json.dump(found, f)
    again = Case(tmp_path, ablations=None, stability=True)
    assert not [key for key in again.todo() if key[0] == "student"]
    plain = Case(tmp_path, ablations=None)
    assert [key for key in plain.todo() if key[0] == "student"] == [("student", 2)]
    assert (
        not plain.results.is_finished(("student", 2)) and plain.runs["student", 2].result() is None
    )


def test_a_run_that_is_made_again_is_another_replicate(case, monkeypatch):
    case.do(case.todo(seeds=[1]))
    monkeypatch.setenv("BONUS", "3")
    shutil.rmtree(case.folder / "runs")
    case.do([("student", 1), ("teacher", 1), ("crosskd_ifc", 1)])
    runs = [run for run in case.all_recorded() if run["arm"] == "crosskd_ifc"]
    assert [(run["AP"], run.get("replicate")) for run in runs] == [(13, None), (16, 2)]
    case.do([])  # collects the folders' runs: they are there already
    assert len(case.all_recorded()) == 7
    text = " ".join(report_text(case.results.content()).split())
    assert "| `crosskd_ifc` | IFC | 1 (2 runs) | 14.5 | 29.0 | 14.5 | 14.5 |" in text
    assert "| `crosskd_ifc` | +2.0, n = 1 (2 pairs) |" in text
    assert "| `fc2` | +2.0, n = 1 | +0.0, n = 1 |" in text  # only of the first
    assert "7 runs" in text and "Runs of a seed that were made again" in text


def test_a_replicate_has_the_number_of_its_teacher(case, monkeypatch):
    monkeypatch.setenv("WEIGHTS", "first")
    case.do([("teacher", 1), ("fc2", 1)])
    monkeypatch.setenv("WEIGHTS", "second")
    shutil.rmtree(case.folder / "runs")
    case.do([("teacher", 1), ("crosskd_ifc", 1)])
    found = {(r["arm"], r["AP"]): r.get("replicate", 1) for r in case.all_recorded()}
    assert found == {("teacher", 13): 2, ("fc2", 13): 1, ("crosskd_ifc", 13): 2}


def test_runs_of_another_machine_can_be_included(case, tmp_path_factory, monkeypatch):
    case.do(case.todo(seeds=[1]))
    monkeypatch.setenv("BONUS", "1")
    other = Case(tmp_path_factory.mktemp("other"))
    other.do(other.todo(arms=["teacher", "student"]))
    assert case.results.include(other.path) == 4
    assert case.results.include(other.path) == 0  # they are there
    found = [(r["arm"], r["seed"], r.get("replicate", 1)) for r in case.all_recorded()]
    # What came together has one number: of seed 1 the second, of seed 2 the first.
    assert found[:4] == [("teacher", 1, 1), ("teacher", 1, 2), ("teacher", 2, 1), ("student", 1, 1)]
    assert found[4:6] == [("student", 1, 2), ("student", 2, 1)]
    wrong = Case(tmp_path_factory.mktemp("wrong"), name="another")
    wrong.do([("student", 1)])
    with pytest.raises(ConfigError, match="holds the results of 'another', not of 'test'"):
        case.results.include(wrong.path)


def test_runs_that_no_report_could_read_are_not_included(case, tmp_path):
    case.do([("student", 1)])
    before = Path(case.path).read_text()
    content = json.loads(before)
    del content["runs"][0]["AP"]
    (tmp_path / "damaged.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="damaged.json: not the results of a comparison.*'AP'"):
        case.results.include(str(tmp_path / "damaged.json"))
    assert Path(case.path).read_text() == before


def test_a_file_that_has_grown_can_be_included_again(case, tmp_path_factory, monkeypatch):
    case.do([("teacher", 1), ("crosskd_ifc", 1)])
    monkeypatch.setenv("BONUS", "1")
    other = Case(tmp_path_factory.mktemp("other"))
    other.do([("teacher", 1), ("crosskd_ifc", 1)])
    assert case.results.include(other.path) == 2
    other.do([("fc2", 1)])
    assert case.results.include(other.path) == 1
    found = {(r["arm"], r.get("replicate", 1)) for r in case.all_recorded()}
    both = {("teacher", n) for n in (1, 2)} | {("crosskd_ifc", n) for n in (1, 2)}
    assert found == both | {("fc2", 2)}  # it belongs to the second


def table_of(*runs, versus=()):
    """A table of runs (arm, seed, replicate, AP, and the teacher's weights where they are
    known)."""
    names = dict.fromkeys(arm for arm, *_ in runs)
    arms = [{"arm": n, "title": n, "group": "", "versus": [*versus]} for n in names]
    keys = ("arm", "seed", "replicate", "AP", "teacher_sha256")
    entries = [dict(zip(keys, run), AP50=0.0, curve=[]) for run in runs]
    return Table({"arms": arms, "runs": entries})


def test_replicates_are_paired_by_number_and_averaged_by_seed():
    one = [("a", 1, 1, 10.0), ("a", 1, 2, 20.0), ("a", 2, 1, 5.0)]
    other = [("b", 1, 2, 19.0), ("b", 1, 3, 1.0), ("b", 2, 1, 7.0)]
    table = table_of(*one, *other)
    assert table.scores("a") == {1: 15.0, 2: 5.0}
    found = table.difference("a", "b")
    assert found.values == {1: 1.0, 2: -2.0} and found.pairs == 2
    # Without a number in common the difference is that of the means.
    table = table_of(("a", 1, 1, 10.0), ("a", 1, 2, 20.0), ("b", 1, 3, 11.0))
    found = table.difference("a", "b")
    assert found.values == {1: 4.0} and found.pairs == 0


def test_runs_that_learned_from_the_same_teacher_are_paired_whatever_their_numbers():
    first = [("a", 1, 1, 10.0, "A"), ("a", 1, 2, 20.0, "B"), ("a", 1, 3, 14.0, "A")]
    table = table_of(*first, ("b", 1, 1, 17.0, "B"), ("b", 1, 2, 11.0, "A"))
    found = table.difference("a", "b")
    assert found.values == {1: (3.0 + 1.0) / 2} and found.pairs == 2
    # With no teacher in common there is no pair, though the numbers agree.
    table = table_of(("a", 1, 1, 10.0, "A"), ("b", 1, 1, 17.0, "B"))
    assert table.difference("a", "b").pairs == 0


def test_a_run_that_only_repeats_another_still_has_its_pair():
    plain = [("a", 1, 1, 11.0), ("a", 1, 2, 11.0)]
    table = table_of(*plain, ("b", 1, 1, 13.0), ("b", 1, 2, 16.0))
    found = table.difference("b", "a")
    assert found.values == {1: 3.5} and found.pairs == 2
    table = table_of(*plain, ("b", 1, 1, 13.0), ("b", 1, 2, 13.0))
    assert table.difference("b", "a").pairs == 1  # all of it only repeats


def test_a_run_that_repeats_another_to_the_last_digit_counts_once():
    table = table_of(("a", 1, 1, 10.0), ("a", 1, 2, 10.0), ("a", 1, 3, 13.0))
    assert table.scores("a") == {1: 11.5} and len(table.current("a")[1]) == 2


def test_a_seed_that_an_arm_no_longer_has_is_in_no_mean(case):
    case.do(case.todo(arms=["student"]))
    arms = {**content()["arms"], "student": {"config": PLAIN, "seeds": [2]}}
    later = Case(case.folder, arms=arms, ablations=None)
    later.results.add({})
    text = " ".join(report_text(later.results.content()).split())
    assert "| `student` | student | 1 | 12.0 | 24.0 | 11.0* / 12.0 | 12.0 |" in text


def test_the_command_stays_that_of_the_runs_until_others_are_added(case):
    case.do([("student", 1)])
    later = Results(case.protocol, case.path, case.runs, command="python y")
    later.add({})
    assert "    python x" in report_text(later.content())
    case.results = later
    case.do([("student", 2)])
    assert "    python y" in report_text(later.content())


def test_results_of_another_protocol_are_refused(case):
    case.do([("student", 1)])
    with pytest.raises(ConfigError, match="holds the results of 'test', not of 'another'"):
        Case(case.folder, name="another")


def test_a_teacher_that_was_trained_again_to_other_weights_is_told(case, monkeypatch):
    case.do(case.todo(seeds=[1]))
    first = case.recorded()
    assert first["crosskd_ifc", 1]["teacher_sha256"] == first["teacher", 1]["teacher_sha256"]
    assert "teacher_sha256" not in first["student", 1]
    told = "Seed 1: its teacher was trained more than once"
    assert told not in report_text(case.results.content())
    monkeypatch.setenv("WEIGHTS", "others")
    os.remove(case.runs["teacher", 1].weights)
    case.do([("teacher", 1)])
    shutil.rmtree(case.runs["fc2", 1].folder)
    case.do([("fc2", 1)])
    assert case.recorded()["fc2", 1]["teacher_sha256"] != first["fc2", 1]["teacher_sha256"]
    assert told in report_text(case.results.content())


def test_two_processes_can_share_the_results(case):
    other = Case(case.folder)
    case.do([("student", 1)])
    other.do([("student", 2)])
    assert other.recorded().keys() == {("student", 1), ("student", 2)}


def test_results_that_can_not_be_locked_are_told_and_written(case, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(portalocker.portalocker, "LOCKER", no_locks)
    assert case.do(case.todo(seeds=[1], arms=["student"])) == {}
    assert case.recorded().keys() == {("student", 1)}
    assert ".results: it can't be locked" in caplog.text
    assert "no other comparison may write to it at the same time" in caplog.text


def test_comparisons_with_other_run_folders_can_share_the_results(case):
    done = train(case.runs["student", 1], str(case.folder / "script.py"))
    keys = [(arm, seed) for arm in ("student", "crosskd_ifc") for seed in (1, 2)]

    def add(folder, keys):
        runs = all_runs(case.protocol, str(case.folder / folder))
        results = Results(case.protocol, case.path, runs, command="python x")
        for key in keys * 10:
            results.add({key: done})

    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=add, args=(name, keys[i::2])) for i, name in enumerate("ab")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert case.recorded().keys() == set(keys)


def test_entries_of_arms_that_are_gone_stay_but_are_not_reported(case):
    case.do([("student", 1), ("teacher", 1), ("fc2", 1)])
    later = Case(case.folder, ablations=None)
    later.do([("student", 2)])
    assert ("fc2", 1) in later.recorded()
    assert "fc2" not in report_text(later.results.content())


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": [{"arm": "x"}]}'])
def test_a_file_that_holds_no_results_is_refused(text, case):
    os.makedirs(os.path.dirname(case.path))
    with open(case.path, "w") as f:
        f.write(text)
    with pytest.raises(ConfigError, match="results.json: not the results of a comparison"):
        Case(case.folder)


def test_a_failed_run_stops_only_what_needs_it(case, monkeypatch):
    monkeypatch.setenv("FAILING", "teacher_1")
    failed = case.do()
    assert set(failed) == {("teacher", 1), ("crosskd_ifc", 1), ("fc2", 1)}
    assert "disk is on fire" in failed["teacher", 1]
    assert failed["fc2", 1] == "fc2, seed 1: not run, its teacher failed"
    assert case.recorded().keys() == set(case.runs) - set(failed)
    monkeypatch.delenv("FAILING")
    assert Case(case.folder).do() == {}


def test_several_runs_go_side_by_side_but_none_before_its_teacher(case):
    case.jobs = 3
    assert case.do() == {}
    order = case.order()
    assert sorted(order) == sorted(f"{arm}_{seed}" for arm, seed in case.runs)
    for student, teacher in (("crosskd_ifc_1", "teacher_1"), ("crosskd_ifc_2", "teacher_2")):
        assert order.index(student) > order.index(teacher)


def test_an_interruption_ends_the_processes_of_the_runs(case, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    pid = case.folder / "runs" / "teacher_1" / "pid"
    case.jobs = 2

    def say(line):
        if line.startswith("student"):
            while not pid.exists() or not pid.read_text():
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.do(say=say)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    monkeypatch.delenv("SLOW")
    assert Case(case.folder).do() == {}


def test_weights_of_students_can_be_discarded(case):
    case.do(case.todo(seeds=[1]), discard_weights=True)
    kept = [key for key, run in case.runs.items() if os.path.exists(run.weights)]
    assert kept == [("teacher", 1)] and case.todo(seeds=[1]) == []


def test_a_student_whose_weights_another_process_has_discarded_is_not_trained_again(case):
    todo = case.todo(seeds=[1])
    other = Case(case.folder)  # with the same plan
    case.do(todo, discard_weights=True)
    order = case.order()
    assert other.do(todo, discard_weights=True) == {}
    assert case.order() == order and len(case.all_recorded()) == len(order)


def test_students_of_a_teacher_that_started_from_other_weights_are_outdated(tmp_path):
    start = tmp_path / "start.pth"
    start.write_text("labels as they were")
    opts = {"MODEL.WEIGHTS": str(start)}
    teacher = {"config": "quick/faster_rcnn_R_34_shapes.yaml", "opts": opts}
    case = Case(tmp_path, teacher=teacher, ablations=None, seeds=[1])
    assert case.do() == {} and case.todo() == []
    start.write_text("corrected")
    again = Case(tmp_path, teacher=teacher, ablations=None, seeds=[1])
    assert again.todo() == [("teacher", 1), ("crosskd_ifc", 1)]
    assert again.do() == {} and again.todo() == []
    outdated = [(run["arm"], bool(run.get("outdated"))) for run in again.all_recorded()]
    assert outdated == [
        *(("teacher", True), ("teacher", False), ("student", False)),
        *(("crosskd_ifc", True), ("crosskd_ifc", False)),
    ]


def arms_of_which_one_teaches(folder, opts=None):
    """The distilled student has learned from the plain one, which has ``opts``."""
    weights = {"MODEL.CROSSKD.TEACHER.WEIGHTS": str(folder / "runs/student_1/model_final.pth")}
    taught = {"config": DISTILLED, "opts": weights}
    arms = {"taught": taught, "student": {"config": PLAIN, "opts": opts or {}}}
    return Case(folder, arms=arms, teacher=None, ablations=None, seeds=[1])


def test_an_arm_that_teaches_another_comes_first_and_keeps_its_weights(tmp_path):
    case = arms_of_which_one_teaches(tmp_path)
    case.jobs = 2
    assert case.do(discard_weights=True) == {}
    assert case.order() == ["student_1", "taught_1"]
    assert os.path.exists(case.runs["student", 1].weights)
    assert not os.path.exists(case.runs["taught", 1].weights)


def test_an_arm_that_teaches_another_is_trained_again_if_its_weights_are_gone(tmp_path):
    case = arms_of_which_one_teaches(tmp_path)
    assert case.do(case.todo(arms=["student"])) == {}
    shutil.rmtree(case.runs["student", 1].folder)
    again = arms_of_which_one_teaches(tmp_path)
    assert again.todo(arms=["student"]) == []
    assert again.do(again.todo(arms=["taught"])) == {}
    assert again.order() == ["student_1", "student_1", "taught_1"]


def test_what_an_arm_has_taught_is_done_again_with_it(tmp_path, monkeypatch):
    case = arms_of_which_one_teaches(tmp_path)
    assert case.do() == {} and case.todo() == []
    monkeypatch.setenv("WEIGHTS", "others")
    again = arms_of_which_one_teaches(tmp_path, opts={"SOLVER.WEIGHT_DECAY": 0.5})
    again.results.content()  # reads what the runs start from, as it is before
    assert again.todo(arms=["student"]) == [("student", 1)]
    assert again.do() == {} and again.order()[2:] == ["student_1", "taught_1"]
    assert again.todo() == []
    current = [run["arm"] for run in again.all_recorded() if not run.get("outdated")]
    assert current == ["taught", "student"]


def test_arms_that_start_from_each_others_weights_are_one_error(tmp_path):
    key, files = "MODEL.CROSSKD.TEACHER.WEIGHTS", str(tmp_path / "runs/{}_1/model_final.pth")
    arms = {
        name: {"config": DISTILLED, "opts": {key: files.format(other)}}
        for name, other in (("a", "b"), ("b", "a"))
    }
    case = Case(tmp_path, arms=arms, teacher=None, ablations=None, seeds=[1])
    with pytest.raises(ConfigError, match="a, seed 1, b, seed 1: each is to start from weights"):
        case.do()


def test_a_student_under_way_starts_anew_if_its_teacher_was_trained_again(case, monkeypatch):
    case.do([("teacher", 1)])
    run, script = case.runs["crosskd_ifc", 1], str(case.folder / "script.py")
    monkeypatch.setenv("FAILING", "crosskd_ifc_1")
    with pytest.raises(RunFailed):
        train(run, script)
    (case.folder / "runs" / "crosskd_ifc_1" / "of the first teacher").touch()
    with open(case.runs["teacher", 1].weights, "w") as f:
        f.write("others")
    monkeypatch.delenv("FAILING")
    train(run, script)
    assert "of the first teacher" not in os.listdir(run.folder)


def test_a_contrast_has_no_verdict_before_all_its_planned_seeds_are_there(tmp_path):
    case = Case(tmp_path, seeds=[1, 2, 3], contrasts=[["crosskd_ifc", "student"]], margin=0.5)
    for seeds, verdict in (([1, 2], "2 of 3 seeds"), ([3], "unresolved")):
        case.do(case.todo(arms=["student", "crosskd_ifc"], seeds=seeds))
        recorded = case.results.content()
        for i, run in enumerate(recorded["runs"]):
            run["AP"] = 10 + 3 * (run["arm"] == "crosskd_ifc") + i % 2
        text = " ".join(report_text(recorded).split())
        assert f"| {verdict} |" in text
        assert ("as long as planned seeds are missing" in text) == (seeds == [1, 2])


def test_a_report_without_a_run_of_today_s_arms_is_one_error(case):
    case.do([("student", 1)])
    later = Case(case.folder, arms={"renamed": {"config": PLAIN}}, ablations=None, teacher=None)
    with pytest.raises(ConfigError, match="test: no run in results.json is of an arm"):
        write_report(later.results.content(), str(case.folder / "out"))


def test_diverged_runs_count_each_and_stay_out_of_curves_and_of_the_median():
    runs = [("a", 1, 1, 0.0), ("a", 1, 2, 0.0), ("a", 2, 1, 30.0), ("a", 3, 1, 28.0)]
    runs += [("b", s, 1, 31.0 + s) for s in (1, 2, 3)]
    table = table_of(*runs, ("c", 1, 1, 0.2), ("c", 2, 1, 0.0), versus=["b"])
    for name, entries in table.runs.items():
        for found in entries.values():
            for run in found:
                run["curve"] = [[7, 0.0]] if run["AP"] == 0 else [[220, run["AP"]]]
                run.update({"diverged": 7} if run["AP"] == 0 else {})
    assert len(table.current("a")[1]) == 2
    assert _common_points(table, "a", {1, 2, 3}) == {"iterations": [220], "AP": [[30.0], [28.0]]}
    (section,) = table.sections()
    text = " ".join(" ".join(stability(table, section)).split())
    assert "below 10.3" in text  # a third of 31, the median of 30, 28, 32, 33, 34 and 0.2
    assert "| `a` | 2 of 4 |" in text and "| `c` | 2 of 2 |" in text
    # An arm that differences are taken to has a ratio, also from another table.
    lines = stability(table, section._replace(arms=["a"]))
    assert "of `b`" in " ".join(lines)


def test_planned_runs_that_are_not_there_are_told(case, monkeypatch):
    monkeypatch.setenv("FAILING", "crosskd_ifc_2")
    case.do()
    report = " ".join(report_text(case.results.content()).split())
    planned = len(case.results.protocol.arms["crosskd_ifc"].seeds)
    assert f"Planned runs that aren't there: `crosskd_ifc` 1 of {planned}. If they" in report
    monkeypatch.delenv("FAILING")
    case.do()
    assert "aren't there" not in report_text(case.results.content())


def test_weights_of_runs_that_ended_earlier_are_discarded_too(case):
    case.do()
    case.do([], discard_weights=True)
    left = {key for key, run in case.runs.items() if os.path.exists(run.weights)}
    assert left == {key for key in case.runs if key[0] == "teacher"}


def test_power_is_that_of_all_differences_with_independent_units():
    runs = [(arm, seed, 1, 30.0 + seed * (arm == "a")) for arm in "abc" for seed in range(1, 7)]
    table = table_of(*runs, versus=["b"])
    for found in table.runs.values():
        for seed, entries in found.items():
            entries[0].update(teacher_seed=1 + seed % 3)
    # Of "c", four seeds with two teachers: its units aren't independent.
    for seed in (3, 6):
        del table.runs["c"][seed]
    text = "\n".join(_power(table, table.sections()[0]))
    assert "from teacher to teacher" in text and "2 of 3 pooled" in text


def test_where_most_runs_fail_the_usual_settings_say_which():
    """Of "b", two runs learn nothing; the median of its own group is 0.1."""
    runs = [("a", seed, 1, 30.0 + seed) for seed in (1, 2, 3)]
    table = table_of(*runs, ("b", 1, 1, 0.1), ("b", 2, 1, 0.0), ("b", 3, 1, 29.0))
    table.arms["b"]["group"] = "learning rate times 4"
    text = "\n".join(stability(table, table.sections()[1]))
    assert "below 10.7, a third" in text and "| `b`   | 2 of 3 " in text


def test_a_replicate_of_one_seed_leaves_the_ratio_of_deviations_nearly_as_it_was():
    scores = {"a": (30.0, 31.0, 32.0, 33.0), "b": (30.0, 32.0, 34.0, 36.0)}
    runs = [(arm, seed, 1, ap) for arm, found in scores.items() for seed, ap in enumerate(found)]

    def ratio(*more):
        table = table_of(*runs, *more, versus=["b"])
        for found in table.runs.values():  # each seed has a teacher of its own
            for seed, entries in found.items():
                for run in entries:
                    run.update(teacher_seed=seed, curve=[[220, run["AP"]]])
        text = "\n".join(stability(table, table.sections()[0]))
        (line,) = [x for x in text.splitlines() if x.startswith("| `a`")]
        return float(re.search(r"([0-9.]+) \(.* of `b`", line).group(1))

    assert ratio() == 0.5
    assert ratio(("b", 0, 2, 30.02)) == 0.5


def test_runs_of_old_share_the_teachers_of_later_ones():
    runs = [(arm, seed, 1, 30.0 + seed * (arm == "a")) for arm in "ab" for seed in range(1, 7)]
    table = table_of(*runs)
    for found in table.runs.values():
        for seed, entries in found.items():  # the first three don't name their own teacher
            entries[0].update({"teacher_seed": seed - 3} if seed > 3 else {})
    assert len(table.difference("a", "b").units) == 6, "other arms have none"
    for arm in table.arms.values():
        arm["taught"] = True
    assert table.difference("a", "b").units == (2.5, 3.5, 4.5)


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"MODEL.CROSSKD.LOSS.TEMPERATURE": -1.0}, "crosskd_ifc: MODEL.CROSSKD.LOSS.TEMPERATURE"),
        ({"MODEL.CROSSKD.FUSION.NAME": "meen"}, "crosskd_ifc: .*FUSION.NAME is 'meen'"),
        ({"SOLVER.EMA_DECAY": 1.5}, "crosskd_ifc: SOLVER.EMA_DECAY is 1.5"),
    ],
)
def test_settings_that_can_not_work_are_refused_before_the_teacher_trains(opts, message, tmp_path):
    case = Case(tmp_path, arms={"crosskd_ifc": {"config": DISTILLED, "opts": opts}}, ablations=None)
    comparison = Comparison(case.runs, case.results, "")
    with pytest.raises(ConfigError, match=f"protocol.yaml: {message}"):
        comparison.check(case.todo())


def test_what_can_not_run_here_is_refused_before_anything_runs(tmp_path):
    case = Case(tmp_path, test="no_such_data")
    comparison = Comparison(case.runs, case.results, "")
    with pytest.raises(ConfigError, match="protocol.yaml: teacher: DATASETS.TEST: .*no_such_data"):
        comparison.check(case.todo())


def test_a_report_says_in_how_many_runs_a_statistic_was_logged(case):
    case.do()
    with open(case.path) as f:
        recorded = json.load(f)
    first, second = [run for run in recorded["runs"] if run["arm"] == "crosskd_ifc"]
    first["statistics"] = {"fused_length": 1.0, "fused_cosine": 0.4}
    second["statistics"] = {"fused_length": 2.0}
    assert Table(recorded).logged("crosskd_ifc", "fused_cosine") == {first["seed"]: 0.4}
    rows = [" ".join(line.split()) for line in report_text(recorded).splitlines()]
    assert "| `crosskd_ifc` | 1 to 2 | 1.50 | 0.40 |" in rows


def test_a_report_opens_with_the_contrasts_that_were_named_beforehand(tmp_path):
    contrasts = [["crosskd_ifc", "student"], ["crosskd_ifc", "teacher"]]
    case = Case(tmp_path, contrasts=contrasts, margin=0.5)
    case.do(case.todo(arms=["student", "crosskd_ifc"]))
    with open(case.path) as f:
        recorded = json.load(f)
    assert recorded["contrasts"] == contrasts and recorded["margin"] == 0.5
    recorded["runs"] = [run for run in recorded["runs"] if run["arm"] != "teacher"]
    for run, ap in zip(recorded["runs"], (10.0, 10.0, 14.0, 14.2)):
        run["AP"] = ap
    text = " ".join(report_text(recorded).split())
    # 4.1 +- 0.1 times the quantile of one degree of freedom at 0.025 / 2, and at 0.05
    row = "| `crosskd_ifc` minus `student` | +4.1 | +1.6 to +6.6 | +3.5 to +4.7 | 2 | helps |"
    assert row in text and text.index("## Contrasts") < text.index("## Main arms")
    assert "The 2 that the protocol names" in text and "inside of ±0.5 AP" in text
    assert "1 of them have no runs of today's settings" in text


def test_what_shared_teachers_can_show_is_told_of_teachers(tmp_path):
    teacher = {"config": "quick/faster_rcnn_R_34_shapes.yaml", "seeds": [1, 2, 3]}
    case = Case(tmp_path, seeds=[1, 2, 3, 4, 5, 6], teacher=teacher)
    case.do(case.todo(arms=["student", "crosskd_ifc"]))
    with open(case.path) as f:
        recorded = json.load(f)
    gains = dict(zip(range(1, 7), (1.0, 1.0, 4.0, 3.0, 3.0, 4.0)))  # teachers: 2, 2, 4
    for run in recorded["runs"]:
        run["AP"] = 10 + (gains[run["seed"]] if run["arm"] == "crosskd_ifc" else 0)
    text = " ".join(report_text(recorded).split())
    assert "A difference varies from teacher to teacher by 1.2" in text
    assert "3 teachers show a true one of" in text and "seeds show" not in text


def test_a_title_with_dollar_signs_is_no_formula(tmp_path):
    taps = {"$2 and $\\frac": {"fc2": fc2()}}
    case = Case(tmp_path, title="for $5 or $\\broken{", ablations=taps)
    case.do()
    text = open(write_report(case.results.content(), str(tmp_path / "out"))).read()
    assert "# for $5 or $\\broken{" in text and "$2 and $\\frac" in text


def test_a_report_needs_only_the_json(case):
    case.do()
    with open(case.path) as f:
        recorded = json.load(f)
    shutil.rmtree(case.folder / "runs")
    text = open(write_report(recorded, str(case.folder / "out"))).read()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    row = "| `crosskd_ifc` | IFC | 2 | 13.5 ± 0.7 | 27.0 ± 1.4 | 13.0 / 14.0 | 13.5 ± 0.7 |"
    assert row in rows
    assert "| `crosskd_ifc` | +2.0, n = 2 |" in rows  # equal differences, so no test
    assert "| `fc2` | fc2 | 1 | 13.0 | 26.0 | 13.0 | 13.0 |" in rows
    assert "| `fc2` | +2.0, n = 1 | +0.0, n = 1 |" in rows
    assert "| `crosskd_ifc` | 2 | 1.50 |" in rows and "| arm | n | norm ratio |" in rows
    assert "python x" in text and "7 runs" in text
    assert (case.folder / "out" / "differences.png").stat().st_size > 5000


def test_a_report_has_curves_where_students_were_evaluated_more_than_once(case):
    case.do()
    content, out = case.results.content(), case.folder / "out"
    last = {id(run): run["curve"] for run in content["runs"]}
    for run in content["runs"]:
        run["curve"] = [[1, 5.0], *run["curve"]]
    assert "(curves.png)" in open(write_report(content, str(out))).read()
    assert (out / "curves.png").stat().st_size > 5000
    for run in content["runs"]:
        run["curve"] = last[id(run)]
    assert "curves.png" not in open(write_report(content, str(out))).read()
    assert not (out / "curves.png").exists()


def test_an_option_that_takes_several_values_may_be_repeated():
    words = ["p.yaml", "--include", "a.json", "b.json", "--include", "c.json"]
    words += ["--seeds", "1", "--seeds", "2", "3", "--arms", "x", "--arms", "y"]
    words += ["--executor", "local", "--cluster", "a=1", "--cluster", "b=2"]
    args = load_tool("compare").parse_args(words)
    assert (args.include, args.seeds) == (["a.json", "b.json", "c.json"], [1, 2, 3])
    assert (args.arms, args.cluster) == (["x", "y"], ["a=1", "b=2"])
    assert load_tool("compare").parse_args(["p.yaml"]).include == []


def test_the_command_of_a_report_has_the_path_and_the_options_of_its_runs():
    tool = load_tool("compare")

    def command(*arguments):
        return tool.reproduction(tool.parse_args(list(arguments)))

    own = os.path.join(ROOT, "benchmarks", "protocols", "shapes_fcos.yaml")
    file = "benchmarks/protocols/shapes_fcos.yaml"
    assert command(own) == f"python tools/compare.py {file}"
    assert command(own, "--report-only") == command(own, "--seeds", "1") == command(own)
    with pytest.raises(SystemExit):  # a report is of all runs
        command(own, "--report-only", "--seeds", "1")
    options = ["--jobs", "2", "--num-gpus", "4", "--runs", "my runs"]
    told = "python tools/compare.py /home/me/x.yaml --jobs 2 --num-gpus 4 --runs 'my runs'"
    assert command("/home/me/x.yaml", *options) == told


@pytest.fixture
def tiny(tiny_protocol):
    tiny_protocol(
        name="tiny", seeds=[3], arms={"fc2": {**fc2(seeds=[3]), "config": "student.yaml"}}
    )
    tool = load_tool("compare")
    return lambda *arguments: tool.main(
        tool.parse_args(["tiny.yaml", "--output", "out", "--threads", "1", *arguments])
    )


def test_the_report_has_what_another_process_has_recorded_since(tiny_protocol, monkeypatch):
    tiny_protocol(
        name="tiny", seeds=[3], arms={"fc2": {**fc2(seeds=[3]), "config": "student.yaml"}}
    )
    tool = load_tool("compare")

    def do(comparison, selected):  # while this process has failed
        protocol = comparison.results.protocol
        other = Results(protocol, "out/results.json", comparison.runs, command="python x")
        versions = {"python": "3", "torch": "2", "crosskd_ifc": "0"}
        done = {"AP": 12.5, "AP50": 30.0, "curve": [[2, 12.5]]}
        done = {"splits": {"few_val": done, "few_test": done}, "iterations": 2, "seconds": 1.0}
        done.update(seconds_per_step=0.5, versions=versions, hardware="a CPU")
        other.add({("fc2", 3): {**done, "digest": comparison.runs["fc2", 3].digest()}})
        return {("teacher", 3): "no disk"}

    monkeypatch.setattr(tool.Comparison, "do", do)
    tool.main(tool.parse_args(["tiny.yaml", "--output", "out", "--threads", "1"]))
    with open("out/report.md") as f:
        assert "| 12.5 |" in f.read()


def test_a_teacher_and_its_student_train_and_are_reported(tiny, tmp_path, capsys):
    assert tiny("--device", "cpu") == []
    with open("out/results.json") as f:
        first = json.load(f)
    assert [(run["arm"], run["seed"]) for run in first["runs"]] == [("teacher", 3), ("fc2", 3)]
    assert all({"AP", "AP_val", "curve"} <= set(run) for run in first["runs"])
    assert all(run["curve"][-1][0] == 2 for run in first["runs"])
    command = "python tools/compare.py tiny.yaml --threads 1 --device cpu --output out"
    assert first["command"] == command
    assert os.path.exists("out/report.md")
    # All of it again from what is kept alone.
    shutil.rmtree("output")
    os.remove("out/report.md")
    assert tiny("--report-only") == [] and os.path.exists("out/report.md")
    capsys.readouterr()
    assert tiny() == []
    assert "2 runs, to do: 0" in capsys.readouterr().out
    with open("out/results.json") as f:
        assert json.load(f) == first


def test_a_failed_run_stops_the_whole_chain_behind_it(tmp_path, monkeypatch):
    def weights(name):
        return {"MODEL.CROSSKD.TEACHER.WEIGHTS": str(tmp_path / f"runs/{name}_1/model_final.pth")}

    arms = {"third": {"config": DISTILLED, "opts": weights("second")}}
    arms["second"] = {"config": DISTILLED, "opts": weights("student")}
    arms["student"] = {"config": PLAIN}
    case = Case(tmp_path, arms=arms, teacher=None, ablations=None, seeds=[1])
    monkeypatch.setenv("FAILING", "student_1")
    assert set(case.do()) == {(name, 1) for name in arms}


def test_where_the_card_of_a_protocol_lies_does_not_matter(tmp_path):
    found = []
    for place in ("a", "b"):
        opts = {"DATASETS.CARDS": [str(tmp_path / place / "cells.yaml")]}
        case = Case(tmp_path, opts={**opts, "DATASETS.TRAIN": ["cells_train"]})
        found.append([case.runs[arm, 1].digest() for arm in ("student", "crosskd_ifc")])
    assert found[0] == found[1]


def test_an_arms_own_opts_come_over_those_of_all_runs(tmp_path):
    arms = {"long": {"config": PLAIN, "opts": {"SOLVER.MAX_ITER": 440}}, "short": {"config": PLAIN}}
    opts = {"SOLVER.MAX_ITER": 330}
    case = Case(tmp_path, arms=arms, opts=opts, teacher=None, ablations=None)
    assert [case.runs[name, 1].cfg().SOLVER.MAX_ITER for name in arms] == [440, 330]


def test_a_teacher_of_earlier_settings_is_trained_again_for_its_student(case):
    case.do([("teacher", 1)])
    changed = Case(case.folder, opts={"SOLVER.BASE_LR": 0.5})
    todo = changed.todo(arms=["crosskd_ifc"], seeds=[1])
    assert todo == [("teacher", 1), ("crosskd_ifc", 1)]


def test_an_arm_that_starts_from_another_comes_after_it(tmp_path):
    start = {"MODEL.WEIGHTS": str(tmp_path / "runs/student_1/model_final.pth")}
    arms = {"longer": {"config": PLAIN, "opts": start}, "student": {"config": PLAIN}}
    case = Case(tmp_path, arms=arms, teacher=None, ablations=None, seeds=[1])
    assert case.do(discard_weights=True) == {}
    assert case.order() == ["student_1", "longer_1"]
    assert os.path.exists(case.runs["student", 1].weights)


def test_where_the_runs_lie_does_not_matter_to_a_taught_run(case):
    folders = ("runs", "elsewhere/runs")
    assert len({case.protocol.run("crosskd_ifc", 1, x).digest() for x in folders}) == 1


@pytest.mark.parametrize(
    "seeds, theirs, taken",
    [
        ([7, 9], [9, 7], [7, 9]),
        ([1, 2, 3, 4], [2, 4], [2, 2, 4, 4]),
        ([1, 2, 3], [8, 9], [8, 9, 8]),
    ],
)
def test_a_seed_has_its_own_teacher_or_the_next_in_turn(seeds, theirs, taken, tmp_path):
    teacher = {"config": "quick/faster_rcnn_R_34_shapes.yaml", "seeds": theirs}
    protocol = Case(tmp_path, seeds=seeds, teacher=teacher, ablations=None).protocol
    assert [protocol.teacher_of("crosskd_ifc", seed)[1] for seed in seeds] == taken


def test_threads_and_arguments_reach_each_run(case):
    found = []

    def train(run, script, **options):
        found.append((options["threads"], options.get("arguments")))
        raise RunFailed("enough")

    case.do([("student", 1)], train=train, threads=3, arguments=("--num-gpus", "4"))
    assert found == [(3, ("--num-gpus", "4"))]
