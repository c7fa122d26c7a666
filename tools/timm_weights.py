#!/usr/bin/env python
"""Writes the ImageNet weights of a timm network for MODEL.WEIGHTS of a detector with
build_timm_fpn_backbone.

    python tools/timm_weights.py mobilenetv3_large_100 mobilenetv3.pth               # downloads
    python tools/timm_weights.py mobilenetv3_large_100 mobilenetv3.pth --file FILE   # from a file

Prints the keys that the config needs, so that the network sees what it was trained on.
"""

import os
import sys
from typing import List, Optional

import torch

from crosskd_ifc.common.command_line import tool_parser
from crosskd_ifc.common.files import refuse_overwriting, replacing
from crosskd_ifc.modeling.timm_backbones import timm_input, timm_weights
from crosskd_ifc.weights.reading import load_weights


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("NAME", help="of a timm model")
    parser.add_argument("OUT", help="the .pth file to write")
    parser.add_argument("--file", help="the weights of timm's classifier; else timm downloads them")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args(argv)
    try:
        if not args.OUT.endswith(".pth"):
            raise ValueError(f"OUT is {args.OUT!r}; its name must end in .pth")
        refuse_overwriting(args.OUT, sources=[args.file or ""], force=args.force)
        state = load_weights(args.file) if args.file else None
        if state is not None:
            state = state.get("model", state.get("state_dict", state))
        weights = timm_weights(args.NAME, state)
        os.makedirs(os.path.dirname(os.path.abspath(args.OUT)), exist_ok=True)
        with replacing(args.OUT) as f:
            torch.save({"model": weights, "__author__": f"timm: {args.NAME}"}, f)
    except (OSError, ValueError) as error:
        print(f"timm_weights: {error}", file=sys.stderr)
        return 1
    config = timm_input(args.NAME)
    config.MODEL.WEIGHTS = os.path.abspath(args.OUT)
    config.MODEL.TIMM = type(config)({"NAME": args.NAME})
    print(f"Wrote {os.path.abspath(args.OUT)}: {len(weights)} tensors")
    print("The model needs these keys in its config:\n")
    print(config.dump(default_flow_style=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
