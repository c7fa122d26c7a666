"""Mistakes in a config that detectron2 meets while it builds a model, told in its keys."""

import contextlib
from typing import Iterator

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config import ConfigError

# detectron2's; they are written inside its functions.
_RESNET_DEPTHS = (18, 34, 50, 101, 152)


@contextlib.contextmanager
def explained(cfg: CfgNode) -> Iterator[None]:
    """Within this context, a model is built from ``cfg``; other errors pass through.

    Raises:
        ConfigError: naming the key, where detectron2's error doesn't.
    """
    try:
        yield
    except KeyError as error:
        depth = cfg.MODEL.RESNETS.DEPTH
        if depth in _RESNET_DEPTHS or error.args != (depth,):
            raise
        raise ConfigError(
            f"MODEL.RESNETS.DEPTH is {depth}; possible values: "
            + ", ".join(map(str, _RESNET_DEPTHS))
        ) from error


def build_detector(cfg: CfgNode, *, what: str) -> nn.Module:
    """The model of a config, with random weights.

    Args:
        what: what the config is, for the error.

    Raises:
        ConfigError: if it can't be built.
    """
    try:
        with explained(cfg):
            return build_model(cfg)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{what} builds no model: {type(error).__name__} {error}") from error
