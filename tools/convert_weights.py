#!/usr/bin/env python
"""Makes a detectron2 backbone file of torchvision's ResNet-18, 34, 50 or 101.

    # a model that takes torchvision's input: RGB, divided by a std
    python tools/convert_weights.py resnet18-f37072fd.pth R-18.pth
    # a model that takes the model zoo's input: BGR, std 1
    python tools/convert_weights.py resnet18-f37072fd.pth R-18.pth --fold-input

Takes seconds and prints the config keys that the model needs. IN may be a URL. Nothing is
overwritten without --force.
"""

import argparse
import os
import sys
from typing import List, Optional

from crosskd_ifc.convert import convert_file


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("IN", help="torchvision's state dict, a file or URL")
    parser.add_argument("OUT", help="the .pth file to write")
    parser.add_argument(
        "--fold-input",
        action="store_true",
        help="fold channel order and std into the stem: the model takes BGR and PIXEL_STD 1",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    try:
        done = convert_file(args.IN, args.OUT, fold_input=args.fold_input, force=args.force)
    except (OSError, ValueError) as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 1
    print(f"Found a torchvision ResNet-{done.depth} in {args.IN}")
    left_out = f"left out {len(done.dropped)} (classifier, batch counters)"
    print(f"Wrote {os.path.abspath(args.OUT)}: {done.written} tensors; {left_out}")
    print("The model needs these keys in its config:\n")
    print(done.config.dump(default_flow_style=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
