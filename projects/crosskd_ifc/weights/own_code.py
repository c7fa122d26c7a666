"""The user's own code that a config for stock detectron2 needs."""

import sys
from typing import Any, Iterator, List, Union

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry, locate
from omegaconf import DictConfig

from ..common.config_files import flat
from ..common.lazy_config import calls

_INSTALLED = {"detectron2", "fvcore", "omegaconf", "torch", "torchvision"}  # with detectron2
_INSTALLED |= sys.stdlib_module_names


def own_code(stock: Union[CfgNode, DictConfig]) -> List[str]:
    """The files that define what a config names: those of its ``MODEL.CROSSKD.IMPORTS``, less those
    that only the training needed.

    Args:
        stock: as of :func:`stock_config`.
    """
    parts = _registered(stock) if isinstance(stock, CfgNode) else _called(stock)
    modules = {getattr(part, "__module__", None) or "builtins" for part in parts}
    own = (name for name in modules if name.split(".")[0] not in _INSTALLED)
    return sorted(getattr(sys.modules[name], "__file__", name) for name in own)


def _registered(cfg: CfgNode) -> Iterator[Any]:
    names = {value for _, value in flat(cfg) if isinstance(value, str)}
    for registry in vars(modeling).values():
        if isinstance(registry, Registry):
            yield from (part for name, part in registry if name in names)


def _called(config: DictConfig) -> Iterator[Any]:
    for node in calls(config.model):
        target = node["_target_"]
        yield locate(target) if isinstance(target, str) else target
