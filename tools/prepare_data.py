#!/usr/bin/env python
"""Reads a data set and lists what is wrong with it, before a long training finds out.

    python tools/prepare_data.py check configs/datasets/bccd.yaml   # a dataset card
    python tools/prepare_data.py check voc_2007_train               # a registered data set

Every image is decoded in full, on one core. Exit status: 0 no errors
(there may be warnings), 1 errors were found, 2 the data set can't be checked.
"""

import argparse
import sys
from typing import List, Optional

import crosskd_ifc  # noqa: F401  registers the built-in data sets
from crosskd_ifc.common.command_line import HelpFormatter
from crosskd_ifc.data.check import check_dataset


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="list what is wrong with a data set")
    check.add_argument("target", help="a dataset card, or the name of a registered data set")
    args = parser.parse_args(argv)
    try:
        report = check_dataset(args.target)
    except (OSError, ValueError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.total("error") else 0


if __name__ == "__main__":
    sys.exit(main())
