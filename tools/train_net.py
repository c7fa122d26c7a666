#!/usr/bin/env python
"""Train or evaluate a teacher, a plain student or a distilled student from one config file.

Takes detectron2's own arguments:

    python tools/train_net.py --config-file CONFIG [--num-gpus 8] [KEY VALUE ...]
    python tools/train_net.py --config-file CONFIG --resume
    python tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS model_final.pth
"""

import logging
import os
import sys

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from crosskd_ifc import ConfigError, CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.config_files import find_config, merge_from_file, merge_from_list
from crosskd_ifc.run_checks import check_evaluation_config, check_training_config, check_weights


def setup(args):
    """The frozen, checked config of a run, from the config file and the command line."""
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    if args.config_file:
        args.config_file, _ = find_config(args.config_file, key="--config-file")
        merge_from_file(cfg, args.config_file, key="--config-file")
    merge_from_list(cfg, args.opts, key="command line")
    cfg.freeze()
    (check_evaluation_config if args.eval_only else check_training_config)(cfg)
    if not args.resume:
        check_weights(cfg)
    return cfg


def main(args):
    cfg = setup(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="crosskd_ifc")
    if args.eval_only:
        model = build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
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


def invoke_main() -> None:
    args = default_argument_parser().parse_args()
    try:
        setup(args)  # here too, so that a mistake shows once and not in every process
        machines = dict(num_machines=args.num_machines, machine_rank=args.machine_rank)
        launch(main, args.num_gpus, dist_url=args.dist_url, args=(args,), **machines)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except ProcessRaisedException as error:
        _, found, message = str(error).rpartition("crosskd_ifc.config.ConfigError: ")
        sys.exit(f"error: {message.strip()}" if found else str(error))


if __name__ == "__main__":
    invoke_main()
