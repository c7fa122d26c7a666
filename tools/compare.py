#!/usr/bin/env python
"""Compare arms over seeds as a protocol says: teacher, students, one recipe, one report.

Every run is an ordinary tools/train_net.py run. Finished runs are skipped, interrupted ones
resumed: just run it again. After each run results.json is up to date; the report (report.md, and
figures) lies beside it.

    python tools/compare.py benchmarks/protocols/shapes_faster_rcnn.yaml --jobs 2
    python tools/compare.py benchmarks/protocols/shapes_faster_rcnn.yaml --report-only
"""

import os
import sys

import torch

from crosskd_ifc.common.command_line import recorded_command, run_tool, tool_parser
from crosskd_ifc.common.paths import CHECKOUT, TOOLS
from crosskd_ifc.experiments.comparison import Comparison, all_runs, select
from crosskd_ifc.experiments.executors import add_executor_options, threads_of, train_by
from crosskd_ifc.experiments.protocol import load_protocol
from crosskd_ifc.experiments.report import write_report
from crosskd_ifc.experiments.results import Results


def build_parser():
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("protocol", help="YAML file, see docs/comparisons.md")
    several = dict(nargs="+", action="extend")
    parser.add_argument("--seeds", type=int, help="only these of the protocol's", **several)
    parser.add_argument("--arms", help="only these, and the teachers that they need", **several)
    add_executor_options(parser)
    parser.add_argument("--runs", help="folder for runs; default: output/compare/NAME")
    parser.add_argument("--output", help="folder for the report; default: benchmarks/NAME")
    parser.add_argument("--include", default=[], help="results.json of other machines", **several)
    parser.add_argument("--discard-weights", action="store_true", help="of finished students")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    return parser


PARSER = build_parser()


def parse_args(argv=None):
    args = PARSER.parse_args(argv)
    if args.jobs < 1:
        PARSER.error("--jobs must be at least 1")
    if args.report_only and (args.seeds or args.arms):
        PARSER.error("--report-only reports all runs; leave out --seeds and --arms")
    return args


def reproduction(args):
    """The command that does all runs again in the same way."""
    file = os.path.relpath(args.protocol, CHECKOUT)
    protocol = args.protocol if file.startswith("..") else file
    words = [protocol]
    names = ("jobs", "threads", "device", "num_gpus", "num_machines", "executor", "cluster")
    for name in (*names, "runs", "output"):
        value = getattr(args, name)
        if value not in (None, PARSER.get_default(name)):
            several = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, several)]
    return recorded_command("compare", *words)


def main(args):
    protocol = load_protocol(args.protocol)
    device = args.device or ("cuda" if torch.cuda.is_available() else "")
    folder = args.runs or os.path.join("output", "compare", protocol.name)
    output = args.output or os.path.join(CHECKOUT, "benchmarks", protocol.name)
    runs = all_runs(protocol, folder, device=device)
    path = os.path.join(output, "results.json")
    results = Results(protocol, path, runs, command=reproduction(args))

    for other in args.include:
        print(f"{other}: {results.include(other)} runs that weren't in {results.path}")

    failed = {}
    if not args.report_only:
        comparison = Comparison(
            runs,
            results,
            os.path.join(TOOLS, "train_net.py"),
            jobs=args.jobs,
            threads=threads_of(args),
            train=train_by(args, folder),
            arguments=("--num-gpus", str(args.num_gpus)) if args.num_gpus > 1 else (),
            discard_weights=args.discard_weights,
        )
        failed = comparison.do(select(protocol, runs, arms=args.arms, seeds=args.seeds))
    results.add({})  # titles and groups may have changed, other processes have written to it
    if results.entries:
        print(f"Report: {write_report(results.content(), output)}")
    else:
        print(f"No report: there are no runs in {path} yet")
    return list(failed.values())


def invoke_main():
    errors = run_tool(lambda: main(parse_args()), resumes=True)
    if errors:
        sys.exit(f"\n{len(errors)} runs failed:\n" + "\n".join(e.split("\n")[0] for e in errors))


if __name__ == "__main__":
    invoke_main()
