"""What the README says is so."""

import glob
import json
import os
import re
import statistics

import pytest

from crosskd_ifc.paired import paired_difference, summarize
from crosskd_ifc.protocol import load_protocol
from crosskd_ifc.report import Table, report_text

ROOT = os.path.join(os.path.dirname(__file__), "..")
TITLES = {
    "teacher": "teacher R34",
    "student": "student R18, plain",
    "crosskd": "student R18, CrossKD",
    "crosskd_ifc": "student R18, CrossKD-IFC",
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


COMPARED = {
    "teacher": "teacher",
    "student": "student, plain",
    "student_head": "mimicking by the student's own head",
    "feature": "feature mimicking (PKD)",
    "crosskd": "plain CrossKD",
    "crosskd_ifc": "CrossKD-IFC",
}
PROTOCOLS = (
    "shapes_faster_rcnn",
    "bccd_faster_rcnn",
    "bccd_faster_rcnn_640",
    "shapes_retinanet",
    "shapes_inherit",
)


def rows_of_the_comparison():
    """The README's table of results, from the recorded runs."""
    tables = [Table(json.loads(read("benchmarks", name, "results.json"))) for name in PROTOCOLS]
    for arm, title in COMPARED.items():
        cells = []
        for table in tables:
            values = list(table.scores(arm).values())
            summary = summarize(values) if len(values) > 1 else None
            cells.append("{1:.1f} ± {2:.1f}, {0} seeds".format(*summary) if summary else "-")
        yield f"| {title} | {' | '.join(cells)} |"
    for other, title in (("student", "the plain student"), ("crosskd", "plain CrossKD")):
        cells = []
        for table in tables:
            found = paired_difference(table.scores("crosskd_ifc"), table.scores(other))
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(found.mean, *found.interval))
        yield f"| CrossKD-IFC minus {title} | {' | '.join(cells)} |"


@pytest.mark.parametrize("number", range(len(COMPARED) + 2))
def test_the_table_of_results_is_that_of_the_recorded_runs(number):
    assert list(rows_of_the_comparison())[number] in read("README.md").splitlines()


def test_all_pairs_together_are_told_as_recorded():
    pairs = []
    for name in PROTOCOLS:
        table = Table(json.loads(read("benchmarks", name, "results.json")))
        found = paired_difference(table.scores("crosskd_ifc"), table.scores("crosskd"))
        pairs += found.values.values()
    found = paired_difference(dict(enumerate(pairs)), dict.fromkeys(range(len(pairs)), 0.0))
    told = "over all {} pairs of seeds the difference is {:+.1f} ({:+.1f} to {:+.1f})"
    told = told.format(len(pairs), found.mean, *found.interval)
    assert told in " ".join(read("README.md").split())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_committed_report_is_that_of_the_recorded_runs(name):
    content = json.loads(read("benchmarks", name, "results.json"))
    assert report_text(content) == read("benchmarks", name, "report.md")


def test_the_table_of_the_demo_is_that_of_the_recorded_run():
    names = (
        "Teacher R34",
        "Student R18, plain",
        "Student R18, CrossKD",
        "Student R18, CrossKD-IFC",
    )
    runs = json.loads(read("benchmarks", "demo", "demo_seed_1.json"))["runs"]
    assert list(runs) == ["teacher", "student", "crosskd", "crosskd_ifc"]
    for title, run in zip(names, runs.values()):
        assert f"| {title} | {run['AP']:.1f} | {run['AP50']:.1f} |" in read("README.md")


def test_what_was_repeated_is_told_as_recorded():
    found = json.loads(read("benchmarks", "repeatability", "shapes_faster_rcnn.json"))
    for run in found["same_processor"]:
        assert all(first == second for first, second in (run["AP"], run["weights_sha256"]))
    photos = json.loads(read("benchmarks", "repeatability", "bccd_faster_rcnn.json"))
    largest = [
        max(abs(first - second) for first, second in (run["AP"] for run in runs))
        for runs in (found["other_processor"], photos["other_processor"])
    ]
    told = "AP by up to {:.1f} and {:.1f} (".format(*largest)
    assert told in " ".join(read("README.md").split())


def test_what_an_inheriting_start_gives_is_told_as_recorded():
    plain, inheriting = (
        Table(json.loads(read("benchmarks", name, "results.json"))).scores("student")
        for name in ("shapes_faster_rcnn", "shapes_inherit")
    )
    gains = [round(gain) for gain in paired_difference(inheriting, plain).values.values()]
    told = f"by {min(gains)} to {max(gains)} AP on each seed"
    assert told in " ".join(read("README.md").split())


def test_what_the_logs_say_is_told_as_recorded():
    table = Table(json.loads(read("benchmarks", "shapes_faster_rcnn", "results.json")))
    text = " ".join(read("README.md").split())
    cosines = [table.logged(arm, "fused_cosine") for arm in ("crosskd", "crosskd_ifc")]
    assert "(cosine {:.2f} at the end of the training)".format(cosines[0]) in text
    assert "keep a direction of their own ({:.2f})".format(cosines[1]) in text
    assert "teacher's feature ({:.1f})".format(table.logged("sum", "fused_length")) in text
    ifc, crosskd, head = (
        table.logged(f"{arm}_gradients", "grad_cosine_shared")
        for arm in ("crosskd_ifc", "crosskd", "student_head")
    )
    assert f"(cosine {ifc:.2f}, at fc2" in text
    assert f"for plain CrossKD ({crosskd:.2f}, at the pyramid's outputs)" in text
    assert f"student's own head ({head:.2f}, at fc2)" in text


