#!/usr/bin/env python
"""Draws what a student and its teacher make of the same images: two pictures, in seconds.

    python tools/visualize.py --config-file CONFIG MODEL.WEIGHTS model_final.pth [KEY VALUE ...]
    python tools/visualize.py --config-file CONFIG --images a.jpg b.png MODEL.WEIGHTS ...

detections.png: ground truth (of a data set), teacher, cross-head and student side by side.
features.png: where each level of the student's feature pyramid responds more (red) or less (blue)
than the teacher's. CONFIG is the student's, with its teacher; a plain student's weights also do.
"""

import argparse
import os
from typing import List, Optional

from detectron2.config import get_cfg

from crosskd_ifc.analysis.pictures import inspect_pair
from crosskd_ifc.common.command_line import run_tool, tool_parser
from crosskd_ifc.common.config_files import load_config
from crosskd_ifc.data.class_names import fill_in_class_count


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--config-file", default="", help="the student's config")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images to draw")
    source.add_argument(
        "--dataset",
        help="draw some of its images; without it, of the first data set in DATASETS.TEST",
    )
    parser.add_argument("--num", type=int, default=4, help="how many of them")
    parser.add_argument("--seed", type=int, help="draw them by chance; without it, evenly spread")
    parser.add_argument(
        "--names", nargs="+", default=[], metavar="NAME", help="these of them: file names or stems"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    parser.add_argument(
        "--output", metavar="OUT", help="folder, or X.png; without it, OUTPUT_DIR/pictures"
    )
    parser.add_argument("--force", action="store_true", help="replace existing pictures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    args = parser.parse_args(argv)
    # argparse takes all words after --images and --names for theirs, the overrides too.
    for option in ("images", "names"):
        words = getattr(args, option)
        is_key = [word.split(".")[0] in get_cfg() and not os.path.exists(word) for word in words]
        if any(is_key):
            first = is_key.index(True)
            setattr(args, option, words[:first])
            args.opts = words[first:] + args.opts
            if not first:
                parser.error(f"--{option}: there is none before the first KEY")
    return args


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    fill_in_class_count(cfg)
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    cfg.freeze()
    out = args.output or os.path.join(cfg.OUTPUT_DIR, "pictures")
    options = dict(number=args.num, seed=args.seed, names=args.names)
    options.update(threshold=args.threshold, force=args.force)
    for file in inspect_pair(cfg, out, images=args.images, **options):
        print(f"Wrote {file}")


def invoke_main(argv: Optional[List[str]] = None) -> None:
    run_tool(lambda: main(parse(argv)), tells_more=True)  # of the data set that it generates


if __name__ == "__main__":
    invoke_main()
