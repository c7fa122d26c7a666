#!/usr/bin/env python
"""Train or evaluate a teacher, a plain student or a distilled student from one LazyConfig file.

Takes detectron2's own arguments; overrides are in LazyConfig's syntax:

    python tools/lazyconfig_train_net.py --config-file CONFIG.py [--num-gpus 8] [path.key=value ...]
    torchrun --nproc-per-node 8 tools/lazyconfig_train_net.py --config-file CONFIG.py
    python tools/lazyconfig_train_net.py --config-file CONFIG.py --resume
    python tools/lazyconfig_train_net.py --config-file CONFIG.py --eval-only \\
        train.init_checkpoint=model_final.pth

A student is CrossKDRCNN, CrossKDRetinaNet or CrossKDFCOS, and `crosskd` holds the settings of
MODEL.CROSSKD. The file is code, and is run. SIGTERM (preemption) ends a training after its step
with a checkpoint and the exit status 143; start it again with --resume.
"""

import functools

import crosskd_ifc  # noqa: F401  before detectron2, whose warnings about itself it ignores

# isort: split
from crosskd_ifc import ConfigError
from crosskd_ifc.common.config_files import find_config
from crosskd_ifc.common.lazy_config import is_lazy, load_lazy_config
from crosskd_ifc.training.launching import invoke
from crosskd_ifc.training.lazy_config import naming_lazy_paths, run_config
from crosskd_ifc.training.lazy_trainer import LazyTrainer, build_lazy_model, test_lazy
from crosskd_ifc.training.preflight import check_training_settings
from crosskd_ifc.training.running import check_run, evaluate, train


def setup(args):
    """The LazyConfig of a run, from the config file and the command line, and what it is in yacs
    keys, checked."""
    if not is_lazy(args.config_file):
        raise ConfigError(
            f"--config-file is {args.config_file!r}; name a LazyConfig file, which ends in .py "
            "(tools/train_net.py takes YAML)"
        )
    args.config_file, _ = find_config(args.config_file, key="--config-file")
    config = load_lazy_config(args.config_file, args.opts, key="--config-file")
    with naming_lazy_paths():
        cfg = run_config(config, args.config_file)
        check_run(cfg, args, check_training_settings)
        missing = [x for x in ("test", "evaluator") if x not in config.dataloader]
        if args.eval_only and missing:
            raise ConfigError(f"dataloader.{missing[0]} is missing: there is nothing to evaluate")
    return config, cfg


def main(args):
    config, cfg = setup(args)
    with naming_lazy_paths():
        if not args.eval_only:
            return train(cfg, args, config, lambda: LazyTrainer(config, cfg))
        build = functools.partial(build_lazy_model, config, cfg)
        return evaluate(cfg, args, config, build, functools.partial(test_lazy, config))


def invoke_main() -> None:
    invoke(main, setup)


if __name__ == "__main__":
    invoke_main()
