"""``MODEL.CROSSKD.IMPORTS``: code of the user's own, which registers fusions, losses, backbones,
data sets, ..."""

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback

from detectron2.config import CfgNode

from ..config import ConfigError
from .errors import one_line
from .paths import resolve_path

_KEY = "MODEL.CROSSKD.IMPORTS"


def import_user_code(cfg: CfgNode) -> None:
    """Import the modules and ``.py`` files that a config names, each once in a process.

    This runs code. Call it only for a config that the user has named, after the command line is
    merged and before anything is checked or built; never for one that lies beside weights, which
    may be anybody's (:func:`refuse_user_code`).

    Raises:
        ConfigError: for what can't be found, or fails.
    """
    for name in cfg.MODEL.CROSSKD.IMPORTS:
        try:
            _import(str(name))
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from None
        except Exception as error:  # it is anyone's code
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"{_KEY}: {name!r} can't be imported: {one_line(error)} ({place.filename}, line "
                f"{place.lineno}). Give a .py file, or a module that Python finds"
            ) from error


def refuse_user_code(cfg: CfgNode, path: str) -> None:
    """Refuse to import what a config names that the user hasn't.

    Args:
        path: of the config, for the error.

    Raises:
        ConfigError: naming the code and the way to run it.
    """
    names = tuple(cfg.MODEL.CROSSKD.IMPORTS)
    if names:
        raise ConfigError(
            f"{path}: its {_KEY} names {', '.join(map(repr, names))}, Python code that would run "
            "here; if you trust it, give this config by --config-file"
        )


def _import(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = os.path.realpath(resolve_path(name, what="file", key=_KEY))
    stem = os.path.splitext(os.path.basename(path))[0]
    module_name = f"{stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
