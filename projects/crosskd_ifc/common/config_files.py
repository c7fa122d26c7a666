"""Finding config files and merging them, with errors that say where they come from."""

import io
import os
import traceback
from typing import Any, Callable, Dict, Iterator, Mapping, Sequence, Tuple

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from fvcore.common.config import BASE_KEY

from ..config import ConfigError, add_crosskd_ifc_config
from .lazy_config import is_lazy, is_saved_lazy
from .paths import beside, resolve_path
from .safe_yaml import load_yaml
from .user_code import import_user_code, refuse_user_code

# A key of configs that stand for a LazyConfig: the file.
LAZY_CONFIG = "LAZY_CONFIG"

# What yacs, fvcore and YAML raise for input that is no config of known keys and fitting types.
_MERGE_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)
# Keys of files, lists of files, or teachers with files: looked up beside the config that names
# them.
FILES = (
    "MODEL.CROSSKD.TEACHER.CONFIG_FILE",
    "MODEL.CROSSKD.TEACHER.WEIGHTS",
    "MODEL.CROSSKD.TEACHERS",
    "MODEL.CROSSKD.IMPORTS",
    "DATASETS.CARDS",
)
_LAZY = "this is a LazyConfig, and a YAML config is needed here"


class _CheckedCfg(CN):
    """Reads files, and what their _BASE_ leads to, as YAML that means what it says. Files that one
    names are those beside it, if they are there."""

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        if is_lazy(filename):
            raise ConfigError(f"{filename}: {_LAZY}")
        with super()._open_cfg(filename) as f:
            text = f.read()
        content = load_yaml(text)
        if not isinstance(content, dict):
            found = "it is empty" if content is None else f"a {type(content).__name__}"
            raise ConfigError(f"{filename}: {found}; expected KEY: VALUE sections, as in a config")
        bases = content.get(BASE_KEY, [])
        if not all(isinstance(x, str) for x in (bases if isinstance(bases, list) else [bases])):
            raise ConfigError(
                f"{filename}: {BASE_KEY} is {bases!r}; name a file, or a list of files"
            )
        if is_saved_lazy(content):
            raise ConfigError(f"{filename}: {_LAZY}")
        for key in FILES:
            *sections, leaf = key.split(".")
            node = _section(content, sections)
            if isinstance(node.get(leaf), str):  # may be a tuple in yacs' notation
                node[leaf] = cls._decode_cfg_value(node[leaf])
            if leaf in node:
                # Those that are there; others stay as they are.
                node[leaf] = map_files(lambda file: beside(file, filename), node[leaf])
        return io.StringIO(yaml.safe_dump(content))


def default_config() -> CN:
    """detectron2's defaults, and this project's."""
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    return cfg


def default_values() -> Dict[str, Any]:
    """Key -> value of :func:`default_config`."""
    return dict(flat(default_config()))


def load_config(
    config_file: str,
    opts: Sequence = (),
    *,
    key: str = "--config-file",
    opts_key: str = "command line",
    found: bool = False,
) -> CN:
    """The config that a tool's command line means; what its IMPORTS name is imported.

    Args:
        config_file: as of :func:`find_config`.
        opts: KEY, VALUE, ... on top.
        key, opts_key: what gave them, for errors.
        found: the file was found beside weights, not named by the user: no IMPORTS, and the files
            that it names are not looked up beside it, since a training has written it.

    Raises:
        ConfigError: if there is no such config, or it or ``opts`` can't be merged.
    """
    refuse_late_options(opts)
    if not config_file:
        raise ConfigError(f"{key} is missing")
    path = config_file if found else find_config(config_file, key=key)[0]
    cfg = default_config()
    merge_from_file(cfg, path, key=key, as_written=found)
    merge_from_list(cfg, opts, key=opts_key)
    if found:
        refuse_user_code(cfg, path)
    else:
        import_user_code(cfg)
    return cfg


def refuse_late_options(opts: Sequence) -> None:
    """Refuse options among KEY VALUE pairs: argparse leaves all that follows the first KEY to them.

    Raises:
        ConfigError: naming the first.
    """
    late = [x for x in opts if isinstance(x, str) and x.startswith("--")]
    if late:
        raise ConfigError(
            f"command line: {late[0]} stands after the first KEY VALUE pair; options come first"
        )


