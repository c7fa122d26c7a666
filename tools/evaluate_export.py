#!/usr/bin/env python
"""COCO AP of an exported TorchScript or ONNX file, in its own runtime on the CPU.

    python tools/evaluate_export.py student-onnx --dataset crosskd_shapes_test
    python tools/evaluate_export.py student-onnx --dataset cells_test --card cells.yaml \\
        --checkpoint output/model_final.pth

EXPORTED is a folder that export_student.py wrote. With --checkpoint detectron2 evaluates that, too,
and a difference of more than 0.1 AP is an error (exit status 1).
"""

import sys
from typing import List, Optional

from crosskd_ifc.common.command_line import tool_parser
from crosskd_ifc.data.cards import register_cards
from crosskd_ifc.weights.evaluating import compare, evaluate_checkpoint, evaluate_deployed


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("EXPORTED", help="a folder with model.json")
    parser.add_argument("--dataset", required=True, help="name of a registered data set")
    parser.add_argument("--card", nargs="+", default=[], help="dataset cards to register")
    parser.add_argument("--checkpoint", default="", help="compare with this checkpoint's AP")
    parser.add_argument("--config-file", default="", help="the config it was trained with")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, metavar="AP", help="the most that may differ"
    )
    args = parser.parse_args(argv)
    try:
        register_cards(args.card)
        found = evaluate_deployed(args.EXPORTED, args.dataset)
        _print(args.EXPORTED, found)
        if not args.checkpoint:
            return 0
        wanted = evaluate_checkpoint(args.checkpoint, args.dataset, args.config_file)
        _print(args.checkpoint, wanted)
    except (ImportError, OSError, ValueError) as error:
        print(f"evaluate_export: {error}", file=sys.stderr)
        return 1
    problems = compare(found, wanted, args.tolerance)
    for problem in problems:
        print(f"evaluate_export: {args.EXPORTED} has {problem}", file=sys.stderr)
    return bool(problems)


def _print(name: str, results: dict) -> None:
    aps = (f"{task} AP {x['AP']:.2f}, AP50 {x['AP50']:.2f}" for task, x in results.items())
    print(f"{name}: {'; '.join(aps)}")


if __name__ == "__main__":
    sys.exit(main())
