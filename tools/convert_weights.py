#!/usr/bin/env python
"""Converts torchvision's ResNet-18, 34, 50 or 101 to a backbone for detectron2.

    python tools/convert_weights.py resnet18-f37072fd.pth R-18.pth

Takes seconds; IN may be a URL. Prints the config keys that the weights need: RGB images, divided
by a std. Nothing is overwritten without --force.
"""

import os
import sys
from typing import List, Optional

from crosskd_ifc.common.command_line import tool_parser
from crosskd_ifc.weights.convert import convert_file


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("IN", help="a state dict or checkpoint, a file or URL")
    parser.add_argument("OUT", help="the .pth file to write")
    parser.add_argument("--force", action="store_true", help="replace what exists")
    args = parser.parse_args(argv)
    try:
        done = convert_file(args.IN, args.OUT, force=args.force)
    except (OSError, ValueError) as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 1
    print(f"Found a {done.found} in {args.IN}")
    left_out = f"left out {len(done.dropped)} (classifier, batch counters)"
    print(f"Wrote {os.path.abspath(args.OUT)}: {done.written} tensors; {left_out}")
    print("The model needs these keys in its config:\n")
    print(done.config.dump(default_flow_style=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
