#!/usr/bin/env python
"""Train or evaluate a teacher, a plain student or a distilled student from one config file.

Takes detectron2's own arguments:

    python tools/train_net.py --config-file CONFIG [--num-gpus 8] [KEY VALUE ...]
    python tools/train_net.py --config-file CONFIG --resume
    python tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS model_final.pth

SIGTERM (preemption) ends a training after its step with a checkpoint and the exit status 143; start
it again with --resume.
"""

import datetime
import errno
import logging
import os
import sys

from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from crosskd_ifc import ConfigError, CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.common.command_line import HelpFormatter
from crosskd_ifc.common.config_files import find_config, merge_from_file, merge_from_list
from crosskd_ifc.common.user_code import import_user_code
from crosskd_ifc.data.mapper import SampleError
from crosskd_ifc.training.checkpointer import CheckpointError, SafeCheckpointer, has_checkpoint
from crosskd_ifc.training.launching import PassOnSigterm
from crosskd_ifc.training.preemption import Terminated, end_with_parent, message_in_traceback
from crosskd_ifc.training.preflight import (
    check_evaluation_config,
    check_training_config,
    check_weights,
)
from crosskd_ifc.training.preflight_data import check_classes, check_test_data
from crosskd_ifc.weights.reading import WeightsError


def setup(args):
    """The frozen, checked config of a run, from the config file and the command line."""
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    if args.config_file:
        args.config_file, _ = find_config(args.config_file, key="--config-file")
        merge_from_file(cfg, args.config_file, key="--config-file")
    merge_from_list(cfg, args.opts, key="command line")
    import_user_code(cfg)
    cfg.freeze()
    (check_evaluation_config if args.eval_only else check_training_config)(cfg)
    if not (args.resume and has_checkpoint(cfg.OUTPUT_DIR)):
        check_weights(cfg)
    return cfg


def main(args):
    end_with_parent()
    cfg = setup(args)
    logging.raiseExceptions = False  # a full disk is told once, not for each line of the log
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="crosskd_ifc")
    if args.eval_only:
        check_test_data(cfg)
        check_classes(cfg, evaluation=True)
        model = build_model(cfg)
        SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = CrossKDTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = CrossKDTrainer(cfg)
    if not args.resume and trainer.checkpointer.has_checkpoint():
        logging.getLogger("crosskd_ifc").warning(
            f"OUTPUT_DIR {os.path.abspath(cfg.OUTPUT_DIR)} holds checkpoints of an earlier run, "
            "which this run will overwrite; stop it now and add --resume to go on with that one"
        )
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def argument_parser():
    parser = default_argument_parser()
    parser.formatter_class = HelpFormatter
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        metavar="MINUTES",
        help="how long processes wait for one another before they end with an error",
    )
    return parser


def launch_all(args) -> None:
    machines = dict(num_machines=args.num_machines, machine_rank=args.machine_rank)
    timeout = datetime.timedelta(minutes=args.timeout)
    options = dict(dist_url=args.dist_url, args=(args,), timeout=timeout, **machines)
    if args.num_gpus * args.num_machines == 1:
        setup(args)
        launch(main, args.num_gpus, **options)
        return
    with PassOnSigterm() as sigterm:
        setup(args)  # here too, so that a mistake shows once and not in every process
        sigterm.launching()
        launch(main, args.num_gpus, **options)


def invoke_main() -> None:
    args = argument_parser().parse_args()
    try:
        launch_all(args)
    except (ConfigError, CheckpointError, WeightsError) as error:
        sys.exit(f"error: {error}")
    except SampleError as error:
        sys.exit(f"error: {message_in_traceback(str(error), SampleError) or error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: {_full(error)}")
    except ProcessExitedException as error:
        if error.exit_code != Terminated.status:
            raise
        sys.exit(error.exit_code)
    except ProcessRaisedException as error:
        message = message_in_traceback(
            str(error), ConfigError, CheckpointError, WeightsError, SampleError
        )
        if not message and f"[Errno {errno.ENOSPC}]" in str(error).strip().splitlines()[-1]:
            message = _full(str(error).strip().splitlines()[-1])
        sys.exit(f"error: {message}" if message else str(error))


def _full(error) -> str:
    return f"a disk is full ({error}); make room, and go on from the last checkpoint with --resume"


if __name__ == "__main__":
    invoke_main()
