"""Searches of settings: what is tried, in which order, and what is left of it."""

import json
import math

import optuna
import pytest
import yaml
from helpers import load_tool
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from crosskd_ifc import ConfigError
from crosskd_ifc.experiments.child_process import RunDiverged, RunFailed
from crosskd_ifc.experiments.protocol import load_protocol
from crosskd_ifc.experiments.runs import Run
from crosskd_ifc.experiments.trial_runs import TrialRuns
from crosskd_ifc.experiments.tuning import number_range, open_study, search

optuna.logging.set_verbosity(optuna.logging.WARNING)
WEIGHT = "MODEL.CROSSKD.LOSS.CLS_WEIGHT"
SPACE = {WEIGHT: FloatDistribution(0.01, 100, log=True)}
BAD = {WEIGHT: 80.0}
PLAIN, DISTILLED = "quick/faster_rcnn_R_18_shapes.yaml", "quick/crosskd_ifc_R_18_shapes.yaml"


class Objective:
    """An AP that is best at a weight of 0.5; diverges, fails, or stops the search, at some
    calls."""

    def __init__(self, diverging=(), failing=(), stopping=()):
        self.seen, self.diverging, self.failing = [], diverging, failing
        self.stopping = stopping

    def __call__(self, trial, settings):
        self.seen.append(settings[WEIGHT])
        if len(self.seen) in self.stopping:
            raise KeyboardInterrupt
        if len(self.seen) in self.diverging:
            raise RunDiverged("the loss is not finite")
        if len(self.seen) in self.failing:
            raise RunFailed("no space left on device")
        return 40 - 10 * math.log10(settings[WEIGHT] / 0.5) ** 2


def test_a_search_finds_its_way_from_a_planted_bad_weight(tmp_path):
    objective = Objective()
    study = open_study(str(tmp_path / "new" / "study.journal"), SPACE)
    best = search(study, SPACE, objective, trials=20, start=BAD)
    assert objective.seen[0] == 80.0 and len(objective.seen) == 20
    assert 0.5 / 3 < best.params[WEIGHT] < 0.5 * 3
    assert best.value == max(t.value for t in study.trials) > objective(None, BAD) + 40


def test_a_search_goes_on_where_it_was_stopped(tmp_path):
    path, first = str(tmp_path / "study.journal"), Objective(stopping=(4,))
    with pytest.raises(KeyboardInterrupt):
        search(open_study(path, SPACE), SPACE, first, trials=6, start=BAD)
    second = Objective()
    search(open_study(path, SPACE), SPACE, second, trials=6, start=BAD)
    assert second.seen[0] == first.seen[3], "what was under way comes first"
    assert len(second.seen) == 3 and len({*first.seen, *second.seen}) == 6
    search(open_study(path, SPACE), SPACE, second, trials=6)
    assert len(second.seen) == 3, "the budget is used up"


def test_a_run_that_fails_ends_the_search_and_is_tried_again(tmp_path):
    path, objective = str(tmp_path / "study.journal"), Objective(failing=(3,))
    with pytest.raises(RunFailed, match="no space left"):
        search(open_study(path, SPACE), SPACE, objective, trials=6, start=BAD)
    again = Objective()
    search(open_study(path, SPACE), SPACE, again, trials=6, start=BAD)
    assert again.seen[0] == objective.seen[2] and len(again.seen) == 4


def test_a_journal_that_a_full_disk_has_cut_off_goes_on(tmp_path):
    path = str(tmp_path / "study.journal")
    search(open_study(path, SPACE), SPACE, Objective(), trials=2)
    with open(path, "a") as f:
        f.write('{"op_code": 5, "worker_id": "a')
    for trials in (2, 3):
        assert len(open_study(path, SPACE).trials) == trials
        search(open_study(path, SPACE), SPACE, Objective(), trials=3)


def test_settings_whose_run_diverges_are_bad_ones_unless_the_first_does(tmp_path):
    lines, objective = [], Objective(diverging=(2,))
    study = open_study(str(tmp_path / "a.journal"), SPACE)
    search(study, SPACE, objective, trials=4, start=BAD, say=lines.append)
    assert len(objective.seen) == 4 and lines == ["the loss is not finite"]
    objective = Objective(diverging=(1,))
    study = open_study(str(tmp_path / "b.journal"), SPACE)
    with pytest.raises(RunFailed, match="not finite"):
        search(study, SPACE, objective, trials=4, start=BAD)
    assert len(objective.seen) == 1


