#!/usr/bin/env python
"""The main job on the built-in data set: teacher, plain student, plain CrossKD, CrossKD-IFC.

Does the runs of benchmarks/protocols/demo.yaml, prints one table, and writes pictures of
detections and features and a plot of the curves. Finished runs are skipped, interrupted ones
resumed: just run it again.

    python tools/demo.py [--output output/demo]
    python tools/demo.py --quick    # does it run here? A few steps on a few images, in a minute
"""

import os
import sys
import time

import crosskd_ifc  # noqa: F401  before detectron2, whose warnings about itself it ignores

# isort: split
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from tabulate import tabulate

from crosskd_ifc.analysis.curves import plot_curves
from crosskd_ifc.analysis.pictures import inspect_pair
from crosskd_ifc.common.command_line import recorded_command, run_tool, tool_parser
from crosskd_ifc.common.paths import TOOLS
from crosskd_ifc.experiments.comparison import Comparison, all_runs, has_weights
from crosskd_ifc.experiments.protocol import TEACHER, load_protocol
from crosskd_ifc.experiments.results import Results

DRAWN = "crosskd_ifc"  # the arm of the pictures


def draw(titles, runs, output):
    """Draw the pictures of detections and of features, and the plot; returns the three paths."""
    cfg = runs[DRAWN].cfg().clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = runs[DRAWN].weights
    detections, features = inspect_pair(cfg, output, force=True)
    plot = os.path.join(output, "curves.png")
    students = {titles[n]: r.path("metrics.json") for n, r in runs.items() if n != TEACHER}
    plot_curves(students, plot, title="Built-in data set: three students, same recipe and seed")
    return detections, features, plot


def table_of(titles, runs):
    """What came out, a row for each run."""
    rows = []
    for name, run in runs.items():
        done, size = run.result(), sum(p.numel() for p in build_model(run.cfg()).parameters())
        row = [titles[name], done["AP"], done["AP50"], done["iterations"], size / 1e6]
        rows.append([*row, done["seconds_per_step"]])
    headers = ("run", "AP", "AP50", "steps", "parameters (M)", "s/step")
    formats = ("", ".1f", ".1f", "d", ".1f", ".2f")
    return tabulate(rows, headers, tablefmt="github", floatfmt=formats)


def main(argv=None, protocol_file=""):
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--output", help="folder to write; default: output/demo, or demo_quick")
    args = parser.parse_args(argv)
    start = time.monotonic()
    protocol = load_protocol(protocol_file or ("demo_quick.yaml" if args.quick else "demo.yaml"))
    output = args.output or os.path.join("output", protocol.name)
    on_gpu = torch.cuda.is_available()
    by_key = all_runs(protocol, output, device="cuda" if on_gpu else "cpu")
    report = os.path.join(output, "results.json")
    command = recorded_command("demo", *(["--quick"] if args.quick else []))
    results = Results(protocol, report, by_key, command=command)
    # Two side by side use a CPU's cores better than one after the other.
    jobs = 1 if on_gpu else min(os.cpu_count() or 1, 2)
    comparison = Comparison(
        by_key,
        results,
        os.path.join(TOOLS, "train_net.py"),
        jobs=jobs,
        threads=0 if on_gpu else (os.cpu_count() or 1) // jobs,
    )
    runs = {name: run for (name, _), run in by_key.items()}
    titles = {name: arm.title for name, arm in protocol.arms.items()}
    data = runs[TEACHER].cfg().DATASETS.TRAIN[0]
    print(f"Data: {data}, {len(DatasetCatalog.get(data))} images")
    comparison.collect()
    failed = comparison.train([key for key, run in by_key.items() if not has_weights(run)])
    if failed:
        return list(failed.values())
    detections, features, plot = draw(titles, runs, output)
    seed, device = protocol.seeds[0], runs[TEACHER].cfg().MODEL.DEVICE
    print(f"\n{protocol.test}, seed {seed}, {device}:\n\n{table_of(titles, runs)}\n")
    print("One seed: the next may differ by 1 or 2 AP, and the order of students with it.\n")
    print(f"Detections: {detections}\nFeatures:   {features}")
    print(f"Curves:     {plot}\nNumbers:    {report}")
    print(f"Took {(time.monotonic() - start) / 60:.1f} min")
    return []


def invoke_main():
    errors = run_tool(main, resumes=True, tells_more=True)
    if errors:
        sys.exit("\nerror: " + "\n".join(errors))


if __name__ == "__main__":
    invoke_main()
