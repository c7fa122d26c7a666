"""A LazyConfig as the config of a run: what its keys are in a yacs config, by which the package
checks and trains, and back in its errors."""

import contextlib
import re
from typing import Iterator, Optional

from detectron2 import model_zoo
from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from ..common.config_files import LAZY_CONFIG, merge_from_list
from ..common.lazy_detectors import (
    config_of_node,
    dataset_names,
    input_format_of,
    merge_settings,
    select,
    unknown_input_format,
)
from ..config import ConfigError, distillation_requested
from .checkpointer import CheckpointError
from .errors import SetupError

NODE = "crosskd"  # holds the settings of MODEL.CROSSKD
_NEEDED = ("dataloader.train", "lr_multiplier", "optimizer")
# yacs key: path in a LazyConfig.
_VALUES = {
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "SEED": "train.seed",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "TEST.EVAL_PERIOD": "train.eval_period",
}
_NAMES = {
    **_VALUES,
    "MODEL.META_ARCHITECTURE": "model._target_",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.FCOS.NUM_CLASSES": "model.num_classes",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "MODEL.CROSSKD": NODE,
    LAZY_CONFIG: "--config-file",
}
_NAME = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, _NAMES)) + r")(?!\w)")


@contextlib.contextmanager
def naming_lazy_paths() -> Iterator[None]:
    """Within this context, errors name the paths of a LazyConfig instead of yacs keys."""
    try:
        yield
    except (CheckpointError, ConfigError, SetupError) as error:
        text = str(error).replace("add MODEL.DEVICE cpu", "add train.device=cpu")
        raise type(error)(_NAME.sub(lambda found: _NAMES[found[0]], text)) from error


def run_config(config: DictConfig, path: str) -> CfgNode:
    """The yacs config of a run of ``tools/lazyconfig_train_net.py``, frozen.

    It holds what can be known of the model, the data and the solver without building them, and
    MODEL.CROSSKD as ``crosskd`` says. What ``train`` lacks is as in detectron2's
    ``common/train.py``; that is added to ``config``.

    Args:
        config: defines ``model``, ``dataloader.train``, ``optimizer`` and ``lr_multiplier``.
        path: its file.

    Raises:
        ConfigError: if something is missing, or a value is of another type.
    """
    for name in _NEEDED:
        if not isinstance(select(config, name), DictConfig):
            raise ConfigError(f"--config-file {path}: this LazyConfig file defines no `{name}`")
    defaults = model_zoo.get_config("common/train.py").train
    config.train = OmegaConf.merge(defaults, config.get("train") or {})
    cfg = config_of_node(config)
    cfg[LAZY_CONFIG] = path
    opts = [(key, select(config, name)) for key, name in _VALUES.items()]
    known = [x for key, value in opts if value is not None for x in (key, value)]
    merge_from_list(cfg, known, key=path)
    cfg.DATASETS.TEST = tuple(dataset_names(config, "test"))
    merge_settings(cfg, config.get(NODE) or {})
    order = _input_format(config, path, needed=distillation_requested(cfg))
    cfg.INPUT.FORMAT = order or cfg.INPUT.FORMAT
    cfg.freeze()
    return cfg


def _input_format(config: DictConfig, path: str, *, needed: bool) -> Optional[str]:
    """The channel order of the model's images; where nothing else tells, that of its test data;
    None if nothing does.

    Raises:
        ConfigError: if the test data have another, or only they tell and it is ``needed``.
    """
    own = select(config, "model.input_format")
    read = input_format_of(own, config, what=path)
    tested = select(config, "dataloader.test.mapper.image_format")
    if read is None and needed:
        raise unknown_input_format(path)
    if read and tested and read != tested:
        key = "model.input_format" if own else "dataloader.train.mapper.image_format"
        raise ConfigError(
            f"{path}: dataloader.test.mapper.image_format is {tested!r}, but {key} is {read!r}; "
            "make them equal"
        )
    return read or tested