def find_config(name: str, *, key: str) -> Tuple[str, str]:
    """Find a config that a user named: current folder, then ``configs/``, then detectron2's zoo.

    Args:
        name: a path, or a model-zoo name such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml.
        key: the config key or argument that named it, for the error.

    Returns:
        The file's path, and the model-zoo name if it came from there, else "".

    Raises:
        ConfigError: listing what was tried.
    """
    try:
        tried = (f"model zoo: {name}",)
        return resolve_path(name, what="config", key=key, extra_tried=tried), ""
    except FileNotFoundError as error:
        missing = ConfigError(str(error))
    if os.path.isabs(name) or os.pardir in name.split("/"):  # leads out of the zoo's folder
        raise missing
    try:
        return model_zoo.get_config_file(name), name
    except RuntimeError:
        raise missing from None


def merge_from_file(cfg: CN, path: str, *, key: str, as_written: bool = False) -> None:
    """``cfg.merge_from_file`` through safe YAML, with errors that say where they come from.

    Only a config of the installed model zoo may hold YAML tags, which run code: detectron2's
    RetinaNet configs compute their anchor sizes so. A section that is given twice is an error: YAML
    would drop the first one.

    Args:
        cfg: the config to merge into.
        path: YAML file.
        key: the config key or argument that named it, for the error.
        as_written: don't look up beside it what it names.

    Raises:
        ConfigError: if the file is no config of known keys and fitting types.
    """
    if is_lazy(path):
        raise ConfigError(f"{key} {path}: {_LAZY}")
    of_the_zoo = _is_of_the_zoo(path)
    try:
        content = {} if of_the_zoo else _CheckedCfg.load_yaml_with_base(path)
        cfg.merge_from_file(path, allow_unsafe=of_the_zoo)
        for name in () if as_written else FILES:
            *sections, leaf = name.split(".")
            value = _section(content, sections).get(leaf)
            if value:
                cfg.merge_from_list([name, value])
    except RecursionError:
        raise ConfigError(
            f"{key} {path}: it is nested too deeply, or its _BASE_ leads back to itself"
        ) from None
    except _MERGE_ERRORS as error:
        raise ConfigError(f"{key} {path}: {_text(error)}") from error


def merge_from_list(cfg: CN, opts: Sequence, *, key: str) -> None:
    """``cfg.merge_from_list`` with errors that say where they come from.

    Args:
        cfg: the config to merge into.
        opts: KEY, VALUE, ...
        key: the config key or argument that held them, for the error.

    Raises:
        ConfigError: for an unknown key, a value of another type, or an odd number of items.
    """
    opts = list(opts)
    refuse_late_options(opts)
    if len(opts) % 2:
        raise ConfigError(f"{key}: {len(opts)} items; expected KEY VALUE pairs")
    for name, value in zip(opts[::2], opts[1::2]):
        try:
            if name == "MODEL.CROSSKD.TEACHER.STAGE":  # a number or a word, whatever it was
                cfg.MODEL.CROSSKD.TEACHER.STAGE = None
            cfg.merge_from_list([name, value])
        except _MERGE_ERRORS as error:
            reason = _text(error)
            named = "" if str(name) in reason else f"{name}: "
            raise ConfigError(f"{key}: {named}{reason}") from error


def load_config_text(text: str, *, source: str) -> CN:
    """The config that :meth:`CfgNode.dump` has written, with this project's keys.

    Args:
        source: where it comes from, for the error.

    Raises:
        ConfigError: if it isn't one.
    """
    cfg = default_config()
    try:
        content = CN(load_yaml(text))
        lazy = content.pop(LAZY_CONFIG, None)
        cfg.merge_from_other_cfg(content)
    except _MERGE_ERRORS as error:
        raise ConfigError(f"{source}: {_text(error)}") from error
    if lazy:
        raise ConfigError(
            f"{source}: it is of a run of tools/lazyconfig_train_net.py, whose model is code, in "
            f"{lazy}. Name that file by --config-file"
        )
    return cfg


def flat(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The keys of a config, such as MODEL.DEVICE, and their values."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def map_files(change: Callable[[str], str], value: Any) -> Any:
    """A setting with its files changed: a file, a list of files, or teachers' sections."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [map_files(change, x) for x in value]
    if isinstance(value, dict):  # a teacher's section
        names = ("CONFIG_FILE", "WEIGHTS")
        return {k: map_files(change, v) if k in names else v for k, v in value.items()}
    return value


def _section(content: Any, names: Sequence[str]) -> Dict[str, Any]:
    """A section of a config file; {} if it isn't there."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _is_of_the_zoo(path: str) -> bool:
    # As detectron2 finds them; a link that leads elsewhere is none of its files.
    folder = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def _text(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    if place == yaml.constructor.__file__ and not isinstance(error, yaml.YAMLError):
        return f"a value is not of its YAML type ({type(error).__name__}: {error})"
    # A KeyError shows the repr of its argument.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
