"""What the training tools share around their runs: arguments, processes, errors in one line."""

import argparse
import atexit
import datetime
import os
import sys
import threading
from typing import Any, Callable, NoReturn

from detectron2.engine import default_argument_parser, launch
from torch.multiprocessing import ProcessRaisedException

from ..common.command_line import HelpFormatter, as_started
from ..common.files import DISK_FULL
from ..config import ConfigError
from .errors import CLEAR_ERRORS, message_in_traceback
from .preemption import passing_on_sigterm
from .torchrun import is_one_of_torchruns, run_in_torchrun


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """detectron2's arguments, and --timeout.

    Args:
        description: of the tool, in place of detectron2's examples, which are of YAML configs.
    """
    parser = default_argument_parser()
    parser.description, parser.epilog = as_started(description), None
    parser.formatter_class = HelpFormatter
    # detectron2's port is the same for all runs of a user, so that two could not run at once.
    parser.set_defaults(dist_url="auto")
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        metavar="MINUTES",
        help="how long processes wait for one another before they end with an error",
    )
    return parser


def invoke(main: Callable, setup: Callable) -> None:
    """Run a training tool's command line; what goes wrong ends it with one line where it can.

    Args:
        main: arguments -> what the tool does in each process.
        setup: arguments -> anything; raises what ``main`` would refuse. Called once before
            processes are started, so that a mistake shows once.
    """
    args = argument_parser(main.__globals__["__doc__"] or "").parse_args()
    try:
        _launch(main, setup, args)
    except CLEAR_ERRORS as error:
        # A data loader's worker sends its traceback along.
        sys.exit(f"error: {message_in_traceback(str(error), *CLEAR_ERRORS) or error}")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        sys.exit(f"error: {_full(error)}")
    except ProcessRaisedException as error:
        message = message_in_traceback(str(error), *CLEAR_ERRORS)
        last = str(error).strip().splitlines()[-1]
        if not message and any(f"[Errno {number}]" in last for number in DISK_FULL):
            message = _full(last)
        sys.exit(f"error: {message}" if message else str(error))


def _launch(main: Callable, setup: Callable, args: argparse.Namespace) -> None:
    timeout = datetime.timedelta(minutes=args.timeout)
    if is_one_of_torchruns():
        if args.num_gpus * args.num_machines > 1:
            raise ConfigError("--num-gpus and --num-machines: torchrun says it; leave them out")
        run_and_end(run_in_torchrun, main, args, timeout=timeout)
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--num-machines: give --dist-url, tcp://HOST:PORT of the first machine")
    machines = dict(num_machines=args.num_machines, machine_rank=args.machine_rank)
    options = dict(machines, dist_url=args.dist_url, timeout=timeout)
    if args.num_gpus * args.num_machines <= 1:
        setup(args)
        launch(main, args.num_gpus, args=(args,), **options)
        return
    with passing_on_sigterm():
        setup(args)
        launch(run_and_end, args.num_gpus, args=(main, args), **options)


def run_and_end(main: Callable, *args: Any, **options: Any) -> NoReturn:
    """Call a function, and end this process, one of several, without taking the interpreter apart.

    A thread of gloo that still holds the last message can't release it then and aborts the process,
    whose training would count as failed with everything saved
    (https://github.com/pytorch/pytorch/pull/179291).

    Raises:
        Exception: what the function raises; only a return and ``sys.exit(number)`` end it here.
    """
    try:
        main(*args, **options)
        status = 0
    except SystemExit as ended:
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    threading._shutdown()  # these are what Python does first, too
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _full(error: Any) -> str:
    return (
        f"a disk or a quota is full ({error}); make room, and go on from the last checkpoint with "
        "--resume"
    )
