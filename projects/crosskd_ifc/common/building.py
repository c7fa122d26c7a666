"""A detector from a config that may have mistakes."""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config import ConfigError
from .errors import one_line


def build_detector(cfg: CfgNode, *, what: str) -> nn.Module:
    """The model of a config, with random weights.

    Args:
        what: what the config is, for the error.

    Raises:
        ConfigError: if it can't be built.
    """
    try:
        return build_model(cfg)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{what} builds no model: {one_line(error)}") from error
