"""What README.md and docs/ say is so."""

import glob
import json
import os
import re
import statistics
from pathlib import Path

import pytest
from test_recipe import make_card

from crosskd_ifc.common.config_files import load_config
from crosskd_ifc.common.user_code import import_user_code
from crosskd_ifc.config import ConfigError
from crosskd_ifc.distillation.compatibility.settings import check_crosskd_config
from crosskd_ifc.experiments.protocol import load_protocol
from crosskd_ifc.experiments.report import report_text
from crosskd_ifc.experiments.statistics import (
    describe_sample,
    pooled_deviation,
    seeds_needed,
    summarize,
)
from crosskd_ifc.experiments.tables import Table
from crosskd_ifc.training.recipe import write_configs

ROOT = os.path.join(os.path.dirname(__file__), "..")
TITLES = {
    "teacher": "teacher R34",
    "student": "student R18, plain",
    "crosskd": "student R18, CrossKD",
    "crosskd_ifc": "student R18, sum of taps",
}


def read(*path):
    with open(os.path.join(ROOT, *path)) as f:
        return f.read()


def recorded(*path, arm):
    runs = [r for r in json.loads(read("benchmarks", *path))["runs"] if r["arm"] == arm]
    return sorted(runs, key=lambda r: r["seed"])


def mean(runs, key):
    values = [r[key] for r in runs]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def each(runs, key="AP"):
    return " / ".join(f"{r[key]:.1f}" for r in runs)


def ap_of(table, arm):
    """Mean and deviation of an arm's AP over its seeds, as the documents write it."""
    return "{1:.1f} ± {2:.1f}".format(*describe_sample(list(table.scores(arm).values())))


def tell(found):
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(found.mean, *found.interval)


COMPARED = {
    "teacher": "teacher",
    "student": "student, plain",
    "student_head": "prediction mimicking",
    "feature": "feature mimicking (PKD)",
    "crosskd": "plain CrossKD",
    "crosskd_ifc": "mean of taps",
}
PROTOCOLS = (
    "shapes_faster_rcnn",
    "bccd_faster_rcnn",
    "bccd_faster_rcnn_640",
    "shapes_retinanet",
    "shapes_inherit",
)
ARMS_2X = ("crosskd", "crosskd_ifc", "fc2")


def rows_of_the_comparison():
    """The table of docs/results.md, from the recorded runs."""
    tables = [Table(json.loads(read("benchmarks", name, "results.json"))) for name in PROTOCOLS]
    for arm, title in COMPARED.items():
        cells = []
        for table in tables:
            values = list(table.scores(arm).values())
            summary = describe_sample(values) if len(values) > 1 else None
            cells.append("{1:.1f} ± {2:.1f}, {0} seeds".format(*summary) if summary else "-")
        yield f"| {title} | {' | '.join(cells)} |"
    for other, title in (("student", "the plain student"), ("crosskd", "plain CrossKD")):
        cells = []
        for table in tables:
            cells.append(tell(table.difference("crosskd_ifc", other)))
        yield f"| mean of taps minus {title} | {' | '.join(cells)} |"


@pytest.mark.parametrize("number", range(len(COMPARED) + 2))
def test_the_table_of_results_is_that_of_the_recorded_runs(number):
    assert list(rows_of_the_comparison())[number] in read("docs", "results.md").splitlines()


def told_in_results():
    """Of docs/results.md and docs/more_results.md, which have the numbers of the comparisons."""
    return " ".join((read("docs", "results.md") + read("docs", "more_results.md")).split())


def results(name):
    return Table(json.loads(read("benchmarks", name, "results.json")))


def differences(arm, other):
    """Of each protocol, in the order of the table."""
    tables = [results(name) for name in PROTOCOLS]
    return [table.difference(arm, other) for table in tables]


def test_all_pairs_together_are_told_as_recorded():
    found = differences("crosskd_ifc", "crosskd")
    assert all(low < 0 < high for low, high in (f.interval for f in found))
    pairs = dict(enumerate(value for f in found for value in f.values.values()))
    found = summarize(pairs)
    assert (
        f"Over all {len(pairs)} pairs of seeds the difference is {tell(found)}" in told_in_results()
    )


def test_the_seeds_that_one_ap_takes_are_told_as_recorded():
    tables = [results(name) for name in PROTOCOLS]
    found = [[f for _, _, f in table.differences(table.sections()[0])] for table in tables]
    needed = [seeds_needed(pooled_deviation(each), 1.0) for each in found]
    told = "a difference of 1 AP takes {}, {}, {}, {} and {} seeds".format(*needed)
    assert told in told_in_results()


def mean_ap(table, arm):
    return f"{statistics.mean(table.scores(arm).values()):.1f}"


def test_what_learned_weights_give_is_told_as_recorded():
    table = results("shapes_faster_rcnn")
    from_mean, from_crosskd = (table.difference("weighted", x) for x in ("crosskd_ifc", "crosskd"))
    assert len(from_mean.values) == len(from_crosskd.values) == 5
    text = (
        f"`FUSION.NAME weighted` gets {mean_ap(table, 'weighted')} AP over the five seeds there, "
    )
    text += f"{tell(from_mean)} from `mean`, "
    assert text + f"{tell(from_crosskd)} from plain CrossKD" in told_in_results()
    runs = json.loads(read("benchmarks", "taps", "shapes_faster_rcnn.json"))["runs"]
    weights = [run["weights"] for run in runs if "weights" in run]
    (shares,) = {tuple(f"{each[tap]:.1f}" for tap in ("fc2", "fc1")) for each in weights}
    assert (
        "it learns to take {} of fc2 and {} of fc1 (seeds 3 to 5)".format(*shares)
        in told_in_results()
    )
    validated = table.difference("weighted", "crosskd_ifc", "AP_val")
    assert f"by which settings are chosen, it is {tell(validated)}" in told_in_results()
    found = results("bccd_faster_rcnn").difference("weighted", "crosskd_ifc")
    assert f"On the small photos it is {tell(found)} from `mean`" in told_in_results()
    doubled = f"with both loss weights doubled it stays at {mean_ap(table, 'both_doubled')}"
    assert doubled in told_in_results() and len(table.scores("both_doubled")) == 5
    double = tell(table.difference("crosskd_both_doubled", "crosskd"))[:-1]
    assert f"Doubled weights gave plain CrossKD {double}; five seeds)" in told_in_results()


NO_ABLATIONS = ("teacher", "student", "student_head", "feature", "crosskd", "crosskd_both_doubled")


def test_which_ablations_leave_out_0_is_told_as_recorded():
    table = results("shapes_faster_rcnn")
    found = {arm: table.difference(arm, "crosskd_ifc") for arm in table.runs}
    arms = [arm for arm in found if arm not in NO_ABLATIONS and not arm.endswith("_2x")]
    arms = [arm for arm in arms if not arm.endswith("_gradients")]
    intervals = {arm: found[arm].interval for arm in arms if found[arm] and found[arm].interval}
    without = [arm for arm, (low, high) in intervals.items() if not low < 0 < high]
    assert len(intervals) == 19 and without == ["weighted", "cls_1"]
    told = f"two leave out 0: this one, and `CLS_WEIGHT` 1, {tell(found['cls_1'])}."
    assert f"Of the 19 ablations' intervals {told}" in told_in_results()


