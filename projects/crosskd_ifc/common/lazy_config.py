"""LazyConfig files: Python code that defines a ``model``.

Reading one runs it, so only files are read that the user has named and those of detectron2's zoo.
"""

import builtins
from typing import Any, Iterator, Mapping, Sequence

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from torch import nn

from ..config import ConfigError
from .errors import said


def is_lazy(path: str) -> bool:
    """Whether a config is a LazyConfig file."""
    return path.endswith(".py")


def is_saved_lazy(content: Mapping) -> bool:
    """Whether this is what detectron2 has written of one (``LazyConfig.save``)."""
    model = content.get("model")
    return isinstance(model, Mapping) and "_target_" in model


def load_lazy_config(path: str, overrides: Sequence[str] = (), *, key: str) -> DictConfig:
    """Run a LazyConfig file.

    Args:
        path: a local file.
        overrides: in LazyConfig's syntax, such as "model.roi_heads.num_classes=3".
        key: the config key or argument that named the file, for the error.

    Returns:
        What it defines, ``model`` among it.

    Raises:
        ConfigError: if it can't be run, defines no ``model``, or an override doesn't fit.
    """
    if "://" in path:
        raise ConfigError(f"{key} {path}: a LazyConfig file is code; download it and look at it")
    original = builtins.__import__  # detectron2 leaves its own there when a file fails
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # a config is anyone's code
        raise ConfigError(
            f"{key} {path}: running this LazyConfig file failed: {explain(error)}"
        ) from error
    finally:
        builtins.__import__ = original
    if not isinstance(cfg.get("model"), DictConfig):
        raise ConfigError(f"{key} {path}: this LazyConfig file defines no `model`")
    for override in overrides:
        name = str(override).partition("=")[0]
        try:
            if not name.startswith("+") and not _is_there(cfg, name):
                raise KeyError(f"there is no {name}; +{override} would add it")
            LazyConfig.apply_overrides(cfg, [str(override)])
        except Exception as error:  # of hydra's parser, omegaconf's types or the file's resolvers
            raise ConfigError(
                f"{key} {path}: the override {override!r}, in LazyConfig's syntax "
                f"model.key=value: {explain(error)}"
            ) from error
    return cfg


def _is_there(cfg: DictConfig, name: str) -> bool:
    absent = object()
    try:
        return OmegaConf.select(cfg, name, default=absent, throw_on_missing=True) is not absent
    except MissingMandatoryValue:  # "???", to be given here
        return True


def instantiate_model(cfg: DictConfig, *, what: str) -> nn.Module:
    """Build the ``model`` of a LazyConfig.

    Args:
        cfg: as of :func:`load_lazy_config`.
        what: where it is from, for the error.

    Raises:
        ConfigError: if that fails.
    """
    try:
        model = instantiate(cfg.model)
    except Exception as error:  # of anyone's classes
        raise ConfigError(f"{what} builds no model: {explain(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what} builds a {type(model).__name__}, which is no model")
    return model


def calls(node: Any) -> Iterator[DictConfig]:
    """The nodes below this one, and itself, that are calls."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return
    if isinstance(node, DictConfig) and "_target_" in node:
        yield node
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
            yield from calls(node[key])


def explain(error: Exception) -> str:
    """An error in one line; for a package that isn't there also how to get it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = " (pip install timm, or this project's extra 'timm')" if package == "timm" else ""
        return f"the package {package!r} is not installed{extra}"
    return f"{type(error).__name__}: {said(error)}"
