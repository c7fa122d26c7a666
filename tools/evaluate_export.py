#!/usr/bin/env python
"""COCO AP or speed of exported TorchScript and ONNX files, each in its own runtime on the CPU.

    python tools/evaluate_export.py student-onnx --dataset crosskd_shapes_test
    python tools/evaluate_export.py student-onnx student-ts --dataset cells_test --card c.yaml \\
        --checkpoint output/model_final.pth
    python tools/evaluate_export.py student-onnx student-ts --dataset crosskd_shapes_test \\
        --checkpoint output/model_final.pth --teacher teacher/model_final.pth --speed 20

EXPORTED are folders that export_student.py wrote. With --checkpoint detectron2 evaluates that, too,
and a difference of more than 0.1 AP is an error (exit status 1), of an int8 file more than 1 AP.
With --speed all run in turns instead, image by image, on the first images of the data set.
"""

import os
import sys
from typing import Any, Dict, List, Optional

import torch
from tabulate import tabulate

from crosskd_ifc.common.command_line import recorded_command, tool_parser
from crosskd_ifc.common.environment import hardware, versions
from crosskd_ifc.common.files import claim_output, write_json
from crosskd_ifc.data.cards import register_cards
from crosskd_ifc.weights.deployed import read_info
from crosskd_ifc.weights.evaluating import (
    compare,
    dataset_records,
    evaluate_checkpoint,
    evaluate_deployed,
)
from crosskd_ifc.weights.timing import images_per_second, load_detectors, measure_in_turns

_TOLERANCE = {"int8": 1.0}  # AP; of the others 0.1


def parse(argv: Optional[List[str]] = None):
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("EXPORTED", nargs="+", help="folders with model.json")
    parser.add_argument("--dataset", required=True, help="name of a registered data set")
    parser.add_argument("--card", nargs="+", default=[], help="dataset cards to register")
    parser.add_argument("--checkpoint", default="", help="compare with this checkpoint's AP")
    parser.add_argument(
        "--config-file",
        default="",
        help="the config it was trained with; its code may register the data set",
    )
    overrides = "of a LazyConfig (.py), in its syntax: those of its training"
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help=overrides)
    tolerance = dict(type=float, metavar="AP", help="the most that may differ [0.1; int8 1]")
    parser.add_argument("--tolerance", **tolerance)
    parser.add_argument(
        "--speed", type=int, default=0, metavar="ROUNDS", help="measure images per second, no AP"
    )
    parser.add_argument("--teacher", default="", help="a checkpoint whose speed to measure as well")
    parser.add_argument("--teacher-config", default="", help="the config it was trained with")
    parser.add_argument("--images", type=int, default=16, help="of a round")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--json", default="", metavar="FILE", help="for what was found")
    parser.add_argument("--force", action="store_true", help="replace an existing --json")
    args = parser.parse_args(argv)
    if args.teacher_config and not args.teacher:
        parser.error("--teacher-config is for --teacher")
    if args.teacher and not args.speed:
        parser.error("--teacher is for --speed")
    if args.speed < 0 or args.images < 1 or args.threads < 0:
        parser.error("--speed and --images must be at least 1, --threads at least 0")
    args.command = sys.argv[1:] if argv is None else argv
    return args


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    problems: List[str] = []
    try:
        if args.json:
            claim_output(args.json, force=args.force, option="--json")
        register_cards(args.card)
        kinds = [read_info(folder).kind for folder in args.EXPORTED]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"EXPORTED are {', '.join(kinds)}; give one of each kind")
        found = _speeds(args) if args.speed else _aps(args, problems)
        if args.json:
            command = recorded_command("evaluate_export", *args.command)
            threads = torch.get_num_threads()
            about = dict(versions=versions(), hardware=hardware("cpu", threads))
            write_json(args.json, {"command": command, **about, "dataset": args.dataset, **found})
    except (ImportError, OSError, ValueError) as error:
        print(f"evaluate_export: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"evaluate_export: {problem}", file=sys.stderr)
    return bool(problems)


def _aps(args, problems: List[str]) -> Dict[str, Any]:
    found, sizes, wanted = {}, {}, {}
    if args.checkpoint:  # first: the code of --config-file may register the data set
        wanted = evaluate_checkpoint(
            args.checkpoint, args.dataset, args.config_file, args.overrides
        )
        _print(args.checkpoint, wanted)
    for folder in args.EXPORTED:
        info = read_info(folder)
        found[info.kind] = evaluate_deployed(folder, args.dataset)
        sizes[info.kind] = os.path.getsize(os.path.join(folder, info.file))
        _print(folder, found[info.kind])
    content = {"images": len(dataset_records(args.dataset)), "bytes": sizes, "results": found}
    if not args.checkpoint:
        return content
    for folder, (kind, results) in zip(args.EXPORTED, found.items()):
        default = _TOLERANCE.get(kind, 0.1)
        tolerance = default if args.tolerance is None else args.tolerance
        problems += [f"{folder} has {x}" for x in compare(results, wanted, tolerance)]
    return {**content, "results": {"checkpoint": wanted, **found}}


def _print(name: str, results: dict) -> None:
    aps = (f"{task} AP {x['AP']:.2f}, AP50 {x['AP50']:.2f}" for task, x in results.items())
    print(f"{name}: {'; '.join(aps)}")


def _speeds(args) -> Dict[str, Any]:
    checkpoints = {"teacher": (args.teacher, args.teacher_config)} if args.teacher else {}
    if args.checkpoint:
        checkpoints["checkpoint"] = (args.checkpoint, args.config_file, args.overrides)
    detectors, images = load_detectors(args.EXPORTED, checkpoints, args.dataset, args.images)
    seconds = measure_in_turns(detectors, args.speed)
    found = {name: images_per_second(x, images) for name, x in seconds.items()}
    between = "{:.1f} - {:.1f}"
    rows = [(name, x["median"], between.format(*x["quartiles"])) for name, x in found.items()]
    headers = ("detector", "images/s, median", "quartiles")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))
    return {"images": images, "rounds": args.speed, "images_per_second": found}


if __name__ == "__main__":
    sys.exit(main())
