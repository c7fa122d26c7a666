#!/usr/bin/env python
"""Search settings of an arm on validation images, by Optuna (pip install -e '.[tune]').

The arm, its seeds and its data are those of a protocol, see tools/compare.py; the first trial is
the arm as it stands. A trial that falls behind at an evaluation (TEST.EVAL_PERIOD) is pruned. The
folder of the search holds a protocol with an arm for each trial, and its results.json and report;
the protocol's own teachers serve. Interrupted searches go on: just run it again.

    python tools/tune.py benchmarks/protocols/shapes_faster_rcnn.yaml crosskd_ifc --seeds 1 \\
        --budget 20 --log MODEL.CROSSKD.LOSS.CLS_WEIGHT 0.05 5 \\
        --choice MODEL.CROSSKD.MIMIC cross_head both
"""

import os
import shlex
import signal
import sys

import torch

from crosskd_ifc.common.command_line import recorded_command, run_tool, tool_parser
from crosskd_ifc.common.paths import TOOLS
from crosskd_ifc.experiments.child_process import RunFailed
from crosskd_ifc.experiments.executors import add_executor_options, threads_of, train_by
from crosskd_ifc.experiments.protocol import load_protocol
from crosskd_ifc.training.output_folder import training_alone_in

try:
    from optuna.distributions import CategoricalDistribution

    from crosskd_ifc.experiments.trial_runs import TrialRuns
    from crosskd_ifc.experiments.tuning import number_range, open_study, search
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install it with: pip install 'crosskd-ifc[tune]'")


def parse_args(argv=None):
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("protocol", help="YAML file, see docs/comparisons.md")
    parser.add_argument("arm", help="one of its arms")
    several = dict(nargs=3, action="append", default=[], metavar=("KEY", "LOW", "HIGH"))
    parser.add_argument("--log", help="numbers, each ratio as likely as another", **several)
    parser.add_argument("--range", help="numbers, each as likely as another", **several)
    parser.add_argument(
        "--choice", nargs="+", action="append", default=[], metavar="KEY VALUE", help="any values"
    )
    parser.add_argument("--budget", type=int, required=True, help="runs, pruned ones too")
    parser.add_argument(
        "--seeds", type=int, nargs="+", action="extend", help="of each trial; default: the first"
    )
    add_executor_options(parser)
    parser.add_argument("--runs", help="folder for runs; default: output/compare/NAME")
    parser.add_argument("--output", help="folder of the search; default: output/tune/NAME_ARM")
    parser.add_argument("--sampler-seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.command = sys.argv[1:] if argv is None else argv
    keys = [words[0] for words in (*args.log, *args.range, *args.choice)]
    if not keys or len(set(keys)) < len(keys) or any(len(words) < 3 for words in args.choice):
        parser.error("give --log, --range or --choice, each with its KEY and two values or more")
    if args.jobs < 1 or args.budget < len(args.seeds or [0]):
        parser.error("--jobs must be at least 1, and --budget at least the number of --seeds")
    return args


def space_of(args):
    """What is searched: key -> its possible values."""
    space = {words[0]: number_range(*words, log=True) for words in args.log}
    space.update({words[0]: number_range(*words, log=False) for words in args.range})
    space.update({key: CategoricalDistribution(values) for key, *values in args.choice})
    return space


def main(args):
    protocol = load_protocol(args.protocol)
    folder = args.output or os.path.join("output", "tune", f"{protocol.name}_{args.arm}")
    os.makedirs(folder, exist_ok=True)
    with training_alone_in(folder, key="--output", what="search"):
        search_in(folder, protocol, args)


def state_of(run):
    """What a run's score depends on: settings, data and the files that it starts from."""
    return " ".join(filter(None, (run.digest(), *run.all_inputs().values())))


def search_in(folder, protocol, args):
    space, seeds = space_of(args), args.seeds or [*protocol.seeds[:1]]
    runs_folder = args.runs or os.path.join("output", "compare", protocol.name)
    arm = protocol.arms.get(args.arm)
    known = arm is not None and set(seeds) <= set(arm.seeds)  # else TrialRuns says so
    study = open_study(
        os.path.join(folder, "study.journal"),
        space,
        runs={str(s): state_of(protocol.run(args.arm, s, "")) for s in seeds if known},
        seed=args.sampler_seed,
        jobs=args.jobs,
    )
    runs = TrialRuns(
        study,
        protocol,
        args.arm,
        folder,
        os.path.join(TOOLS, "train_net.py"),
        runs=runs_folder,
        seeds=seeds,
        device=args.device or ("cuda" if torch.cuda.is_available() else ""),
        command=recorded_command("tune", *args.command),
        jobs=args.jobs,
        threads=threads_of(args),
        train=train_by(args, runs_folder),
        arguments=("--num-gpus", str(args.num_gpus)) if args.num_gpus > 1 else (),
    )

    def interrupt(*_):
        runs.stop.set()  # for trials in other threads
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    start = runs.start(space)
    if start is None:
        print(f"What {args.arm} has itself lies outside of the search and isn't tried")
    runs.prepare()
    best = search(study, space, runs, trials=args.budget // len(seeds), start=start, jobs=args.jobs)
    name, opts = runs.arm_of(best)
    print(f"Report: {runs.report()}")
    print(f"Best on {protocol.validation}: AP {best.value:.2f}, {name}: {shlex.join(opts)}")


def invoke_main():
    try:
        run_tool(lambda: main(parse_args()), resumes=True)
    except RunFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    invoke_main()
