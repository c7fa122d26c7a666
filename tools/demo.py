#!/usr/bin/env python
"""The main job on the built-in data set: teacher, plain student, plain CrossKD, CrossKD-IFC.

Trains and evaluates all four, prints one table, and writes a picture of detections and a plot of
the curves. Finished stages are skipped, interrupted ones resumed: just run it again.

    make demo
    python tools/demo.py [--output output/demo] [--seed 1]
"""

import argparse
import functools
import json
import logging
import os
import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.modeling import build_model
from tabulate import tabulate

import crosskd_ifc
from crosskd_ifc.analysis.curves import plot_curves
from crosskd_ifc.analysis.detections import compare_on_dataset
from crosskd_ifc.common.command_line import HelpFormatter
from crosskd_ifc.experiments.runs import Run, RunFailed, train

TOOLS = os.path.dirname(os.path.abspath(__file__))
# Title, config and the rough cost of a step beside the plain student's, for the ETA. On a CPU two
# of them run side by side, which uses the cores better than one after the other.
ARMS = {
    "teacher": ("Teacher R34", "faster_rcnn_R_34_shapes", 1.5),
    "student": ("Student R18, plain", "faster_rcnn_R_18_shapes", 1.0),
    "crosskd": ("Student R18, CrossKD", "crosskd_R_18_shapes", 1.4),
    "crosskd_ifc": ("Student R18, CrossKD-IFC", "crosskd_ifc_R_18_shapes", 1.4),
}
STAGES = (("teacher", "student"), ("crosskd", "crosskd_ifc"))


class Progress:
    """One line for what is running, with an ETA for the whole demo from the speed so far."""

    def __init__(self, runs, side_by_side):
        self.left = {n: 0 if r.result() else r.cfg().SOLVER.MAX_ITER for n, r in runs.items()}
        self.side_by_side, self.speeds, self.running = side_by_side, {}, {}
        self.last_print, self.lock = 0.0, threading.Lock()

    def update(self, name, done, total, seconds_per_step):
        with self.lock:
            self.left[name] = total - done
            self.running[name] = f"{ARMS[name][0]} {done}/{total}"
            if seconds_per_step:
                self.speeds[name] = seconds_per_step / ARMS[name][2]
            line = ", ".join(self.running.values())
            if self.speeds:
                line += f"; ready in about {_clock(self._seconds_left())}"
            if sys.stdout.isatty():
                print(f"\r{line:<90}", end="", flush=True)
            elif time.monotonic() - self.last_print > 20:
                print(line, flush=True)
                self.last_print = time.monotonic()

    def _seconds_left(self):
        unit = sum(self.speeds.values()) / len(self.speeds)
        combine = max if self.side_by_side else sum
        return unit * sum(combine(self.left[n] * ARMS[n][2] for n in stage) for stage in STAGES)

    def finish(self, name, result, skipped):
        with self.lock:
            self.left[name] = 0
            self.running.pop(name, None)
            note = ", finished earlier" if skipped else f" in {_clock(result['seconds'])}"
            line = f"{ARMS[name][0]}: AP {result['AP']:.1f}{note}"
            print(f"\r{line:<90}" if sys.stdout.isatty() else line, flush=True)


def _clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def build_runs(output, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = ["SEED", str(seed), "MODEL.DEVICE", device]
    runs = {}
    for name, (title, config, _) in ARMS.items():
        run = Run(title, f"quick/{config}.yaml", os.path.join(output, name), list(common))
        if name.startswith("crosskd"):
            weights = runs["teacher"].path("model_final.pth")
            run.opts += ["MODEL.CROSSKD.TEACHER.WEIGHTS", weights]
            run.needs = (runs["teacher"],)
        runs[name] = run
    return runs


def train_all(runs, device):
    """Results of all runs, the two of a stage side by side on a CPU with two or more cores."""
    workers = 2 if device == "cpu" and (os.cpu_count() or 1) > 1 else 1
    threads = os.cpu_count() // workers if device == "cpu" else 0
    progress, stop = Progress(runs, workers > 1), threading.Event()

    def one(name):
        run, skipped = runs[name], runs[name].result() is not None
        report = functools.partial(progress.update, name)
        script = os.path.join(TOOLS, "train_net.py")
        result = train(run, script, threads=threads, stop=stop, on_progress=report)
        progress.finish(name, result, skipped)
        model = build_model(run.cfg())
        return {**result, "parameters": sum(p.numel() for p in model.parameters())}

    results = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for stage in STAGES:
                results.update(zip(stage, pool.map(one, stage)))
        finally:
            stop.set()  # one failed, or Ctrl-C: the other goes on when the demo does
    return results


def draw(runs, output):
    """The picture and the plot; returns their paths."""
    cfg = runs["crosskd_ifc"].cfg()
    student = build_model(cfg)
    crosskd_ifc.attach_teacher(student, cfg)  # first: it adds the adapters, if there are any
    DetectionCheckpointer(student).load(runs["crosskd_ifc"].path("model_final.pth"))
    name = cfg.DATASETS.TEST[0]
    picture, plot = os.path.join(output, "detections.png"), os.path.join(output, "curves.png")
    loader = build_detection_test_loader(cfg, name, num_workers=0)
    classes = MetadataCatalog.get(name).thing_classes
    compare_on_dataset(student, loader, DatasetCatalog.get(name), classes, picture)
    students = {ARMS[n][0]: r.path("metrics.json") for n, r in runs.items() if n != "teacher"}
    plot_curves(students, plot, title="Built-in data set: three students, same recipe and seed")
    return picture, plot


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default=os.path.join("output", "demo"), help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of all runs")
    args = parser.parse_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("crosskd_ifc").setLevel(logging.INFO)  # the generation of the data set
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # advice to torch's own developers
    runs = build_runs(args.output, args.seed)
    cfg = runs["student"].cfg()
    start = time.monotonic()
    print(f"Data: {cfg.DATASETS.TRAIN[0]}, {len(DatasetCatalog.get(cfg.DATASETS.TRAIN[0]))} images")
    results = train_all(runs, cfg.MODEL.DEVICE)
    rows = [
        (
            ARMS[n][0],
            r["AP"],
            r["AP50"],
            r["iterations"],
            r["parameters"] / 1e6,
            r["seconds_per_step"],
        )
        for n, r in results.items()
    ]
    headers = ("run", "AP", "AP50", "steps", "parameters (M)", "s/step")
    table = tabulate(
        rows, headers, tablefmt="github", floatfmt=("", ".1f", ".1f", "d", ".1f", ".2f")
    )
    picture, plot = draw(runs, args.output)
    report = os.path.join(args.output, "results.json")
    environment = {
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": cfg.MODEL.DEVICE,
        "cores": os.cpu_count(),
    }
    with open(report, "w") as f:
        json.dump({"environment": environment, "runs": results}, f, indent=1)
    print(f"\n{cfg.DATASETS.TEST[0]}, seed {args.seed}, {cfg.MODEL.DEVICE}:\n\n{table}\n")
    print(f"Detections: {picture}\nCurves:     {plot}\nNumbers:    {report}")
    print(f"Took {_clock(time.monotonic() - start)}")


if __name__ == "__main__":
    try:
        main()
    except RunFailed as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; run it again to go on.")