def test_what_the_routes_and_taps_of_the_mean_give_is_told_as_recorded():
    table = results("shapes_faster_rcnn")
    arms = ("through", "pool_fc1_fc2", "through_pool_fc1_fc2")
    found = [table.difference(arm, "crosskd_ifc") for arm in arms]
    told = "`through` {:+.1f}, with `pool` {:+.1f}, both {:+.1f} AP "
    told += "(three seeds, intervals of about ±{:.1f})"
    widths = [(each.interval[1] - each.interval[0]) / 2 for each in found]
    told = told.format(*(each.mean for each in found), statistics.mean(widths))
    assert told in told_in_results() and {len(each.values) for each in found} == {3}


def test_other_losses_settings_are_told_as_recorded():
    table = results("shapes_faster_rcnn")
    arms = ("temperature_1", "temperature_5", "cls_0.25", "cls_1", "cls_2", "box_2")
    found = [table.difference(arm, "crosskd_ifc") for arm in arms]
    assert all(len(each.values) == 3 for each in found)
    means = [each.mean for each in found]
    told = f"end between {min(means):+.1f} and {max(means):+.1f} from the mean with its own"
    assert told in told_in_results()


def test_sum_and_mean_are_told_as_recorded():
    table = results("shapes_faster_rcnn")
    found = table.difference("sum", "crosskd_ifc")
    from_crosskd = tell(table.difference("sum", "crosskd"))
    told = f"`sum` is {tell(found)} from it (five seeds), and {from_crosskd} from plain CrossKD."
    assert told in told_in_results() and len(found.values) == 5


def test_what_is_good_everywhere_is():
    behind = {"crosskd": [], "crosskd_ifc": []}
    for table in map(results, PROTOCOLS):
        ap = {arm: statistics.mean(table.scores(arm).values()) for arm in COMPARED}
        best = max(ap[arm] for arm in COMPARED if arm != "teacher")
        for arm, values in behind.items():
            values.append(best - ap[arm])
    assert f"within {max(behind['crosskd']):.1f} AP of it" in told_in_results()
    assert max(behind["crosskd_ifc"]) < 0.7


def test_what_longer_training_gives_is_told_as_recorded():
    table = results("shapes_faster_rcnn")
    assert min(table.difference("student_2x", "teacher").values.values()) > 0
    gains = [table.difference(f"{arm}_2x", "student_2x") for arm in ARMS_2X]
    text = f"gets {mean_ap(table, 'student_2x')} AP, more than its teachers; plain CrossKD adds "
    text += "{} to that, the mean of taps {}, fc2 alone {}, on three seeds".format(
        *map(tell, gains)
    )
    assert text in told_in_results() and all(len(gain.values) == 3 for gain in gains)
    later = [
        f"{results(x).difference('crosskd', 'student').mean:.1f}"
        for x in ("decisive", "decisive_long")
    ]
    told = "adds [{} AP](results.md#the-decisive-comparison) in 440 steps and [{}]"
    assert told.format(*later) in told_in_results()


def test_every_distilled_student_is_better_than_the_plain_one():
    for arm in ("crosskd", "winner", "second", "single", "ifc"):
        assert min(results("decisive").difference(arm, "student").values.values()) > 0
    for arm in ("crosskd", "winner", "crosskd_double", "ifc"):
        assert min(results("decisive_long").difference(arm, "student").values.values()) > 0
    for arm in ("crosskd", "winner", "single", "ifc"):
        assert min(results("decisive_photos").difference(arm, "student").values.values()) > 0
    for arm in ("student_head", "feature", "crosskd", "crosskd_ifc"):
        for found in differences(arm, "student"):
            assert min(found.values.values()) > 0


def test_of_the_kinds_of_teachers_one_seed_is_behind_the_plain_student():
    table = results("teacher_kinds")
    gains = {
        arm: table.difference(arm, "student").values for arm in TEACHER_KINDS if arm != "student"
    }
    behind = [arm for arm, values in gains.items() for value in values.values() if value <= 0]
    assert behind == ["vit"] and "on every seed but one" in " ".join(read("README.md").split())


def test_what_distilling_closes_of_the_gap_is_told_as_recorded():
    gaps, closed, far = [], [], []
    for gain, gap in zip(differences("crosskd_ifc", "student"), differences("teacher", "student")):
        far.append(gap.mean > 2)
        if far[-1]:
            gaps.append(round(gap.mean))
            closed.append(100 * gain.mean / gap.mean)
            assert gain.interval[0] > 2.4
        else:
            assert round(gap.mean) == 1 and round(gain.mean) == 2 and gain.interval[0] < 0
    assert far == [True, True, False, True, False]
    told = f"{min(gaps)} to {max(gaps)} AP behind its teacher, the mean of taps closes "
    assert told + f"{min(closed):.0f} to {max(closed):.0f} %" in told_in_results()


def test_the_other_losses_are_told_as_recorded():
    head, pkd = differences("student_head", "crosskd"), differences("feature", "crosskd")
    assert all(low < 0 < high for low, high in (f.interval for f in head[1:3]))
    behind = [-round(f.mean) for f in (head[0], *head[3:])]
    assert (
        f"elsewhere it is {min(behind)} to {max(behind)} AP behind in the mean" in told_in_results()
    )
    assert all(low < 0 < high for low, high in (f.interval for f in (pkd[0], pkd[4])))
    assert all(f.interval[1] < 0 for f in pkd[1:4])
    told = "it is {:.1f}, {:.1f} and {:.1f} AP behind on the small photos"
    assert told.format(*(-f.mean for f in pkd[1:4])) in told_in_results()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_committed_report_is_that_of_the_recorded_runs(name):
    content = json.loads(read("benchmarks", name, "results.json"))
    assert report_text(content) == read("benchmarks", name, "report.md")


def test_the_table_of_the_demo_is_that_of_the_recorded_run():
    runs = {
        run["arm"]: run for run in json.loads(read("benchmarks", "demo", "results.json"))["runs"]
    }
    demo = load_protocol(os.path.join(ROOT, "benchmarks", "protocols", "demo.yaml"))
    assert list(runs) == list(demo.arms)
    for arm, run in runs.items():
        row = f"| {demo.arms[arm].title} | {run['AP']:.1f} | {run['AP50']:.1f} |"
        assert row in read("docs", "more_results.md")


def test_the_demo_on_another_processor_is_told_as_recorded():
    """Seed 1 of the comparison, whose settings are those of the demo."""
    table = results("shapes_faster_rcnn")
    told = [table.current(arm)[1][0]["AP"] for arm in ("teacher", "student", "crosskd")]
    assert "had {:.1f}, {:.1f} and {:.1f} AP".format(*told) in told_in_results()


