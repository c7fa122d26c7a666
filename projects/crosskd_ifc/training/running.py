"""A run of a training tool: what is checked first, its logs, its training or evaluation."""

import argparse
import copy
import logging
import os
from typing import Any, Callable, Dict, Union

from detectron2.config import CfgNode, LazyConfig
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..common.files import replacing
from ..config import ConfigError
from ..weights.held_config import check_class_order, differing_keys
from ..weights.strict import load_strictly
from .checkpointer import SafeCheckpointer
from .errors import one_line_errors
from .output_folder import (
    check_output_folder,
    end_last_line,
    set_metrics_aside,
    training_alone_in,
)
from .preflight import check_evaluation_config, check_training_config, check_weights
from .preflight_data import check_classes, check_test_data
from .run_folder import check_tag, has_checkpoint
from .trainer import CrossKDTrainer

Config = Union[CfgNode, DictConfig]  # as the user wrote it

logger = logging.getLogger(__name__)


def check_run(
    cfg: CfgNode,
    args: argparse.Namespace,
    check_training: Callable[[CfgNode], None] = check_training_config,
) -> None:
    """Refuse a run that can't work, before anything is built.

    Args:
        cfg: of the run; frozen.
        args: of the tool.
        check_training: raises what is wrong with the config of a training.

    Raises:
        ConfigError: naming the key.
    """
    with one_line_errors(cfg):
        check_output_folder(cfg.OUTPUT_DIR)
        if cfg.TEST.AUG.ENABLED:  # which detectron2's trainer leaves to its tool
            raise ConfigError(
                "TEST.AUG.ENABLED is True, but this tool evaluates without test-time augmentation; "
                "set it to False"
            )
        (check_evaluation_config if args.eval_only else check_training)(cfg)
        if args.resume or not args.eval_only:
            check_tag(cfg.OUTPUT_DIR)
        goes_on = has_checkpoint(cfg.OUTPUT_DIR)
        if goes_on and not (args.resume or args.eval_only):
            raise ConfigError(
                f"OUTPUT_DIR {os.path.abspath(cfg.OUTPUT_DIR)} holds checkpoints of an earlier "
                "run; add --resume to go on with it, or give another OUTPUT_DIR"
            )
        if not (args.resume and goes_on):
            check_weights(cfg)


def train(
    cfg: CfgNode, args: argparse.Namespace, config: Config, build: Callable[[], CrossKDTrainer]
) -> Any:
    """Train, alone in OUTPUT_DIR.

    Args:
        cfg: of the run.
        args: of the tool.
        config: for the log and config.yaml.
        build: makes the trainer.
    """
    trainer = None

    def is_over() -> bool:  # the first step is done (one that has failed sets the iteration back)
        if trainer is None or trainer.checkpointer.saved_iteration is not None:
            return trainer is not None
        return getattr(trainer, "iter", 0) > trainer.start_iter

    with one_line_errors(cfg, is_over), training_alone_in(cfg.OUTPUT_DIR):
        start_logging(cfg, args, config)
        if comm.is_main_process():
            if not has_checkpoint(cfg.OUTPUT_DIR):
                set_metrics_aside(cfg.OUTPUT_DIR)
            end_last_line(cfg.OUTPUT_DIR)
        trainer = build()
        trainer.resume_or_load(resume=args.resume)
        if comm.is_main_process() and trainer.start_iter < trainer.max_iter:
            # The trainer's is scaled with SOLVER.REFERENCE_WORLD_SIZE.
            ran = trainer.cfg if isinstance(config, CfgNode) else config
            _save(ran, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        return trainer.train()


def evaluate(
    cfg: CfgNode,
    args: argparse.Namespace,
    config: Config,
    build_model: Callable[[], nn.Module],
    test: Callable[[nn.Module], Dict[str, Any]],
) -> Dict[str, Any]:
    """Evaluate the model with the weights that the config names or, with --resume, those of the
    last checkpoint; returns the results.

    Args:
        cfg: of the run.
        args: of the tool.
        config: for the log.
        build_model: makes the model.
        test: a model -> its results.

    Raises:
        ConfigError: if there are no weights, or they don't fit.
    """
    with one_line_errors(cfg):
        start_logging(cfg, args, config)
        check_test_data(cfg, evaluation=True)
        check_classes(cfg, evaluation=True)
        model = build_model()
        checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
        if args.resume and checkpointer.all_have_checkpoint():
            held = checkpointer.resume_or_load("")
        elif args.resume:
            raise ConfigError(
                f"--resume: OUTPUT_DIR {os.path.abspath(cfg.OUTPUT_DIR)} holds no checkpoint to "
                "evaluate; name the folder of the training, or a file in MODEL.WEIGHTS without "
                "--resume"
            )
        elif not cfg.MODEL.WEIGHTS:
            raise ConfigError("MODEL.WEIGHTS is empty: --eval-only would score random weights")
        else:
            held = load_strictly(model, cfg.MODEL.WEIGHTS)
        source = "the last checkpoint" if args.resume else f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}"
        check_class_order(held, cfg, source)
        keys = differing_keys(held, cfg, evaluation=False)
        if keys:
            logger.warning(
                f"These weights were trained with other values of {', '.join(keys)} than this "
                "config has, so the AP may be wrong"
            )
    return test(model)


def start_logging(cfg: CfgNode, args: argparse.Namespace, config: Config) -> None:
    """As detectron2's default_setup, but for config.yaml: that is of a training that is on."""
    logging.raiseExceptions = False  # a full disk is told once, not for each line of the log
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "crosskd_ifc"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name, configure_stdout=False)
    setup_logger(distributed_rank=rank, name="crosskd_ifc")
    nowhere = copy.deepcopy(config)
    if isinstance(nowhere, CfgNode):
        nowhere.defrost()
        nowhere.OUTPUT_DIR = None
    else:
        OmegaConf.update(nowhere, "train.output_dir", None)
    default_setup(nowhere, args)
    if isinstance(config, CfgNode):
        logger.info(f"Running with full config:\n{config.dump()}")


def _save(config: Config, path: str) -> None:
    if not isinstance(config, CfgNode):
        LazyConfig.save(config, path)
        return
    with PathManager.open(path, "wb") if "://" in path else replacing(path) as f:
        f.write(config.dump().encode())
