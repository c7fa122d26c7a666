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

import functools

import crosskd_ifc  # noqa: F401  before detectron2, whose warnings about itself it ignores

# isort: split
from detectron2.config import CfgNode, get_cfg
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm

from crosskd_ifc import ConfigError, CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.common.config_files import find_config, merge_from_file, merge_from_list
from crosskd_ifc.common.user_code import import_user_code
from crosskd_ifc.data.cards import locate_cards
from crosskd_ifc.data.class_names import fill_in_class_count
from crosskd_ifc.training.launching import invoke
from crosskd_ifc.training.running import check_run, evaluate, train


def setup(args) -> CfgNode:
    """The frozen, checked config of a run, from the config file and the command line."""
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    if args.config_file:
        args.config_file, _ = find_config(args.config_file, key="--config-file")
        merge_from_file(cfg, args.config_file, key="--config-file")
    merge_from_list(cfg, args.opts, key="command line")
    import_user_code(cfg)
    locate_cards(cfg)
    fill_in_class_count(cfg)
    cfg.freeze()
    check_run(cfg, args)
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: there is nothing to evaluate on")
    return cfg


def main(args):
    cfg = setup(args)
    if not args.eval_only:
        return train(cfg, args, cfg, lambda: CrossKDTrainer(cfg))
    test = functools.partial(CrossKDTrainer.test, cfg)
    results = evaluate(cfg, args, cfg, lambda: build_model(cfg), test)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def invoke_main() -> None:
    invoke(main, setup)


if __name__ == "__main__":
    invoke_main()
