"""Where runs are done: in child processes of this one, or as jobs of submitit."""

import argparse
import os
from typing import Callable

import yaml

from ..config import ConfigError
from .runs import train


def add_executor_options(parser: argparse.ArgumentParser) -> None:
    """Options of tools that do runs; :func:`train_by` reads them."""
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, help="of a run; default: CPU cores / jobs")
    parser.add_argument("--device", help="MODEL.DEVICE; default: a GPU if there is one")
    parser.add_argument("--num-gpus", type=int, default=1, help="for each run and machine")
    parser.add_argument("--num-machines", type=int, default=1, help="for each run of an executor")
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        help="each run is a job of submitit (the extra cluster); default: a child process",
    )
    parser.add_argument(
        "--cluster",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="for the executor: timeout_min=240 slurm_partition=gpu cpus_per_task=8 ...",
    )


def threads_of(args: argparse.Namespace) -> int:
    """Threads of each run; 0: as many as torch likes."""
    if args.threads is None and args.executor:
        return 0
    cores = (os.cpu_count() or 1) // args.jobs if args.threads is None else args.threads
    return max(cores, 1)


def train_by(args: argparse.Namespace, folder: str) -> Callable[..., dict]:
    """What trains a run, with the arguments of :func:`.runs.train`.

    Args:
        args: of a parser with these options.
        folder: of the runs.

    Raises:
        ConfigError: for options that can't work.
    """
    if args.executor is None:
        if args.num_machines > 1 or args.cluster:
            raise ConfigError("--num-machines and --cluster need --executor slurm or local")
        return train
    try:
        from .cluster import ClusterTrain
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--executor {args.executor}: {error}; pip install 'crosskd-ifc[cluster]'"
        ) from None
    parameters = {}
    for pair in args.cluster:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--cluster {pair!r}: expected KEY=VALUE")
        parameters[key] = yaml.safe_load(value)
    return ClusterTrain(
        args.executor,
        os.path.join(folder, "jobs"),
        machines=args.num_machines,
        gpus=0 if args.device == "cpu" else args.num_gpus,
        parameters=parameters,
    )