def test_drawn_settings_that_diverge_first_do_not_end_the_search(tmp_path):
    study = open_study(str(tmp_path / "a.journal"), SPACE)
    best = search(study, SPACE, Objective(diverging=(1, 2)), trials=4)
    assert best.state.name == "COMPLETE"
    assert [t.state.name for t in study.trials] == ["PRUNED", "PRUNED", "COMPLETE", "COMPLETE"]
    study = open_study(str(tmp_path / "b.journal"), SPACE)
    with pytest.raises(RunFailed, match="None of the 2 trials"):
        search(study, SPACE, Objective(diverging=(1, 2)), trials=2)


def test_a_folder_with_a_search_of_something_else_is_refused(tmp_path):
    path = str(tmp_path / "study.journal")
    other = {WEIGHT: FloatDistribution(0.01, 10, log=True)}
    open_study(path, other)  # without a trial, as after a mistyped key, nothing is kept of it
    open_study(path, SPACE).enqueue_trial(BAD)
    with pytest.raises(ConfigError, match="study.journal is of a search of .*--output"):
        open_study(path, other)


def test_a_search_whose_seeds_or_settings_changed_is_refused(tmp_path):
    path = str(tmp_path / "study.journal")
    open_study(path, SPACE, runs={})
    open_study(path, SPACE, runs={"1": "settings"}).enqueue_trial(BAD)
    open_study(path, SPACE, runs={"1": "settings"})
    with pytest.raises(ConfigError, match="is of a search with other settings; .*--output"):
        open_study(path, SPACE, runs={"1": "others"})
    with pytest.raises(ConfigError, match="is of a search of the seeds 1; .*--output"):
        open_study(path, SPACE, runs={"1": "settings", "2": "settings"})


def test_what_was_under_way_is_put_back_once(tmp_path):
    path = str(tmp_path / "study.journal")
    with pytest.raises(KeyboardInterrupt):
        search(open_study(path, SPACE), SPACE, Objective(stopping=(1,)), trials=6, start=BAD)
    for _ in range(3):
        study = open_study(path, SPACE)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]


def test_ranges_are_whole_numbers_only_where_both_ends_are():
    assert number_range("K", "1", "8", log=False) == IntDistribution(1, 8)
    assert number_range("K", "1", "8.0", log=True) == FloatDistribution(1, 8, log=True)
    assert number_range("K", "1e-6", "1e-4", log=True) == FloatDistribution(1e-6, 1e-4, log=True)
    for low, high in (("2", "1"), ("a", "1"), ("0.0", "1.0")):
        with pytest.raises(ConfigError, match=f"K from {low} to {high}: "):
            number_range("K", low, high, log=True)


# Stands for tools/train_net.py: the AP depends on the weight; with SLOW it takes its time.
SCRIPT = """
import json, math, os, sys, time
opts = dict(zip(sys.argv[1::1], sys.argv[2::1]))
folder = opts["OUTPUT_DIR"]
with open(os.path.join(os.path.dirname(folder), "order"), "a") as f:
    f.write(os.path.basename(folder) + "\\n")
weight = float(opts.get("MODEL.CROSSKD.LOSS.CLS_WEIGHT", 0.5))
ap = 40 - 10 * math.log10(weight / 0.5) ** 2 + int(opts["SEED"])
def evaluate(iteration, ap):
    with open(os.path.join(folder, "metrics.json"), "a") as f:
        line = {"iteration": iteration}
        for name, more in (("crosskd_shapes_test", -60), ("crosskd_shapes_val", 0)):
            line.update({name + "/bbox/AP": ap + more, name + "/bbox/AP50": ap})
        f.write(json.dumps(line) + "\\n")
fault = os.environ.get("FAULT") if ap < 20 else ""
if fault:
    if fault == "diverged":
        with open(os.path.join(folder, "diverged.json"), "w") as f:
            f.write('{"iteration": 7}')
    sys.exit(fault)
evaluate(109, ap / 2)
if ap < 20 and os.environ.get("SLOW"):
    time.sleep(60)
evaluate(100000, ap)  # beyond SOLVER.MAX_ITER: the last
open(os.path.join(folder, "model_final.pth"), "w").close()
"""


