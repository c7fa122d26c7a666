#!/usr/bin/env python
"""Detects objects in images, folders, videos and cameras, with any trained detector.

    python tools/predict.py deployed photos/ more.jpg              # an exported student
    python tools/predict.py output/quick/crosskd_ifc video.mp4     # the folder of a training
    python tools/predict.py output/model_0000099.pth camera:0      # a checkpoint
    python tools/predict.py output/quick/crosskd_ifc photos/ --teacher config   # side by side
    python tools/predict.py deployed photos/ --json results.json --no-pictures

The config is the one in the weights, else the one beside them, or --config-file. Pictures lie in
--output, named as the inputs. --json writes COCO results. Exit status 1: an input could not be
read, the others are done.
"""

import argparse
import sys
from typing import List, Optional

import torch

from crosskd_ifc.analysis.detector import load_configured_teacher, load_detector
from crosskd_ifc.analysis.inputs import find_sources
from crosskd_ifc.analysis.prediction import predict
from crosskd_ifc.common.command_line import run_tool, tool_parser


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("weights", metavar="WEIGHTS", help="folder of an export or a run, or file")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="file, folder or camera:0")
    parser.add_argument("--config-file", default="", help="that belongs to WEIGHTS")
    parser.add_argument(
        "--teacher",
        default="",
        metavar="WEIGHTS",
        help="a second detector, drawn beside; 'config': the teacher that the config names",
    )
    parser.add_argument(
        "--teacher-config", default="", help="that belongs to the teacher's WEIGHTS"
    )
    parser.add_argument("--output", default="output/predictions", help="folder for the pictures")
    parser.add_argument("--no-pictures", action="store_true", help="write none")
    parser.add_argument("--json", default="", metavar="FILE", help="COCO results to write")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    parser.add_argument(
        "--frames", type=int, default=0, help="most of a video or camera; 0: all, until Ctrl-C"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="that the models run on")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="overrides of the config (KEY=VALUE, if it is a LazyConfig)",
    )
    args = parser.parse_args(argv)
    if args.no_pictures and not args.json:
        parser.error("--no-pictures without --json would write nothing")
    return args


def main(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    folder = "" if args.no_pictures else args.output
    sources = find_sources(args.inputs, excluded=folder)
    device = args.device
    student = load_detector(
        args.weights, config_file=args.config_file, opts=args.opts, device=device
    )
    detectors = {"student": student}
    if args.teacher == "config":
        detectors = {
            "teacher": load_configured_teacher(student, ["MODEL.DEVICE", device]),
            **detectors,
        }
    elif args.teacher:
        teacher = load_detector(args.teacher, config_file=args.teacher_config, device=device)
        detectors = {"teacher": teacher, **detectors}
    done = predict(
        detectors,
        sources,
        folder=folder,
        results=args.json,
        threshold=args.threshold,
        frames=args.frames,
        force=args.force,
    )
    shown = done.files if len(done.files) <= 3 else [*done.files[:2], "...", done.files[-1]]
    for file in shown:
        print(f"Wrote {file}")
    what = f"in {args.json}" if args.json else f"with a score of at least {args.threshold:g}"
    print(f"{done.images} images, {done.detections} detections {what}")
    if done.images:
        speeds = ", ".join(f"{name} {done.images / d.seconds:.1f}" for name, d in detectors.items())
        print(
            f"{done.images / done.seconds:.1f} images/s with reading, drawing and writing; the "
            f"model alone on {args.device}: {speeds} images/s"
        )
    if done.unreadable:
        print(f"Not read: {', '.join(done.unreadable)}", file=sys.stderr)
    return 1 if done.unreadable else 0


def invoke_main(argv: Optional[List[str]] = None) -> None:
    status = run_tool(lambda: main(parse(argv)))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    invoke_main()