def test_what_a_tap_is_worth_alone_is_told_as_recorded():
    runs = json.loads(read("benchmarks", "taps", "shapes_faster_rcnn.json"))["runs"]

    def ap(arm, key):
        return "{:.1f}".format(statistics.mean(r[key] for r in runs if r["run"][:-2] == arm))

    told = (
        f"reads at {ap('crosskd_ifc', 'cross_head')} AP, fc1 alone at "
        f"{ap('crosskd_ifc', 'cross_head_fc1')} and fc2 alone at "
        f"{ap('crosskd_ifc', 'cross_head_fc2')}; trained alone, fc2 reads at "
        f"{ap('fc2', 'cross_head')}"
    )
    assert told in " ".join(read("README.md").split())


def test_the_table_of_other_classes_is_that_of_the_recorded_runs():
    plain = recorded("other_classes", "seeds.json", arm="student")
    distilled = recorded("other_classes", "seeds.json", arm="other_classes")
    for title, runs in (("plain", plain), ("CrossKD-IFC, teacher of other classes", distilled)):
        row = f"| student R18, {title} | {mean(runs, 'AP')} | {each(runs)} |"
        assert row in read("README.md")


@pytest.mark.parametrize("arm", TITLES)
def test_the_table_of_masks_is_that_of_the_recorded_runs(arm):
    runs = recorded("mask_rcnn", "seeds.json", arm=arm)
    cells = f"{mean(runs, 'mask_AP')} | {each(runs, 'mask_AP')} | {mean(runs, 'AP')}"
    assert f"| Mask R-CNN {TITLES[arm]} | {cells} |" in read("README.md")


@pytest.mark.parametrize("arm", TITLES)
def test_the_table_of_fcos_is_that_of_the_recorded_runs(arm):
    runs = recorded("dense", "quick.json", arm=arm)
    (run,) = [run for run in runs if run["detector"] == "fcos"]
    assert f"| {TITLES[arm]} | {run['AP']:.1f} | {run['AP50']:.1f} |" in read("README.md")


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


@pytest.mark.parametrize("name", ["faster_rcnn", "faster_rcnn_through", "retinanet", "fcos"])
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
    step, amp = found["profiled_step"], json.loads(
        read("benchmarks", "step_cost", f"{name}_amp.json")
    )
    (nms,) = [t for kernel, t in step["kernels"].items() if "gather_keep_from_mask" in kernel]
    text = " ".join(read("docs", "performance.md").split())
    busy = "busy for {busy:.0f} of the {span:.0f} ms of a profiled step"
    assert busy.format(**{key: 1000 * step[key] for key in ("busy", "span")}) in text
    seconds = found["seconds"]["distillation"]["median"]
    assert f"({1000 * seconds:.0f} ms without the profiler); {1000 * nms:.0f} ms of these" in text
    parts = [1000 * amp["seconds"][key]["median"] for key in ("teacher", "distillation")]
    assert "in float32, is {:.0f} of {:.0f} ms".format(*parts) in text


def test_the_costs_that_the_readme_tells_are_the_measured_ones():
    text = " ".join(read("README.md").split())
    plain, _, both, *_ = costs("faster_rcnn_R50_R18_cpu", speed=False)
    assert f"takes {both} times the time of the plain student's step" in text
    assert f"together, {plain} times the plain step" in text
    plain, _, both, *_ = costs("faster_rcnn_R50_R18_h100_batch_16", speed=True)
    assert f"On an H100 (16 images of 800x1333) it is {both} times and {plain} times" in text


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
    assert f"it took {cases['fc1 + fc2']['ratio_median']:.2f} times" in text
    assert f"{cases['pool']['ratio_median']:.2f} times with `pool`" in text


def test_the_table_of_mask_losses_is_that_of_the_recorded_runs():
    runs = json.loads(read("benchmarks", "mask_rcnn", "mask_loss.json"))["runs"]
    text, prefix = read("docs", "options.md"), "MODEL.CROSSKD.LOSS.MASK_"
    for run in runs:
        names = [run["opts"].get(prefix + key) for key in ("REDUCTION", "CHANNELS")]
        cells = f"| `{names[0]}` | `{names[1]}`" if names[0] else "| (no mask loss) |"
        weight = f"{run['opts'][prefix + 'WEIGHT']:g}"
        assert f"{cells} | {weight} | {run['mask_AP']:.1f} | {run['AP']:.1f} |" in text


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "tools/README.md",
        "docs/options.md",
        "docs/performance.md",
        "docs/robustness.md",
    ],
)
def test_files_that_a_document_names_exist(document):
    text = read(document)
    folder = os.path.join(ROOT, os.path.dirname(document))
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all(os.path.exists(os.path.join(folder, link)) for link in links), links
    named = re.findall(r"(?:tools|configs)/[\w/-]+\.(?:py|yaml)", text)
    assert all(os.path.exists(os.path.join(ROOT, name)) for name in named), named
