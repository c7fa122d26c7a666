#!/usr/bin/env python
"""Converts weights for detectron2: a backbone of torchvision's or a whole detector of mmdet's.

    # torchvision's ResNet-18, 34, 50 or 101, for a model that takes RGB, divided by a std
    python tools/convert_weights.py resnet18-f37072fd.pth R-18.pth
    # the same for a model that takes the model zoo's input: BGR, std 1
    python tools/convert_weights.py resnet18-f37072fd.pth R-18.pth --fold-input
    # mmdet's Faster R-CNN or RetinaNet with such a ResNet and an FPN: also makes teacher.yaml
    python tools/convert_weights.py retinanet_r101_fpn.pth teacher.pth

Takes seconds. What IN holds is recognised; it may be a URL. Prints what the weights need in a
config. Nothing is overwritten without --force.
"""

import os
import sys
from typing import List, Optional

from crosskd_ifc.common.command_line import tool_parser
from crosskd_ifc.weights.convert import convert_file

TEACHER = """\
As a teacher:

    MODEL.CROSSKD.TEACHER.CONFIG_FILE {config}
    MODEL.CROSSKD.TEACHER.WEIGHTS {weights}
"""


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("IN", help="a state dict or checkpoint, a file or URL")
    parser.add_argument("OUT", help="the .pth file to write; a detector's config lies beside it")
    parser.add_argument(
        "--fold-input",
        action="store_true",
        help="fold a backbone's input into its stem: the model takes BGR and PIXEL_STD 1",
    )
    parser.add_argument("--force", action="store_true", help="replace what exists")
    args = parser.parse_args(argv)
    try:
        done = convert_file(args.IN, args.OUT, fold_input=args.fold_input, force=args.force)
    except (OSError, ValueError) as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 1
    print(f"Found a {done.found} in {args.IN}")
    left_out = f"left out {len(done.dropped)} (classifier, batch counters)"
    weights = os.path.abspath(args.OUT)
    print(f"Wrote {weights}: {done.written} tensors; {left_out}")
    if done.config_file:
        print(f"Wrote {done.config_file}")
        print(f"{done.note}.\n")
        print(TEACHER.format(config=done.config_file, weights=weights))
    else:
        print("The model needs these keys in its config:\n")
        print(done.config.dump(default_flow_style=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
