#!/usr/bin/env python
"""Writes a trained student as a model of stock detectron2, which needs no crosskd_ifc.

    python tools/export_student.py output/model_final.pth student      # makes a folder
    python tools/export_student.py output/model_final.pth student.pth  # and student.yaml

Takes seconds. IN's config is the config.yaml beside it, or --config-file. Before anything appears,
stock detectron2 has loaded it and found exactly what the student finds on random images. Nothing is
overwritten without --force.
"""

import argparse
import os
import sys
from typing import List, Optional

from crosskd_ifc.common.command_line import HelpFormatter
from crosskd_ifc.weights.export import export_student

USAGE = """\
Use it wherever detectron2 is installed:

    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    cfg = get_cfg()
    cfg.merge_from_file({config!r})
    detections = DefaultPredictor(cfg)(image)["instances"]  # image as from cv2.imread
"""


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("IN", help="a checkpoint written by tools/train_net.py")
    parser.add_argument("OUT", help="a folder to make, or the .pth file to write")
    parser.add_argument("--config-file", default="", help="the config IN was trained with")
    parser.add_argument("--force", action="store_true", help="replace what was exported before")
    parser.add_argument("--safetensors", action="store_true", help="write these weights too")
    args = parser.parse_args(argv)
    options = dict(config_file=args.config_file, force=args.force, safetensors=args.safetensors)
    try:
        done = export_student(args.IN, args.OUT, **options)
    except (OSError, ValueError) as error:
        print(f"export_student: {error}", file=sys.stderr)
        return 1
    size = os.path.getsize(done.weights) / 1e6
    print(f"Verified: {done.detections} detections on random images are exactly the student's")
    print(f"Wrote {done.weights}: {done.parameters / 1e6:.2f} M parameters, {size:.1f} MB")
    print(f"Wrote {done.config}: {' -> '.join(dict.fromkeys(done.architecture))}")
    print(f"Left out: {', '.join(done.dropped) or 'nothing'}\n")
    print(USAGE.format(config=done.config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