def test_what_was_repeated_is_told_as_recorded():
    found = json.loads(read("benchmarks", "repeatability", "shapes_faster_rcnn.json"))
    for run in found["same_processor"]:
        assert all(first == second for first, second in (run["AP"], run["weights_sha256"]))
    for run in found["same_processor_later"]:
        assert run["AP"][0] == run["AP"][1]
    photos = json.loads(read("benchmarks", "repeatability", "bccd_faster_rcnn.json"))
    largest = [
        max(abs(first - second) for first, second in (run["AP"] for run in runs))
        for runs in (
            found["other_processor"] + found["another_version"],
            photos["other_processor"],
        )
    ]
    assert "differs by up to {:.1f} and {:.1f} (".format(*largest) in told_in_results()


def test_what_an_inheriting_start_gives_is_told_as_recorded():
    inheriting, random = results("shapes_inherit"), results("shapes_faster_rcnn")
    alone = inheriting.scores("student")

    def gains_over(arm):
        theirs = random.scores(arm)
        return [alone[seed] - theirs[seed] for seed in sorted(alone.keys() & theirs.keys())]

    gains = [round(gain) for gain in gains_over("student")]
    arms = ("student_head", "feature", "crosskd", "crosskd_ifc")
    more = [round(statistics.mean(gains_over(arm))) for arm in arms]
    told = f"by {min(gains)} to {max(gains)} AP on each of three seeds, "
    told += f"in the mean {min(more)} to {max(more)} AP more than any of the losses"
    assert len(gains) == 3 and told in told_in_results()


def logged(name, arm, key):
    values = results(name).logged(arm, key)
    return f"{statistics.mean(values.values()):.2f}"


def test_what_the_logs_say_is_told_as_recorded():
    pooled, combined = (
        [logged(name, arm, "fused_cosine") for name in PROTOCOLS[:3]]
        for arm in ("crosskd", "crosskd_ifc")
    )
    assert f"have a cosine of {pooled[0]} with the teacher's" in told_in_results()
    assert (
        f"fc features of students with the mean of taps have one of {combined[0]},"
        in told_in_results()
    )
    told = "({} and {} at 160x120, {} and {} at 640x480)"
    assert told.format(pooled[1], combined[1], pooled[2], combined[2]) in told_in_results()
    length = float(logged("shapes_faster_rcnn", "sum", "fused_length"))
    assert f"it stays near 2 ({length:.1f})" in told_in_results()
    arms = [f"{arm}_gradients" for arm in ("crosskd_ifc", "student_head", "crosskd")]
    cosines = [logged("shapes_faster_rcnn", arm, "grad_cosine_shared") for arm in arms]
    told = "cosine is {} for the mean of taps and {} for prediction mimicking "
    told += "(both at fc2), and {} for plain CrossKD"
    assert told.format(*cosines) in told_in_results()


def test_what_a_tap_is_worth_alone_is_told_as_recorded():
    runs = json.loads(read("benchmarks", "taps", "shapes_faster_rcnn.json"))["runs"]

    def ap(arm, key):
        found = [r[key] for r in runs if r["run"][:-2] == arm]
        assert len(found) == 3
        return f"{statistics.mean(found):.1f}"

    told = "the mean gives {} AP, fc1 alone {} and fc2 alone {}; a student trained with fc2 alone"
    keys = ("cross_head", "cross_head_fc1", "cross_head_fc2")
    told = told.format(*(ap("crosskd_ifc", key) for key in keys))
    assert f"{told} gives {ap('fc2', 'cross_head')} from it" in told_in_results()


def test_the_table_of_other_classes_is_that_of_the_recorded_runs():
    plain = recorded("other_classes", "seeds.json", arm="student")
    distilled = recorded("other_classes", "seeds.json", arm="other_classes")
    for title, runs in (("plain", plain), ("sum of taps, teacher of other classes", distilled)):
        row = f"| student R18, {title} | {mean(runs, 'AP')} | {each(runs)} |"
        assert row in read("docs", "more_results.md")


@pytest.mark.parametrize("arm", TITLES)
def test_the_table_of_masks_is_that_of_the_recorded_runs(arm):
    runs = recorded("mask_rcnn", "seeds.json", arm=arm)
    cells = f"{mean(runs, 'mask_AP')} | {each(runs, 'mask_AP')} | {mean(runs, 'AP')}"
    assert f"| Mask R-CNN {TITLES[arm]} | {cells} |" in read("docs", "more_results.md")


@pytest.mark.parametrize("arm", TITLES)
def test_the_table_of_fcos_is_that_of_the_recorded_runs(arm):
    runs = recorded("dense", "quick.json", arm=arm)
    (run,) = [run for run in runs if run["detector"] == "fcos"]
    assert f"| {TITLES[arm]} | {run['AP']:.1f} | {run['AP50']:.1f} |" in read(
        "docs", "more_results.md"
    )


def test_the_two_divisors_of_fcos_are_told_as_recorded():
    table = results("fcos_divisor")
    told = "has {} AP, plain CrossKD {} with weights 0.4 and 0.75, and {} with 0.253 and 0.475"
    cells = [ap_of(table, arm) for arm in ("student", "crosskd", "published")]
    assert told.format(*cells) in told_in_results()
    assert (
        f"The difference is {tell(table.difference('published', 'crosskd'))}." in told_in_results()
    )


def costs(name, *, speed):
    """Cells of a table of docs/performance.md, from the recorded measurement."""
    found = json.loads(read("benchmarks", "step_cost", f"{name}.json"))
    cells = [f"{found['ratios'][key]['median']:.2f}" for key in ("c/a", "(a+b)/a", "c/(a+b)")]
    cells.append(f"{found['ratios']['c/floor']['median']:.2f}")
    cells.append("{:.2f} to {:.2f}".format(*found["ratios"]["c/floor"]["quartiles"]))
    if speed:
        cells += [f"{found['images_per_second'][k]:.0f}" for k in ("student", "distillation")]
    peak = {key: value / 2**20 for key, value in found["peak_bytes"].items()}
    return cells + [f"{peak['distillation'] - peak['student']:.0f}", f"{peak['teacher']:.0f}"]


COSTS = ["faster_rcnn", "faster_rcnn_through", "retinanet", "fcos"]
COSTS += ["faster_rcnn_taps", "faster_rcnn_anchored"]


@pytest.mark.parametrize("name", COSTS)
def test_the_costs_of_a_step_are_the_measured_ones(name):
    cells = costs(f"{name}_R50_R18_cpu", speed=False)
    assert f"| {' | '.join(cells)} |" in read("docs", "performance.md")


GPU_COSTS = sorted(glob.glob(os.path.join(ROOT, "benchmarks", "step_cost", "*_h100*.json")))


@pytest.mark.parametrize("path", GPU_COSTS)
def test_the_costs_of_a_step_on_a_gpu_are_the_measured_ones(path):
    cells = costs(os.path.basename(path)[: -len(".json")], speed=True)
    assert f"| {' | '.join(cells)} |" in read("docs", "performance.md")


