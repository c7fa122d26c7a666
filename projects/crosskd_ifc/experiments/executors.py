"""Where runs are done: in child processes of this one, or as jobs of submitit."""

import argparse
import os
import queue
from typing import Callable, List, Sequence

import torch
import yaml

from ..config import ConfigError
from .run_training import train
from .runs import Run


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
    return max((os.cpu_count() or 1) // args.jobs, 1) if args.threads is None else args.threads


class TrainOnOwnGpus:
    """:func:`.run_training.train`; the runs that go on at once are spread over the GPUs."""

    def __init__(self, slots: Sequence[str]):
        """
        Args:
            slots: CUDA_VISIBLE_DEVICES of each run that may go on at once.
        """
        self._free: "queue.Queue[str]" = queue.Queue()
        for slot in slots:
            self._free.put(slot)

    def __call__(self, run: Run, train_net: str, **options) -> dict:
        slot = self._free.get()
        try:
            environment = {"CUDA_VISIBLE_DEVICES": slot}
            return train(run, train_net, environment=environment, **options)
        finally:
            self._free.put(slot)


def gpu_slots(jobs: int, num_gpus: int) -> List[str]:
    """CUDA_VISIBLE_DEVICES for each of so many runs at once, which have the GPUs of this machine in
    turn; [] where there is nothing to share out."""
    count = torch.cuda.device_count()
    if jobs < 2 or count < 2 or not 1 <= num_gpus <= count:
        return []
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    devices = names.split(",")[:count]
    groups = [devices[i : i + num_gpus] for i in range(0, count - num_gpus + 1, num_gpus)]
    return [",".join(groups[i % len(groups)]) for i in range(jobs)]


def train_by(args: argparse.Namespace, folder: str) -> Callable[..., dict]:
    """What trains a run, with the arguments of :func:`.run_training.train`.

    Args:
        args: of a parser with these options.
        folder: of the runs.

    Raises:
        ConfigError: for options that can't work.
    """
    if args.executor is None:
        if args.num_machines > 1 or args.cluster:
            raise ConfigError("--num-machines and --cluster need --executor slurm or local")
        own = args.device in (None, "cuda")  # else it names one of them, or none
        slots = gpu_slots(args.jobs, args.num_gpus) if own else []
        return TrainOnOwnGpus(slots) if slots else train
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
