"""A trained student, from its checkpoint and the config of its training."""

import logging
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from ..common.config_files import find_config, load_config, load_config_text, merge_from_list
from ..common.lazy_config import is_lazy
from ..common.user_code import refuse_user_code
from ..config import ConfigError
from ..data.class_names import fill_in_class_count
from .held_config import classes_of, differing_keys
from .lazy_student import build_lazy_student, check_is_of_run, written_config
from .reading import load_weights
from .state_dicts import ADAPTER_PREFIX, describe_mismatch, is_state_dict
from .stock import build_student, lazy_stock_config, stock_config

logger = logging.getLogger(__name__)


class LoadedStudent(NamedTuple):
    """What :func:`load_student` found: the student's config, the file that it is from, the model,
    what the checkpoint holds beside it, the names of the classes if they are known, and of a
    LazyConfig its ``model`` of stock classes."""

    cfg: CfgNode
    config_path: str
    model: nn.Module
    dropped: List[str]
    classes: Optional[Sequence[str]] = None
    node: Optional[DictConfig] = None

    def stock_config(self, weights: str) -> Union[CfgNode, DictConfig]:
        """For stock detectron2, with weights at this path."""
        if self.node is None:
            return stock_config(self.cfg, weights)
        return lazy_stock_config(self.node, self.cfg, weights)

    def mapper(self) -> DatasetMapper:
        """What reads and resizes a test image; of the training's data it needs to know nothing."""
        size = self.cfg.INPUT
        resize = T.ResizeShortestEdge(size.MIN_SIZE_TEST, size.MAX_SIZE_TEST)
        return DatasetMapper(False, augmentations=[resize], image_format=size.FORMAT)


def load_student(
    checkpoint: str, config_file: str = "", overrides: Sequence[str] = ()
) -> LoadedStudent:
    """A checkpoint's student on the CPU, in evaluation mode.

    Args:
        checkpoint, config_file, overrides: as for :func:`export_student`.

    Raises:
        ConfigError, FileNotFoundError, ValueError: as there.
    """
    content, node = load_weights(checkpoint), None
    if is_lazy(config_file):
        lazy = build_lazy_student(config_file, overrides)
        check_is_of_run(lazy, checkpoint)
        cfg, config_path, model, node = lazy.cfg, lazy.path, lazy.model, lazy.node
    elif overrides:
        raise ConfigError("--overrides are for a LazyConfig; give its .py file by --config-file")
    else:
        cfg, config_path = load_config_of(content, checkpoint, config_file)
        model = build_student(cfg)
    state, dropped = _student_state(content, model, checkpoint)
    model.load_state_dict(state)
    names = classes_of(content, cfg, checkpoint)
    return LoadedStudent(cfg, config_path, model, dropped, names, node)


def load_config_of(
    content: Any, checkpoint: str, config_file: str = "", opts: Sequence = ()
) -> Tuple[CfgNode, str]:
    """The config of a checkpoint's model, and the file that it is from.

    Args:
        content: of the checkpoint.
        config_file: of its training; empty for the one in the checkpoint or, if it holds none,
            beside it. A named one that finds something else is told in the log.
        opts: KEY, VALUE, ... on top of it.

    Raises:
        ConfigError: if the config can't be read or combined, or is a LazyConfig.
        FileNotFoundError: if there is none.
    """
    key, path = "the config beside the weights,", config_beside(checkpoint)
    held = content.get("config") if isinstance(content, Mapping) else None
    if config_file:
        key, path = "--config-file", find_config(config_file, key="--config-file")[0]
    elif isinstance(held, Mapping):
        # What lies beside it may be of another run by now.
        text = held.get("yaml")
        cfg = load_config_text(text, source=f"{checkpoint}: the config in it")
        merge_from_list(cfg, opts, key="--opts")
        refuse_user_code(cfg, checkpoint)
        return cfg, checkpoint
    elif not path:
        raise FileNotFoundError(
            f"{checkpoint}: there is no config in it, and no config.yaml beside it, where training "
            "writes one; give the config that it was trained with by --config-file"
        )
    elif written_config(path) is not None:
        raise ConfigError(
            f"{path}: a LazyConfig, which is code; give the one that {checkpoint} was trained with "
            "by --config-file FILE.py (of an exported FCOS, the training's config)"
        )
    cfg = load_config(path, opts, key=key, opts_key="--opts", found=not config_file)
    if config_file:
        fill_in_class_count(cfg)  # a training has written it into its own
        keys = differing_keys(content, cfg, evaluation=True)
        if keys:
            logger.warning(
                f"--config-file {path}: {', '.join(keys)} differ from the config in {checkpoint}, "
                "that of its training; without --config-file that one is taken"
            )
    return cfg, path


def config_beside(checkpoint: str) -> str:
    """The config of x.pth: x.yaml, as that of a converted detector, or config.yaml; "" if there is
    none."""
    if "://" in checkpoint:
        return ""
    paths = [os.path.splitext(checkpoint)[0] + ".yaml"]
    paths.append(os.path.join(os.path.dirname(checkpoint), "config.yaml"))
    return next(filter(PathManager.isfile, paths), "")


def _student_state(
    content: Any, student: nn.Module, checkpoint: str
) -> Tuple[Dict[str, torch.Tensor], List[str]]:
    """The student's weights, and the names of what else the checkpoint holds."""
    state = content.get("model") if isinstance(content, Mapping) else None
    if not is_state_dict(state):
        raise ValueError(
            f"{checkpoint}: not a training checkpoint, it holds no weights named 'model'"
        )
    expected = student.state_dict()
    adapters = [k for k in state if k.startswith(ADAPTER_PREFIX) and k not in expected]
    state = {k: v for k, v in state.items() if k not in adapters}
    problem = describe_mismatch(state, expected)
    if problem:
        raise ValueError(f"{checkpoint}: doesn't fit the model of its config. Weights {problem}")
    return state, [*(str(k) for k in content if k != "model"), *adapters]