def test_what_the_gpu_does_in_a_step_is_told_as_measured():
    name = "faster_rcnn_R50_R18_h100_batch_16"
    found = json.loads(read("benchmarks", "step_cost", f"{name}.json"))
    amp = json.loads(read("benchmarks", "step_cost", f"{name}_amp.json"))
    step = found["profiled_step"]
    (nms,) = [t for kernel, t in step["kernels"].items() if "gather_keep_from_mask" in kernel]
    text = " ".join(read("docs", "performance.md").split())
    busy = "busy for {busy:.0f} of the {span:.0f} ms of a profiled step"
    assert busy.format(**{key: 1000 * step[key] for key in ("busy", "span")}) in text
    seconds = found["seconds"]["distillation"]["median"]
    assert f"({1000 * seconds:.0f} ms without the profiler); {1000 * nms:.0f} ms of these" in text
    parts = [1000 * amp["seconds"][key]["median"] for key in ("teacher", "distillation")]
    assert "in float32, is {:.0f} of {:.0f} ms".format(*parts) in text


def costs_told():
    return " ".join(read("docs", "performance.md").split())


def test_the_costs_in_short_are_the_measured_ones():
    plain, _, both, *_ = costs("faster_rcnn_taps_R50_R18_cpu", speed=False)
    assert f"one loss per tap (the default), CPU | {both} | {plain} (again:" in costs_told()
    largest = costs("faster_rcnn_through_R50_R18_cpu", speed=False)[0]
    told = f"takes {float(plain):.1f} to {float(largest):.1f} times the plain student's on a CPU"
    assert told in read("README.md")
    plain, _, both, *_ = costs("faster_rcnn_R50_R18_cpu", speed=False)
    assert f"mean of fc1 and fc2, another CPU | {both} | {plain} |" in costs_told()
    plain, _, both, *_ = costs("faster_rcnn_R50_R18_h100_batch_16", speed=True)
    assert f"on an H100, 16 images of 800x1333 | {both} | {plain} |" in costs_told()
    plain, _, both, *_ = costs("faster_rcnn_R50_R18_h100_batch_16_amp", speed=True)
    assert f"the same with AMP | {both} | {plain} |" in costs_told()
    places = ("R50_R18_cpu", "R50_R18_h100")
    dense = [costs(f"{kind}_{at}", speed=False) for kind in ("retinanet", "fcos") for at in places]
    plain, both = (sorted({f"{float(cells[i]):.1f}" for cells in dense}) for i in (0, 2))
    told = f"RetinaNet, FCOS, CPU | {' to '.join(both)} | {' to '.join(plain)} |"
    assert told in costs_told()


@pytest.mark.parametrize(
    "protocol, cost, steps, teacher",
    [
        ("coco_faster_rcnn_R50_R18", "faster_rcnn_R50_R18_h100", 90_000, 0),
        # of a teacher's step, the model zoo's ratio of R101 to R50
        ("voc_faster_rcnn_R101_R50", "faster_rcnn_R101_R50_h100", 18_000, 0.286 / 0.210),
    ],
)
def test_the_hours_that_a_protocol_expects_are_those_of_the_measured_steps(
    protocol, cost, steps, teacher
):
    seconds = json.loads(read("benchmarks", "step_cost", f"{cost}.json"))["seconds"]
    plain, distilled = (seconds[key]["median"] for key in ("student", "distillation"))
    loaded = load_protocol(os.path.join(ROOT, "benchmarks", "protocols", f"{protocol}.yaml"))
    arms = [arm for arm in loaded.arms if arm != "teacher"]
    each = plain * (1 + teacher) + distilled * (len(arms) - 1)
    hours = 8 * len(loaded.seeds) * steps * each / 3600  # of 8 GPUs with two images each
    text = " ".join(read("benchmarks", "protocols", f"{protocol}.yaml").replace("#", "").split())
    assert f"about {hours:.0f} H100 hours" in text


def test_the_differences_of_a_bfloat16_teacher_are_the_measured_ones():
    found = json.loads(read("benchmarks", "precision", "bfloat16.json"))["relative_difference"]
    for name, values in found.items():
        cells = " | ".join(f"{values[key]:.2%}" for key in ("median", "95 %", "largest"))
        assert f"| `{name}` | {cells} |".replace("%", " %") in read("docs", "performance.md")


def test_the_cost_of_diagnostics_is_the_measured_one():
    cases = json.loads(read("benchmarks", "diagnostics", "cost.json"))["cases"]
    text = read("docs", "options.md")
    assert f"it took {cases['pool']['ratio_median']:.2f} times an ordinary one" in text


def test_the_table_of_mask_losses_is_that_of_the_recorded_runs():
    runs = json.loads(read("benchmarks", "mask_rcnn", "mask_loss.json"))["runs"]
    text, prefix = read("docs", "more_results.md"), "MODEL.CROSSKD.LOSS.MASK_"
    for run in runs:
        names = [run["opts"].get(prefix + key) for key in ("REDUCTION", "CHANNELS")]
        cells = f"| `{names[0]}` | `{names[1]}`" if names[0] else "| (no mask loss) |"
        weight = f"{run['opts'][prefix + 'WEIGHT']:g}"
        assert f"{cells} | {weight} | {run['mask_AP']:.1f} | {run['AP']:.1f} |" in text


# The comparisons of README's table, and the arms that its rows have in them. What the one on photos
# lacks is of an older one.
HEADLINE = ("decisive", "decisive_photos", "bccd_faster_rcnn_640")
DECISIVE = {"crosskd_ifc": "winner", "mean": "ifc"}
OLDER = {"mean": "crosskd_ifc", "crosskd_ifc": ""}
ROWS = {
    "teacher": "teacher",
    "student": "student, plain",
    "student_head": "prediction mimicking",
    "feature": "feature mimicking (PKD)",
    "crosskd": "plain CrossKD",
    "crosskd_ifc": "**CrossKD-IFC**, a loss for each layer",
    "mean": "one loss, for the mean of layers",
}


def headline(row, name):
    """A cell of README's table: AP, or what a kind of distillation adds to the plain student."""
    arm = (OLDER if name.startswith("bccd") else DECISIVE).get(row, row)
    if name == "decisive_photos" and row in ("student_head", "feature"):
        name = "bccd_faster_rcnn"
    table = results(name)
    if not table.runs.get(arm):
        return "-"
    if row in ("teacher", "student"):
        return ap_of(table, arm)
    return tell(table.difference(arm, "student"))


@pytest.mark.parametrize("row", ROWS)
def test_the_headline_is_that_of_the_recorded_runs(row):
    cells = [headline(row, name) for name in HEADLINE]
    assert f"| {ROWS[row]} | {' | '.join(cells)} |" in read("README.md").splitlines()