class Tool:
    """A protocol in a folder and a search of one of its arms."""

    def __init__(self, folder, space=SPACE, arm="crosskd_ifc", seeds=(1, 2), **changes):
        content = {
            "name": "test",
            "seeds": [1, 2],
            "validation": "crosskd_shapes_val",
            "test": "crosskd_shapes_test",
            "teacher": {"config": "quick/faster_rcnn_R_34_shapes.yaml"},
            "arms": {
                "student": {"config": PLAIN},
                "crosskd_ifc": {"config": DISTILLED, "opts": BAD},
            },
            "ablations": {"x": {"ifc_x": {"config": DISTILLED, "seeds": [1]}}},
            "contrasts": [["crosskd_ifc", "student"]],
            **changes,
        }
        self.folder, self.lines, self.space = folder, [], space
        (folder / "protocol.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        (folder / "script.py").write_text(SCRIPT)
        self.study = open_study(str(folder / "out" / "study.journal"), space)
        self.runs = TrialRuns(
            self.study,
            load_protocol(str(folder / "protocol.yaml")),
            arm,
            str(folder / "out"),
            str(folder / "script.py"),
            runs=str(folder / "runs"),
            seeds=seeds,
            command="python tools/tune.py",
            say=self.lines.append,
        )

    def do(self, trials):
        self.runs.prepare()
        start = self.runs.start(self.space)
        return search(self.study, self.space, self.runs, trials=trials, start=start)

    def order(self):
        return (self.folder / "runs" / "order").read_text().split()

    def recorded(self):
        return json.loads((self.folder / "out" / "results.json").read_text())


def test_trials_are_arms_with_results_of_the_comparisons_own_format(tmp_path):
    tool = Tool(tmp_path)
    best = tool.do(3)
    content = tool.recorded()
    runs = {(r["arm"], r["seed"]): r for r in content["runs"]}
    arms = [a["arm"] for a in content["arms"] if a["arm"] != "teacher"]
    assert len(arms) == 3 and {k[0] for k in runs} == {*arms, "teacher"}
    assert tool.order()[:4] == ["teacher_1", "teacher_2", f"{arms[0]}_1", f"{arms[0]}_2"]
    name, opts = tool.runs.arm_of(best)
    assert opts == [WEIGHT, str(best.params[WEIGHT])]
    chosen = [runs[name, seed]["AP_val"] for seed in (1, 2)]
    assert best.value == pytest.approx(sum(chosen) / 2, abs=1e-3), "chosen on validation images"
    # What was found can be run again, with every tool for comparisons.
    protocol = load_protocol(str(tmp_path / "out" / "protocol.yaml"))
    cfg = protocol.run(name, 1, "").cfg()
    assert cfg.MODEL.CROSSKD.LOSS.CLS_WEIGHT == best.params[WEIGHT]
    report = open(tool.runs.report()).read()
    assert "CLS_WEIGHT 80" in report and "Search: " in report


def test_a_protocol_that_is_edited_during_a_search_changes_nothing_of_it(tmp_path):
    tool, file = Tool(tmp_path, seeds=(1,)), tmp_path / "protocol.yaml"
    tool.do(1)
    edited = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**edited, "opts": {"SOLVER.BASE_LR": 0.5}}))
    tool.do(2)
    protocol = load_protocol(str(tmp_path / "out" / "protocol.yaml"))
    rates = {protocol.run(name, 1, "").cfg().SOLVER.BASE_LR for name in protocol.arms}
    assert len(rates) == 1 and 0.5 not in rates
    assert not [run for run in tool.recorded()["runs"] if run.get("outdated")]


def test_what_a_score_depends_on_are_settings_data_and_what_it_starts_from(tmp_path):
    state_of = load_tool("tune").state_of
    start, found = tmp_path / "start.pth", []
    for rate, text in (("0.1", "a"), ("0.1", "b"), ("0.2", "b")):
        start.write_text(text)
        opts = ["SOLVER.BASE_LR", rate, "MODEL.WEIGHTS", str(start)]
        teacher = Run("teacher", PLAIN, "", opts[2:])
        found.append(state_of(Run("plain", PLAIN, "", opts)))
        found.append(state_of(Run("distilled", DISTILLED, "", opts[:2], needs=[teacher])))
    assert len(set(found)) == 6


