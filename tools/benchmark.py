#!/usr/bin/env python
r"""Times a distillation step beside the plain student's step and the stock teacher's forward.

All in one run, in turns, on random images and weights: no data and no weights are needed.

    python tools/benchmark.py --config-file configs/COCO-Detection/crosskd_ifc_R_18_FPN_1x.yaml
    python tools/benchmark.py --config-file ... --sweep --output sweep.json    # and sweep.png
    python tools/benchmark.py --config-file ... --image-size 800 1333 --batch 16 \
        SOLVER.AMP.ENABLED True
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys

# Before torch is imported: the memory profiler warns of each tensor that is older than itself.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from crosskd_ifc.analysis.benchmark.step import Case, StepBenchmark, summarize_times  # noqa: E402
from crosskd_ifc.analysis.benchmark.sweep import draw_sweep, sweep  # noqa: E402
from crosskd_ifc.analysis.benchmark.trace import gpu_use  # noqa: E402
from crosskd_ifc.common.command_line import run_tool, tool_parser  # noqa: E402
from crosskd_ifc.common.config_files import load_config  # noqa: E402
from crosskd_ifc.common.environment import hardware, versions  # noqa: E402

TITLES = {
    "student": "(a) plain student, training step",
    "teacher": "(b) stock teacher, forward",
    "cross_head": "(d) cross-head alone, forward and backward",
    "distillation": "(c) distillation, training step",
}


def parse_args(argv=None):
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--config-file", default="", help="of a student with a teacher")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="MODEL.DEVICE")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(320, 480), metavar=("H", "W"), help="pixels"
    )
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--rois", type=int, default=512, help="for each image, two-stage")
    parser.add_argument("--precision", default="float32", help="of the teacher's forward")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each part")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--sweep", action="store_true", help="how the cost grows with each size")
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument(
        "--profile", default="", help="write a step's Chrome trace (.json, .json.gz)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    if args.sweep and args.profile:
        parser.error("--profile shows one step, so it doesn't go with --sweep")
    return args


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    case = Case(*args.image_size, images=args.batch)

    def build(case, *opts):
        settings = ["MODEL.DEVICE", args.device, "MODEL.CROSSKD.TEACHER.PRECISION", args.precision]
        settings += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", str(args.rois)]
        cfg = load_config(args.config_file, [*settings, *opts, *args.opts])
        cfg.freeze()
        return StepBenchmark(cfg, case)

    print(f"Timed on {args.device}: {case}; the teacher's forward in {args.precision}\n")
    if args.sweep:
        found = {"sweep": sweep(build, case, args.rounds)}
        rows = [(r["what"], r["value"], r["ratios"]["c/a"]["median"]) for r in found["sweep"]]
        print(tabulate(rows, ("varied", "value", "c/a"), tablefmt="github"))
    else:
        bench = build(case)
        found = measure(bench, args.rounds)
        if args.profile:
            os.makedirs(os.path.dirname(os.path.abspath(args.profile)), exist_ok=True)
            bench.profile(args.profile)
            print(f"Profile: {args.profile}, for chrome://tracing or ui.perfetto.dev")
            found["profiled_step"] = use = gpu_use(args.profile)  # None without a GPU
            if use:
                print(f"Of {use['span']:.3f} seconds the GPU works {use['busy']:.3f}")
    found = {
        "command": shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(args.device, torch.get_num_threads()),
        "case": dataclasses.asdict(case),
        **found,
    }
    if args.output:
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        with open(args.output, "w") as f:
            json.dump(found, f, indent=1)
        print(f"Numbers: {args.output}")
        if args.sweep:
            print(f"Plot:    {draw_sweep(found['sweep'], os.path.splitext(args.output)[0])}")


def measure(bench, rounds):
    """Times, memory and breakdown, printed; returns them."""
    found = summarize_times(bench.measure(rounds))
    found["peak_bytes"] = memory = bench.peak_memory()
    found["teacher_bytes"] = bench.teacher_bytes()
    found["breakdown"] = bench.breakdown(max(rounds // 3, 3))
    images = len(bench.batch)
    found["images_per_second"] = {
        name: round(images / x["median"], 3) for name, x in found["seconds"].items()
    }
    rows = [
        (TITLES[n], x["median"], "{} - {}".format(*x["quartiles"]), images / x["median"])
        + (memory[n] / 2**20,)
        for n, x in found["seconds"].items()
    ]
    headers = ("part", "seconds, median", "quartiles", "images/s", "peak MiB")
    floats = ("", ".3f", "", ".2f", ".0f")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=floats), "\n")
    rows = [(n, x["median"], "{} - {}".format(*x["quartiles"])) for n, x in found["ratios"].items()]
    print(tabulate(rows, ("ratio", "median", "quartiles"), tablefmt="github", floatfmt=".3f"), "\n")
    rows = list(found["breakdown"].items())
    print(tabulate(rows, ("piece of (c)", "seconds"), tablefmt="github", floatfmt=".3f"), "\n")
    more, theirs = (
        x / 2**20 for x in (memory["distillation"] - memory["student"], memory["teacher"])
    )
    print(f"At its peak (c) has {more:.0f} MiB more alive than (a), and (b) {theirs:.0f} MiB")
    return found


def invoke_main():
    run_tool(lambda: main(parse_args()))


if __name__ == "__main__":
    invoke_main()