def test_the_seeds_of_the_headline_are_those_of_the_recorded_runs():
    text = read("README.md")
    counts = []
    for name in HEADLINE:
        table = results(name)
        gains = [table.difference(arm, "student") for arm in table.runs if arm != "student"]
        (count,) = {len(found.values) for found in gains if found}
        counts.append(count)
    assert "n = {}, {} and {} seeds".format(*counts) in text
    older = results("bccd_faster_rcnn")
    assert {len(older.scores(arm)) for arm in ("student_head", "feature")} == {3}
    assert "(on the small photos in an older comparison, 3 seeds)" in text


def test_the_figure_of_the_sweep_is_the_recorded_one():
    files = "docs/images/cost_sweep.png", "benchmarks/step_cost/faster_rcnn_R50_R18_cpu_sweep.png"
    shown, recorded = (Path(ROOT, name).read_bytes() for name in files)
    assert shown == recorded


DOCS = sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))
PAGES = ["README.md", "tools/README.md", "configs/README.md", "configs/datasets/README.md"]


@pytest.mark.parametrize("document", PAGES + [os.path.relpath(page, ROOT) for page in DOCS])
def test_files_that_a_document_names_exist(document):
    text = read(document)
    folder = os.path.join(ROOT, os.path.dirname(document))
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all(os.path.exists(os.path.join(folder, link)) for link in links), links
    if document.startswith("docs/"):  # a site has nothing else
        assert not [link for link in links if link.startswith("..")]
    named = re.findall(r"(?:tools|configs|benchmarks)/[\w/-]+\.(?:py|yaml|json|md)", text)
    assert all(os.path.exists(os.path.join(ROOT, name)) for name in named), named


