#!/usr/bin/env python
"""Writes one HTML page about one training: what it learned, where it errs, what it cost.

    python tools/report.py output/quick/crosskd_ifc
    python tools/report.py output/quick/crosskd_ifc --no-models    # from the logs alone, in seconds

Curves of losses and AP, agreement with the teacher, AP by class beside the teacher's, the worst
test images with the detections of teacher, cross-head and student, settings, cost. Everything is in
the one file. It also shows a training that is still running.
"""

import argparse
import os
from typing import List, Optional

import torch

from crosskd_ifc.analysis.run_report import write_run_report
from crosskd_ifc.common.command_line import run_tool, tool_parser


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="of a training")
    parser.add_argument("--output", help="HTML file; without it, OUTPUT_DIR/report.html")
    parser.add_argument("--config-file", default="", help="instead of OUTPUT_DIR/config.yaml")
    parser.add_argument("--no-models", action="store_true", help="leave the worst images out")
    parser.add_argument(
        "--evaluate-teacher", action="store_true", help="if the training hasn't: takes a while"
    )
    parser.add_argument("--images", type=int, default=100, help="of the test set to search")
    parser.add_argument("--shown", type=int, default=6, help="how many of the worst to draw")
    parser.add_argument("--threshold", type=float, default=0.5, help="score of a detection")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="that the models run on")
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    args = parser.parse_args(argv)
    if args.images < 1 or args.shown < 1:
        parser.error("--images and --shown must be at least 1")
    if args.no_models and args.evaluate_teacher:
        parser.error("--evaluate-teacher needs the models")
    return args


def main(args: argparse.Namespace) -> None:
    out = write_run_report(
        args.folder,
        args.output or os.path.join(args.folder, "report.html"),
        config_file=args.config_file,
        with_models=not args.no_models,
        with_teacher=args.evaluate_teacher,
        images=args.images,
        shown=args.shown,
        threshold=args.threshold,
        device=args.device,
        force=args.force,
    )
    print(f"Wrote {out}")


def invoke_main(argv: Optional[List[str]] = None) -> None:
    run_tool(lambda: main(parse(argv)))


if __name__ == "__main__":
    invoke_main()
