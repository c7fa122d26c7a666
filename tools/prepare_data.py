#!/usr/bin/env python
"""From a folder of photos to configs to train with; and what is wrong with a data set.

    python tools/prepare_data.py init PHOTOS --output cells.yaml       # writes a dataset card
    python tools/prepare_data.py check cells.yaml                      # what is wrong with it?
    python tools/prepare_data.py configs cells.yaml --teacher R101 --student R18 --output configs

`check` decodes every image in full, on one core. Exit status: 0 no errors (there may be warnings),
1 errors were found, 2 there is nothing to check, or what was asked for can't be done.
"""

import argparse
import json
import shlex
import sys
from typing import List, Optional

import crosskd_ifc  # noqa: F401  registers the built-in data sets
from crosskd_ifc.common.command_line import HelpFormatter, tool_command, tool_parser
from crosskd_ifc.common.files import claim_output
from crosskd_ifc.data.check import check_dataset
from crosskd_ifc.data.histograms import draw_histograms, refuse_other_files
from crosskd_ifc.data.layouts import LAYOUTS
from crosskd_ifc.data.new_card import make_card
from crosskd_ifc.training.recipe import BACKBONES, DETECTORS, write_configs


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__file__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, formatter_class=HelpFormatter)

    init = command("init", "write a dataset card for a folder of photos")
    init.add_argument("folder", help="photos with VOC XML, COCO json, YOLO files or CSV below it")
    init.add_argument("--output", required=True, metavar="CARD", help="the card to write, X.yaml")
    init.add_argument(
        "--split",
        default="",
        help="train/val/test, such as 0.8/0.1/0.1, instead of the folder's own lists",
    )
    init.add_argument("--layout", default="", choices=("", *LAYOUTS), help="if it holds several")
    init.add_argument("--seed", type=int, default=0, help="of the split")
    init.add_argument(
        "--ignore-near-duplicates",
        action="store_true",
        help="split photos that look alike as all others",
    )
    init.add_argument("--force", action="store_true", help="replace an existing card")

    check = command("check", "list what is wrong with a data set")
    check.add_argument("target", help="a dataset card, or the name of a registered data set")
    check.add_argument("--all", action="store_true", help="every place, not only the first ones")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--picture", metavar="PNG", help="draw box sizes and class counts")

    configs = command("configs", "write configs of teacher, plain and distilled student")
    configs.add_argument("card", help="a dataset card")
    configs.add_argument("--output", required=True, metavar="FOLDER", help="for the configs")
    configs.add_argument("--teacher", default="R101", choices=BACKBONES, help="backbone")
    configs.add_argument("--student", default="R18", choices=BACKBONES, help="backbone")
    configs.add_argument("--detector", default="faster_rcnn", choices=DETECTORS, help="both")
    start = configs.add_mutually_exclusive_group()
    start.add_argument(
        "--pretrained", action="store_true", help="start from ImageNet weights (the default)"
    )
    start.add_argument("--from-scratch", action="store_true", help="start from random weights")
    configs.add_argument("--gpus", type=int, default=1, help="0: for a CPU")
    configs.add_argument("--force", action="store_true", help="replace existing configs")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    args = parse(argv)
    try:
        if args.command == "init":
            options = dict(split=args.split, layout=args.layout, seed=args.seed, force=args.force)
            near = not args.ignore_near_duplicates
            print(make_card(args.folder, args.output, near_duplicates=near, **options))
            card = shlex.quote(args.output)
            command = tool_command("prepare_data")
            print("\nNext, in this order:")
            print(f"  {command} check {card}")
            print(f"  {command} configs {card} --output FOLDER")
            return 0
        if args.command == "configs":
            options = dict(teacher=args.teacher, student=args.student, detector=args.detector)
            options.update(pretrained=not args.from_scratch, gpus=args.gpus, force=args.force)
            print(write_configs(args.card, args.output, **options))
            return 0
        if args.picture:
            refuse_other_files(args.picture)
            claim_output(args.picture, force=True, option="--picture")
        report = check_dataset(args.target)
        if args.picture:
            draw_histograms(report, args.picture)
            print(f"Wrote {args.picture}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print(report.text(examples=None) if args.all else report)
    return 1 if report.total("error") else 0


def check_data() -> int:
    """``check`` as a command of its own."""
    return main(["check", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