def anchors(document):
    """What a link can name after "#": the headings, as GitHub and the site write them."""
    for heading in re.findall(r"^#+ (.+)$", read(document), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", PAGES + [os.path.relpath(page, ROOT) for page in DOCS])
def test_headings_that_a_document_links_to_exist(document):
    for page, heading in re.findall(r"\]\(([^):#]*\.md)?#([^)]+)\)", read(document)):
        found = os.path.normpath(os.path.join(os.path.dirname(document), page))
        assert heading in anchors(found if page else document), (page, heading)


def test_the_front_page_is_short():
    assert os.path.getsize(os.path.join(ROOT, "README.md")) <= 8000


def test_the_list_of_configs_has_every_folder_and_every_kind_of_name():
    text = read("configs", "README.md")
    told = [
        re.compile(name.replace("*", ".*")) for name in re.findall(r"`([\w*.-]*\*[\w.]*)`", text)
    ]
    for folder, _, names in os.walk(os.path.join(ROOT, "configs")):
        names = [name for name in names if name.endswith((".yaml", ".py"))]
        inside = os.path.relpath(folder, os.path.join(ROOT, "configs"))
        if names and inside != ".":
            assert f"| `{inside}` |" in text
        if inside not in ("datasets", os.path.join("quick", "options")):
            assert not [n for n in names if not any(pattern.match(n) for pattern in told)]


def test_the_example_of_a_protocol_can_be_run(tmp_path):
    example, *_ = re.findall(r"```yaml\n(.*?)```", read("docs", "comparisons.md"), re.DOTALL)
    (tmp_path / "p.yaml").write_text(example)
    protocol = load_protocol(str(tmp_path / "p.yaml"))
    assert list(protocol.arms) == ["teacher", "student", "crosskd", "temperature_1"]
    assert protocol.contrasts == (("crosskd", "student"),) and protocol.margin == 0.5


def test_the_example_of_a_protocol_for_own_photos_can_be_run(tmp_path, monkeypatch):
    card = Path(make_card(tmp_path))
    card.write_text(card.read_text().replace("name: recipe", "name: cells"))
    write_configs(str(card), str(tmp_path / "cells"), teacher="R50", student="R18")
    _, example, _ = re.findall(r"```yaml\n(.*?)```", read("docs", "comparisons.md"), re.DOTALL)
    (tmp_path / "cells" / "protocol.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    protocol = load_protocol("cells/protocol.yaml")
    runs = {name: protocol.run(name, 1, "runs") for name in protocol.arms}
    assert [name for name, one in runs.items() if one.needs] == ["crosskd_ifc", "crosskd"]
    assert runs["crosskd"].cfg().MODEL.CROSSKD.FUSION.IN_FEATURES == ("pool",)
    assert set(runs["crosskd"].cfg().DATASETS.TEST) == {"cells_val", "cells_test"}


def test_the_example_of_an_own_loss_can_be_an_arm_of_the_comparison_on_coco(tmp_path, monkeypatch):
    *_, arm = re.findall(r"```yaml\n(.*?)```", read("docs", "comparisons.md"), re.DOTALL)
    *_, loss = (
        block
        for block in re.findall(r"```python\n(.*?)```", read("docs", "extending.md"), re.DOTALL)
        if "FEATURE_LOSS_REGISTRY" in block
    )
    (tmp_path / "my_loss.py").write_text(loss.replace('"l1"', '"l1_of_an_arm"'))
    protocol = read("benchmarks", "protocols", "coco_faster_rcnn_R50_R18.yaml")
    arm = arm.replace("FEATURE_TYPE: l1", "FEATURE_TYPE: l1_of_an_arm")
    (tmp_path / "mine.yaml").write_text(protocol.replace("arms:\n", f"arms:\n{arm}"))
    monkeypatch.chdir(tmp_path)
    cfg = load_protocol("mine.yaml").run("mine", 1, "runs").cfg()
    assert cfg.MODEL.CROSSKD.IMPORTS == ("my_loss.py",)
    import_user_code(cfg)
    check_crosskd_config(cfg)
    without = cfg.clone()
    without.merge_from_list(["MODEL.CROSSKD.LOSS.FEATURE_COMBINE", True])
    with pytest.raises(ConfigError, match="FEATURE_COMBINE is True, but l1_of_an_arm compares"):
        check_crosskd_config(without)


def row_against_crosskd(name, title, arm):
    """A row of docs/results.md: an arm of a comparison minus plain CrossKD, and its seeds."""
    found = results(name).difference(arm, "crosskd")
    return f"| {title} | {tell(found)} | {len(found.values)} |"


def row_of_a_contrast(found, titles):
    """A row of docs/results.md: a contrast with its corrected interval and verdict."""
    names = [titles[arm] for arm in (found.arm, found.reference)]
    interval = "{:+.1f} to {:+.1f}".format(*found.corrected)
    cells = (f"{found.difference.mean:+.1f}", interval, found.verdict)
    return f"| {' minus '.join(names)} | {' | '.join(cells)} |"


def rows_of_results(after="# Results"):
    return read("docs", "results.md").split(after, 1)[1].splitlines()


def check_verdicts(contrasts, number, titles, *, after):
    assert len(contrasts) == number
    for found in contrasts:
        assert row_of_a_contrast(found, titles) in rows_of_results(after)


@pytest.mark.parametrize(
    "title, arm",
    [
        ("one loss per tap, and one for their mean", "taps_and_mean"),
        ("one loss per tap", "taps"),
        ("boosted", "boosted"),
        ("anchored", "anchored"),
        ("fc1 alone", "fc1"),
        ("plain CrossKD and the student's own predictions", "both"),
        ("mean of fc1 and fc2", "ifc"),
        ("fc2 alone", "fc2"),
        ("plain CrossKD, loss weights doubled", "crosskd_double"),
        ("plain CrossKD, loss weights times 1.5", "crosskd_half_more"),
        ("one loss per tap: pool 1, fc2 1", "taps_pool_fc2"),
        ("one loss per tap: 1 each", "taps_strong"),
        ("one loss per tap: a third each", "taps_equal"),
        ("a sixth each, and half for their mean", "blend"),
    ],
)
def test_the_table_of_the_screen_is_that_of_the_recorded_runs(title, arm):
    assert row_against_crosskd("decisive_screen", title, arm) in rows_of_results()


DECIDED = {
    "winner": "CrossKD-IFC (one loss per tap)",
    "second": "one loss per tap, and one for their mean",
    "crosskd": "plain CrossKD",
    "single": "fc1 alone",
    "ifc": "mean of fc1 and fc2",
    "student_longer": "plain student, 600 steps",
    "student_head": "prediction mimicking",
    "student": "plain student",
}


@pytest.mark.parametrize("arm", DECIDED)
def test_the_table_of_the_decisive_comparison_is_that_of_the_recorded_runs(arm):
    table = results("decisive")
    more = tell(table.difference(arm, "crosskd")) if arm != "crosskd" else "-"
    row = f"| {DECIDED[arm]} | {ap_of(table, arm)} | {more} | {len(table.scores(arm))} |"
    assert row in rows_of_results(after="## The decisive comparison")


def test_the_verdicts_of_the_decisive_comparison_are_told_as_recorded():
    contrasts = results("decisive").contrasts()
    check_verdicts(contrasts, 7, DECIDED, after="## The decisive comparison")
    best = next(c for c in contrasts if (c.arm, c.reference) == ("winner", "crosskd"))
    told = "{:+.1f} AP (corrected interval {:+.1f} to {:+.1f})"
    assert told.format(best.difference.mean, *best.corrected) in told_in_results()
    gain = f"{best.difference.mean:.1f} AP"
    assert f"beats plain CrossKD by {gain}" in " ".join(read("docs", "choosing.md").split())
    text = " ".join(read("README.md").split())
    assert f"beats plain CrossKD by {gain}** ({{:.1f}} to {{:.1f}};".format(*best.corrected) in text
    ahead = sum(value > 0 for value in best.difference.values.values())
    assert f"ahead of plain CrossKD on {ahead} of the 16 seeds" in told_in_results()
    longer = next(c for c in contrasts if c.reference == "student_longer")
    lead = "{:.1f} AP behind plain CrossKD ({:.1f} to {:.1f}; {} seeds)".format(
        longer.difference.mean, *longer.corrected, len(longer.difference.values)
    )
    assert f"A plain student that trains as long is {lead}" in text


def test_what_a_longer_training_of_the_plain_student_gives_is_told_as_recorded():
    table, text = results("decisive"), told_in_results()
    longer, crosskd, mimicking = (
        table.difference(arm, "student") for arm in ("student_longer", "crosskd", "student_head")
    )
    assert (
        f"They add {longer.mean:.1f} AP to the plain student, plain CrossKD adds {crosskd.mean:.1f}"
        in text
    )
    assert [len(x.values) for x in (longer, crosskd, mimicking)] == [8, 8, 8]
    assert f"told from the plain student: {tell(mimicking)}, and it is below it on three" in text
    assert sum(value < 0 for value in mimicking.values.values()) == 3
    older = results("shapes_faster_rcnn").difference("student_head", "student")
    told = f"In the older one it added {tell(older)}".replace("+", "")
    assert told in text
    report = read("benchmarks", "decisive", "report.md")
    assert re.search(
        r"`crosskd` minus `student_longer` +\| \+2.4 +\| \+1.6 to \+3.2 .*\| helps", report
    )


LONG = {
    "winner": "CrossKD-IFC (one loss per tap)",
    "crosskd_double": "plain CrossKD, loss weights doubled",
    "crosskd": "plain CrossKD",
    "ifc": "mean of fc1 and fc2",
    "student": "plain student",
}


def test_the_verdicts_of_the_longer_training_are_told_as_recorded():
    contrasts = results("decisive_long").contrasts()
    check_verdicts(contrasts, 3, LONG, after="### With twice the steps")


def test_what_the_longer_training_shows_is_told_as_recorded():
    table, text = results("decisive_long"), told_in_results()
    gain = table.difference("winner", "crosskd")
    weight = table.difference("crosskd_double", "crosskd")
    assert gain.mean < results("decisive").difference("winner", "crosskd").mean
    corrected = [
        "{:+.1f} ({}{:+.1f} to {:+.1f}".format(c.difference.mean, "{}", *c.corrected)
        for c in table.contrasts()[:2]  # the two of "winner"
    ]
    ours, controls = (x.format("corrected ") for x in corrected)
    told = f"minus plain CrossKD is {ours}), minus plain CrossKD with its total weight"
    assert f"{told} {controls}). Both intervals include 0." in text
    assert max(c.corrected[0] for c in table.contrasts()[:2]) < 0
    count = len(gain.values)
    assert f"nothing of this lead is certain: {ours}) on {count} seeds." in text
    assert f"with doubled weights gains {tell(weight)[:-1]}, not corrected)" in text
    assert f"({ap_of(table, 'teacher')} AP)" in text
    left = [-results(x).difference("winner", "teacher").mean for x in ("decisive_long", "decisive")]
    assert "end {:.1f} AP below their teachers, after 440 steps {:.1f} AP".format(*left) in text
    front = " ".join(read("README.md").split())
    assert f"With twice the steps its lead is {corrected[0].format('')}; {count} seeds)" in front
    behind = -results("decisive").difference("ifc", "crosskd").mean
    assert f"the method's first form, is {behind:.1f} AP behind plain CrossKD" in text


RETINANET = {
    "ifc": "mean of conv1, conv2 and conv3, the default",
    "crosskd": "plain CrossKD",
    "taps": "one loss per tap",
}


WEIGHT = {
    "crosskd_ifc": "CrossKD-IFC (one loss per tap)",
    "crosskd_ifc_half": "CrossKD-IFC, loss weights halved",
    "crosskd_double": "plain CrossKD, loss weights doubled",
    "crosskd": "plain CrossKD",
}


ON_PHOTOS = {
    "winner": "CrossKD-IFC (one loss per tap)",
    "crosskd": "plain CrossKD",
    "single": "fc1 alone",
    "ifc": "mean of fc1 and fc2",
    "student": "plain student",
}


DEPTH = {
    "taps": "one loss per tap",
    "mean": "mean of conv1, conv2 and conv3",
    "crosskd": "plain CrossKD",
    "conv3": "conv3 alone",
}


LATER = {
    "decisive_screen_depth": (DEPTH, "### Heads of four convolutions"),
    "decisive_photos": (ON_PHOTOS, "### On photos"),
    "decisive_weight": (WEIGHT, "### Equal weights"),
    "decisive_long": (LONG, "### With twice the steps"),
    "decisive_retinanet": (RETINANET, "### RetinaNet"),
}


@pytest.mark.parametrize("name, arm", [(name, arm) for name in LATER for arm in LATER[name][0]])
def test_the_tables_of_later_comparisons_are_those_of_the_recorded_runs(name, arm):
    table, (titles, heading) = results(name), LATER[name]
    more = "-" if arm == "crosskd" else tell(table.difference(arm, "crosskd"))
    rows = rows_of_results(after=heading)
    assert f"| {titles[arm]} | {ap_of(table, arm)} | {more} |" in rows


def test_the_bases_of_dense_detectors_have_the_weights_of_the_options():
    cells = []
    for kind in ("RetinaNet", "FCOS"):
        paths = (f"configs/Base-{kind}.yaml", f"configs/quick/Base-{kind}-shapes.yaml")
        found = [load_config(os.path.join(ROOT, path)).MODEL.CROSSKD.LOSS for path in paths]
        ((cls, box),) = {(x.CLS_WEIGHT, x.BOX_WEIGHT) for x in found}
        cells.append(f"{cls}, {box} (`{paths[0]}`)")
    row = f"| CrossKD's weights $w_c, w_b$ | {' | '.join(cells)} |"
    assert row in read("docs", "options.md").splitlines()


def test_what_heads_of_four_convolutions_show_is_told_as_recorded():
    table, text = results("decisive_screen_depth"), told_in_results()
    contrasts = table.contrasts()
    check_verdicts(contrasts, 3, DEPTH, after="### Heads of four convolutions")
    assert {len(table.scores(arm)) for arm in DEPTH} == {6}
    assert {c.difference.teachers for c in contrasts} == {4}
    assert f"share four teachers (1,600 steps, {ap_of(table, 'teacher')} AP)" in text
    ahead = [table.difference("taps", other).values.values() for other in ("crosskd", "conv3")]
    assert all(value > 0 for values in ahead for value in values)
    assert "ahead of plain CrossKD and of conv3 alone on 6 of the 6 seeds" in text
    lead = contrasts[2]
    told = "{:+.1f} (corrected {:+.1f} to {:+.1f}) on 6 seeds, but on validation images"
    assert told.format(lead.difference.mean, *lead.corrected) in text
    assert (lead.arm, lead.reference) == ("taps", "crosskd")
    low, high = table.difference("mean", "crosskd").interval
    assert low < 0 < high


def test_what_equal_weights_show_is_told_as_recorded():
    table, text = results("decisive_weight"), told_in_results()
    check_verdicts(table.contrasts(), 4, WEIGHT, after="### Equal weights")
    found = {(c.arm, c.reference): c for c in table.contrasts()}
    equal, halved = found["crosskd_ifc", "crosskd_double"], found["crosskd_ifc_half", "crosskd"]
    told = [
        "{:+.1f} (corrected {:+.1f} to {:+.1f})".format(c.difference.mean, *c.corrected)
        for c in (equal, halved)
    ]
    count = sum(value > 0 for value in equal.difference.values.values())
    assert f"doubled weights on {count} of the 8 seeds, in the mean by {told[0]}." in text
    assert f"is behind it, too: CrossKD-IFC is ahead by {told[0]}." in text
    assert f"CrossKD-IFC can't be told from it: {told[1]}." in text
    doubled = tell(table.difference("crosskd_double", "crosskd"))[:-1]
    assert f"Plain CrossKD gains {doubled}, not corrected) from doubled weights." in text
    assert f"has a teacher of its own ({ap_of(table, 'teacher')} AP)" in text
    assert f"by {equal.difference.mean:.1f} AP (8 seeds)" in read("docs", "choosing.md")


STABLE = {
    "student": "plain student",
    "crosskd": "plain CrossKD",
    "mean": "mean of fc1 and fc2",
    "crosskd_ifc": "CrossKD-IFC (one loss per tap)",
}
RATES = ("", "_x2", "_x4")


@pytest.mark.parametrize("arm", STABLE)
def test_the_table_of_learning_rates_is_that_of_the_recorded_runs(arm):
    cells = [ap_of(results("stability"), arm + rate) for rate in RATES]
    assert f"| {STABLE[arm]} | {' | '.join(cells)} |" in rows_of_results("### Stability")


def test_what_learning_rates_show_is_told_as_recorded():
    table, text = results("stability"), told_in_results()
    report = read("benchmarks", "stability", "report.md")
    arms = [arm + rate for arm in STABLE for rate in RATES]
    runs = [run for arm in arms for found in table.current(arm).values() for run in found]
    (count,) = {len(table.scores(arm)) for arm in arms}
    assert report.count(f"| 0 of {count} ") == len(arms)
    assert f"None of the {len(runs)} trainings failed" in text
    assert count == 6 and "There are six seeds. They share two teachers" in text
    leads = [tell(table.difference(f"crosskd_ifc{x}", f"crosskd{x}")) for x in RATES]
    assert "leads plain CrossKD by {}, {} and {}".format(*leads) in text
    gains = [tell(table.difference(f"crosskd{x}", f"student{x}")) for x in RATES]
    assert "Plain CrossKD leads the plain student by {}, {} and {}".format(*gains) in text
    ratios = []
    for rate in ("", "_x4"):
        row = rf"`crosskd_ifc{rate}` +\| 0 of \d +\| [\d.]+ +\| ([\d.]+ \([^)]+\)) of `student"
        ratios += re.findall(row, report)
    assert "{} times the plain student's, with four times the rate {} times".format(*ratios) in text
    intervals = re.findall(r"([\d.]+) \(([\d.]+) to ([\d.]+)\) of `", report)
    ((ratio, low, high),) = {x for x in intervals if not float(x[1]) <= 1 <= float(x[2])}
    told = f"{ratio} ({low} to {high}) times as much as plain CrossKD"
    assert told in text and "`mean_x4` " in report.split(f"{ratio} ({low}")[0].splitlines()[-1]
    assert f"Of the {len(intervals)} ratios in the report, one interval excludes 1" in text
    varies = [statistics.mean(table.logged(x, "grad_norm_variation").values()) for x in arms]
    told = f"by {min(varies):.0%} to {max(varies):.0%} of its mean, most in the plain student at"
    assert told.replace("%", " %") in text and arms[varies.index(max(varies))] == "student_x4"


def test_what_the_photos_show_is_told_as_recorded():
    table, text = results("decisive_photos"), told_in_results()
    check_verdicts(table.contrasts(), 3, ON_PHOTOS, after="### On photos")
    (ours,) = [c for c in table.contrasts() if (c.arm, c.reference) == ("winner", "crosskd")]
    count = len(ours.difference.values)
    found = "{:+.1f} AP (corrected {:+.1f} to {:+.1f})".format(
        ours.difference.mean, *ours.corrected
    )
    assert f"beats plain CrossKD by {found}, on {count} seeds" in text
    short = "{:.1f} AP ({:.1f} to {:.1f}; {} seeds)"
    short = short.format(ours.difference.mean, *ours.corrected, count)
    assert f"of blood cells, CrossKD-IFC beats plain CrossKD by {short}" in read("README.md")
    told = f"of blood cells it beats plain CrossKD by {ours.difference.mean:.1f} AP ({count} seeds)"
    assert told in read("docs", "choosing.md")
    ahead = sum(x > 0 for x in ours.difference.values.values())
    assert f"is ahead of plain CrossKD on {ahead} of the {count} seeds. Its students" in text
    left = [-table.difference(arm, "teacher").mean for arm in ("winner", "crosskd", "student")]
    told = (
        "end {:.1f} AP below their teachers, those of plain CrossKD {:.1f} AP, and plain students "
    )
    assert (told + "{:.1f} AP.").format(*left) in text
    assert f"its own (1,000 steps, {ap_of(table, 'teacher')} AP); students" in text
    gains = [table.difference(arm, "student").mean for arm in ("winner", "crosskd")]
    told = "gained {:.1f} AP by CrossKD-IFC and {:.1f} AP by plain CrossKD ([8 seeds]"
    assert told.format(*gains) in read("docs", "own_data.md")


def test_what_retinanet_shows_is_told_as_recorded():
    table, text = results("decisive_retinanet"), told_in_results()
    check_verdicts(table.contrasts(), 2, RETINANET, after="### RetinaNet")
    (ours,) = [c for c in table.contrasts() if c.arm == "ifc"]
    found = "{:+.1f} AP (corrected {:+.1f} to {:+.1f})".format(
        ours.difference.mean, *ours.corrected
    )
    assert f"beats plain CrossKD by {found} on {len(ours.difference.values)} seeds" in text
    short = "{:.1f} AP ({:.2f} to {:.2f}; 12 seeds)".format(ours.difference.mean, *ours.corrected)
    assert f"beats plain CrossKD by little: {short}" in read("README.md")
    assert f"beats plain CrossKD by {ours.difference.mean:.1f} AP" in read("docs", "choosing.md")
    ahead = sum(x > 0 for x in ours.difference.values.values())
    told = "is ahead on {} of the 12 seeds. The difference is real "
    told += "({:+.2f}, corrected {:+.2f} to {:+.2f})"
    assert told.format(ahead, ours.difference.mean, *ours.corrected) in text
    assert "its 90 % interval, {:+.2f} to {:+.2f}, lies inside".format(*ours.equivalence) in text
    left = [-table.difference(arm, "teacher").mean for arm in ("crosskd", "ifc")]
    assert "end {:.1f} AP (plain CrossKD) and {:.1f} AP (the mean) below".format(*left) in text
    values = table.difference("taps", "crosskd").values
    taps = values.values()
    assert f"It is ahead on {sum(x > 0 for x in taps)} of the 12 seeds." in text
    assert f"it ended {-min(taps):.1f} AP below plain CrossKD" in text
    others = summarize({seed: x for seed, x in values.items() if x > min(taps)})
    told = "The other eleven are {:+.1f} AP ahead ({:+.1f} to {:+.1f})"
    assert told.format(others.mean, *others.interval) in text
    assert f"each with a teacher of its own (1,200 steps, {ap_of(table, 'teacher')} AP)" in text


TEACHER_KINDS = {
    "student": "none",
    "faster_rcnn": "Faster R-CNN R34",
    "cascade": "Cascade R-CNN R34, stage 1",
    "cascade_2": "the same, stage 2",
    "cascade_3": "the same, stage 3",
    "cascade_mean": "the same, mean of the stages",
    "vit": "a small ViT",
}


def ap_of_teacher(arm):
    if arm == "vit":
        used = json.loads(read("benchmarks", "teacher_kinds", "vit_teacher.json"))["runs"][-1]
        return f"{used['AP']['crosskd_shapes_large_val']:.1f}"
    if arm == "student":
        return "-"
    name = "cascade_teacher" if arm.startswith("cascade") else "teacher"
    (found,) = results("teacher_kinds").scores(name).values()
    return f"{found:.1f}"


def row_of_a_kind_of_teacher(arm):
    table = results("teacher_kinds")
    more = "-" if arm == "faster_rcnn" else tell(table.difference(arm, "faster_rcnn"))
    return f"| {TEACHER_KINDS[arm]} | {ap_of_teacher(arm)} | {ap_of(table, arm)} | {more} |"


@pytest.mark.parametrize("arm", TEACHER_KINDS)
def test_the_table_of_kinds_of_teachers_is_that_of_the_recorded_runs(arm):
    text = read("docs", "teachers_and_students.md")
    assert row_of_a_kind_of_teacher(arm) in text.splitlines()
    assert len(results("teacher_kinds").scores(arm)) == 3


def test_what_kinds_of_teachers_show_is_told_as_recorded():
    table = results("teacher_kinds")
    text = " ".join(read("docs", "teachers_and_students.md").split())
    stages = table.difference("cascade_mean", "cascade")
    assert stages.interval[0] > 0  # the protocol's rule for the default of TEACHER.STAGE
    corrected = {(c.arm, c.reference): c.corrected for c in table.contrasts()}
    low, high = corrected["cascade_mean", "cascade"]
    assert f"{tell(stages)} AP (corrected for the protocol's" in text
    assert f"six contrasts {low:+.1f} to {high:+.1f})" in text
    assert f"than the first: {tell(table.difference('cascade_3', 'cascade'))}." in text
    ahead = {arm: float(ap_of_teacher(arm)) for arm in ("cascade", "faster_rcnn")}
    assert round(ahead["cascade"] - ahead["faster_rcnn"]) == 9  # as docs/choosing.md says
    told = tell(table.difference("vit", "student"))
    assert f"can't be told from the plain student: {told}." in text


def test_what_self_distillation_gives_is_told_as_recorded():
    table = results("self_distillation")
    teacher, student = (ap_of(table, arm) for arm in ("teacher", "self"))
    text = " ".join(read("docs", "teachers_and_students.md").split())
    assert f"has {teacher} AP on the test images, the R18 that learns from it" in text
    found = table.difference("self", "teacher")
    assert f"scratch, {student}. The difference is {tell(found)}." in text
    assert len(found.values) == 3


@pytest.mark.parametrize("name", ["decisive_weight", "decisive_retinanet", "teacher_kinds"])
def test_recorded_runs_are_of_todays_settings(name):
    """Else all would be outdated, and trained again."""
    protocol = load_protocol(os.path.join(ROOT, "benchmarks", "protocols", f"{name}.yaml"))
    runs = json.loads(read("benchmarks", name, "results.json"))["runs"]
    last = {run["arm"]: run for run in runs if not run.get("outdated")}
    for arm, run in last.items():
        assert run["config_sha256"] == protocol.run(arm, run["seed"], "x").digest()
