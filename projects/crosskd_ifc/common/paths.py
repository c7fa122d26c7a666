"""Where files that a user named are looked for."""

import os
from typing import Dict, List, Sequence, Set

from detectron2.utils.file_io import PathManager

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Links to the repository's folders; an installed package holds copies.
REPO_CONFIGS, PROTOCOLS, TOOLS = (
    os.path.realpath(os.path.join(_PACKAGE, name)) for name in ("configs", "protocols", "tools")
)
# The repository's root; "" where the package is installed without it.
CHECKOUT = "" if os.path.dirname(REPO_CONFIGS) == _PACKAGE else os.path.dirname(REPO_CONFIGS)

# What config files name and doesn't lie beside them -> where it was looked for, for later errors.
_not_beside: Dict[str, List[str]] = {}


def beside(path: str, config_file: str) -> str:
    """The path of a file beside the config that names it; if there is none, ``path`` as it is.

    Args:
        path: as it stands in the config; absolute ones and URLs stay so.
        config_file: a local file.
    """
    if not path or "://" in path or "://" in config_file or path.startswith(("/", "~")):
        return path
    folder = os.path.dirname(os.path.abspath(config_file))
    found = os.path.normpath(os.path.join(folder, path))
    if found == os.path.abspath(path):
        return path  # the same from the current folder
    if PathManager.isfile(found.split("?")[0]):  # detectron2's ?query for weights
        return found
    places = _not_beside.setdefault(path, [])
    places += [found] if found not in places else []
    return path


def is_seen_anyway(path: str, root: str, linked: Set[str]) -> bool:
    """Whether a subfolder is a link to what a walk through ``root`` sees without it; the targets of
    other links are noted in ``linked``.

    Args:
        root: a real path.
    """
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    if target in linked or os.path.commonpath([target, root]) in (target, root):
        return True
    linked.add(target)
    return False


def tried(path: str) -> List[str]:
    """Where a file that a user named is looked for, before ``configs/`` of this repository."""
    return [*_not_beside.get(path, []), os.path.abspath(os.path.expanduser(path))]


def resolve_path(path: str, *, what: str, key: str, extra_tried: Sequence[str] = ()) -> str:
    """Finds a file that a user named: from the current folder, then in this repository's configs/.

    What a config file names has been looked up beside that file before (:func:`beside`).

    Args:
        path: as given; ``~`` is expanded. A URL is returned as it is.
        what: what the file is, for the error, such as "dataset card".
        key: the config key (or argument) that named it, for the error.
        extra_tried: other places where the caller has looked, for the error.

    Returns:
        The absolute path of an existing file.

    Raises:
        FileNotFoundError: lists everything that was tried.
    """
    if "://" in path:
        return path
    local = os.path.expanduser(path)
    candidates = [os.path.abspath(local)]
    if not os.path.isabs(local):
        # From elsewhere, configs/... is found as from the repository's root.
        names = dict.fromkeys((local, local.removeprefix("configs/")))
        candidates += [os.path.normpath(os.path.join(REPO_CONFIGS, name)) for name in names]
    for candidate in candidates:
        if path and PathManager.isfile(candidate):
            return candidate
    places = [*tried(path), *candidates[1:], *extra_tried]
    places = "".join(f"\n  - {place}" for place in dict.fromkeys(places))
    raise FileNotFoundError(f"{key}: the {what} {path!r} was not found. Tried:{places}")