def test_the_first_trial_is_the_arm_as_it_stands(tmp_path):
    space = {
        WEIGHT: FloatDistribution(0.01, 100, log=True),
        "MODEL.CROSSKD.MIMIC": CategoricalDistribution(["cross_head", "both"]),
        "MODEL.CROSSKD.FUSION.IN_FEATURES": CategoricalDistribution(
            ["('fc1',)", "['pool', 'fc1', 'fc2']"]
        ),
    }
    tool = Tool(tmp_path, space=space)
    start = tool.runs.start(space)
    assert start == {
        WEIGHT: 80.0,
        "MODEL.CROSSKD.MIMIC": "cross_head",
        "MODEL.CROSSKD.FUSION.IN_FEATURES": "['pool', 'fc1', 'fc2']",
    }
    assert tool.runs.start({WEIGHT: FloatDistribution(0.01, 10)}) is None, "outside of the search"
    for key, low, high, reason in (
        (WEIGHT, "0", "5", "must have a point"),
        ("SOLVER.IMS_PER_BATCH", "1.0", "4.0", "must be whole"),
        ("MODEL.CROSSKD.MIMIC", "1", "2", "isn't a number; search it with --choice"),
        ("SEED", "1", "2", "is set by the protocol"),
    ):
        with pytest.raises(ConfigError, match=f"{key} .*{reason}"):
            tool.runs.start({key: number_range(key, low, high, log=False)})
    with pytest.raises(ConfigError, match="LOSS.CLS_WAIT: the config has no such key"):
        tool.runs.start({"MODEL.CROSSKD.LOSS.CLS_WAIT": FloatDistribution(0, 1)})


def test_a_stopped_search_takes_over_the_runs_that_are_finished(tmp_path):
    tool = Tool(tmp_path, seeds=(1,))
    tool.do(2)
    done = tool.order()
    again = Tool(tmp_path, seeds=(1,))
    again.do(3)
    assert again.order()[: len(done)] == done and len(again.order()) == len(done) + 1


def test_a_trial_behind_the_median_at_an_evaluation_ends_there(tmp_path, monkeypatch):
    # All good weights but the last one.
    tool = Tool(tmp_path, seeds=(1,))
    tool.runs.prepare()
    for weight in (0.4, 0.5, 0.6, 0.7, 0.8, 80.0):
        tool.study.enqueue_trial({WEIGHT: weight})
    monkeypatch.setenv("SLOW", "1")
    search(tool.study, SPACE, tool.runs, trials=6)
    last = tool.study.trials[-1]
    assert last.state is optuna.trial.TrialState.PRUNED and list(last.intermediate_values) == [110]
    assert "trial 5: pruned" in tool.lines
    name, _ = tool.runs.arm_of(last)
    assert tool.order()[-1] == f"{name}_1"
    assert name not in {r["arm"] for r in tool.recorded()["runs"]}


def test_only_a_loss_that_is_not_finite_makes_settings_bad(tmp_path, monkeypatch):
    tool = Tool(tmp_path, seeds=(1,))
    tool.runs.prepare()
    for weight in (0.5, 80.0, 81.0):
        tool.study.enqueue_trial({WEIGHT: weight})
    monkeypatch.setenv("FAULT", "diverged")
    search(tool.study, SPACE, tool.runs, trials=2)
    assert [t.state.name for t in tool.study.trials][:2] == ["COMPLETE", "PRUNED"]
    monkeypatch.setenv("FAULT", "no space left on device")
    with pytest.raises(RunFailed, match="(?s)failed; the end of .*no space left"):
        search(tool.study, SPACE, tool.runs, trials=3)
    assert tool.study.trials[-1].state.name == "FAIL" and tool.runs.stop.is_set()
    monkeypatch.delenv("FAULT")
    again = Tool(tmp_path, seeds=(1,))
    search(again.study, SPACE, again.runs, trials=3)
    assert again.study.trials[-1].params == {WEIGHT: 81.0}


def test_what_a_protocol_does_not_have_is_refused_by_name(tmp_path):
    for changes, message in (
        ({"arm": "crosskd"}, "no arm 'crosskd'; there are teacher, student, crosskd_ifc"),
        ({"seeds": (1, 7)}, r"crosskd_ifc has the seeds \[1, 2\], not \[7\]"),
        ({"validation": ""}, "validation is missing; settings are chosen on it"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tool(tmp_path, **changes)


def test_the_report_of_a_search_does_not_miss_teachers_that_it_does_not_need(tmp_path):
    tool = Tool(tmp_path, seeds=(1,))
    tool.do(1)
    with open(tool.runs.report()) as f:
        assert "aren't there" not in f.read()


def test_a_search_is_bound_to_the_settings_of_its_runs(tmp_path, monkeypatch):
    Tool(tmp_path)  # writes the protocol
    tool, seen = load_tool("tune"), {}

    def stop(*_, **options):
        seen.update(options)
        raise RunFailed("enough")

    monkeypatch.setattr(tool, "open_study", stop)
    words = [str(tmp_path / "protocol.yaml"), "crosskd_ifc", "--seeds", "1", "2", "--budget", "2"]
    words += ["--log", WEIGHT, "0.01", "100", "--output", str(tmp_path / "search")]
    with pytest.raises(RunFailed):
        tool.main(tool.parse_args(words))
    assert seen.get("runs", {}).keys() == {"1", "2"}
