#!/usr/bin/env python
"""Train or evaluate a teacher, a plain student or a distilled student from one config file.

Takes detectron2's own arguments:

    python tools/train_net.py --config-file CONFIG [--num-gpus 8] [KEY VALUE ...]
    torchrun --nproc-per-node 8 tools/train_net.py --config-file CONFIG
    python tools/train_net.py --config-file CONFIG --resume
    python tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS model_final.pth

SIGTERM (preemption) ends a training after its step with a checkpoint and the exit status 143; start
it again with --resume.
"""

import contextlib
import datetime
import errno
import logging
import os
import sys

import crosskd_ifc  # noqa: F401  before detectron2, whose warnings about itself it ignores

# isort: split
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from crosskd_ifc import ConfigError, CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.common.command_line import HelpFormatter
from crosskd_ifc.common.config_files import find_config, merge_from_file, merge_from_list
from crosskd_ifc.common.user_code import import_user_code
from crosskd_ifc.data.cards import fill_in_class_count
from crosskd_ifc.modeling.building import explained
from crosskd_ifc.training.checkpointer import SafeCheckpointer, has_checkpoint
from crosskd_ifc.training.errors import CLEAR_ERRORS, message_in_traceback, one_line_errors
from crosskd_ifc.training.output_folder import check_output_folder, training_alone_in
from crosskd_ifc.training.preemption import passing_on_sigterm
from crosskd_ifc.training.preflight import (
    check_evaluation_config,
    check_training_config,
    check_weights,
)
from crosskd_ifc.training.preflight_data import check_classes, check_test_data
from crosskd_ifc.training.torchrun import is_one_of_torchruns, run_in_torchrun
from crosskd_ifc.weights.reading import MisfitError, StrictReader

logger = logging.getLogger("crosskd_ifc")


def setup(args) -> CfgNode:
    """The frozen, checked config of a run, from the config file and the command line."""
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    if args.config_file:
        args.config_file, _ = find_config(args.config_file, key="--config-file")
        merge_from_file(cfg, args.config_file, key="--config-file")
    merge_from_list(cfg, args.opts, key="command line")
    import_user_code(cfg)
    fill_in_class_count(cfg)
    cfg.freeze()
    with one_line_errors(cfg):
        check_output_folder(cfg.OUTPUT_DIR)
        (check_evaluation_config if args.eval_only else check_training_config)(cfg)
        if args.eval_only and not cfg.DATASETS.TEST:
            raise ConfigError("DATASETS.TEST is empty: there is nothing to evaluate on")
        goes_on = has_checkpoint(cfg.OUTPUT_DIR)
        if goes_on and not (args.resume or args.eval_only):
            raise ConfigError(
                f"OUTPUT_DIR {os.path.abspath(cfg.OUTPUT_DIR)} holds checkpoints of an earlier "
                "run; add --resume to go on with it, or give another OUTPUT_DIR"
            )
        if not (args.resume and goes_on):
            check_weights(cfg)
    return cfg


def start_logging(cfg, args) -> None:
    """As detectron2's default_setup, but for config.yaml: that is of a training that is on."""
    logging.raiseExceptions = False  # a full disk is told once, not for each line of the log
    rank, nowhere = comm.get_rank(), cfg.clone()
    for name in ("fvcore", "detectron2", "crosskd_ifc"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name, configure_stdout=False)
    setup_logger(distributed_rank=rank, name="crosskd_ifc")
    nowhere.defrost()
    nowhere.OUTPUT_DIR = None
    default_setup(nowhere, args)
    logger.info(f"Running with full config:\n{cfg.dump()}")


def main(args):
    cfg = setup(args)
    return evaluate(cfg, args) if args.eval_only else train(cfg, args)


def evaluate(cfg, args):
    with one_line_errors(cfg):
        start_logging(cfg, args)
        check_test_data(cfg)
        check_classes(cfg, evaluation=True)
        with explained(cfg):
            model = build_model(cfg)
        checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
        if args.resume and checkpointer.all_have_checkpoint():
            checkpointer.resume_or_load("")
        elif not cfg.MODEL.WEIGHTS:
            raise ConfigError("MODEL.WEIGHTS is empty: --eval-only would score random weights")
        else:
            try:
                StrictReader(model).load(cfg.MODEL.WEIGHTS)
            except MisfitError as error:
                raise ConfigError(
                    f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r} don't fit this config's model; {error}"
                ) from error
    results = CrossKDTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(cfg, args):
    trainer = None

    def is_over() -> bool:  # the first step is done (one that has failed sets the iteration back)
        if trainer is None or trainer.checkpointer.saved_iteration is not None:
            return trainer is not None
        return getattr(trainer, "iter", 0) > trainer.start_iter

    with one_line_errors(cfg, is_over), training_alone_in(cfg.OUTPUT_DIR):
        start_logging(cfg, args)
        trainer = CrossKDTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        if comm.is_main_process():
            with PathManager.open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as f:
                f.write(cfg.dump())
        return trainer.train()


def argument_parser():
    parser = default_argument_parser()
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


def launch_all(args) -> None:
    if is_one_of_torchruns():
        if args.num_gpus * args.num_machines > 1:
            raise ConfigError("--num-gpus and --num-machines: torchrun says it; leave them out")
        run_in_torchrun(main, args, timeout=datetime.timedelta(minutes=args.timeout))
        return
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--num-machines: give --dist-url, tcp://HOST:PORT of the first machine")
    machines = dict(num_machines=args.num_machines, machine_rank=args.machine_rank)
    timeout = datetime.timedelta(minutes=args.timeout)
    alone = args.num_gpus * args.num_machines <= 1
    with contextlib.nullcontext() if alone else passing_on_sigterm():
        setup(args)  # here too, so that a mistake shows once and not in every process
        launch(
            main,
            args.num_gpus,
            dist_url=args.dist_url,
            args=(args,),
            timeout=timeout,
            **machines,
        )


def invoke_main() -> None:
    args = argument_parser().parse_args()
    try:
        launch_all(args)
    except CLEAR_ERRORS as error:
        # A data loader's worker sends its traceback along.
        sys.exit(f"error: {message_in_traceback(str(error), *CLEAR_ERRORS) or error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: {_full(error)}")
    except ProcessRaisedException as error:
        message = message_in_traceback(str(error), *CLEAR_ERRORS)
        if not message and f"[Errno {errno.ENOSPC}]" in str(error).strip().splitlines()[-1]:
            message = _full(str(error).strip().splitlines()[-1])
        sys.exit(f"error: {message}" if message else str(error))


def _full(error) -> str:
    return f"a disk is full ({error}); make room, and go on from the last checkpoint with --resume"


if __name__ == "__main__":
    invoke_main()
