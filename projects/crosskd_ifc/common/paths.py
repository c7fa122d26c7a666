"""Where files that a user named are looked for."""

import os
from typing import Sequence

from detectron2.utils.file_io import PathManager

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Links to the repository's folders; an installed package holds copies.
REPO_CONFIGS, PROTOCOLS, TOOLS = (
    os.path.realpath(os.path.join(_PACKAGE, name)) for name in ("configs", "protocols", "tools")
)
# The repository's root; "" where the package is installed without it.
CHECKOUT = "" if os.path.dirname(REPO_CONFIGS) == _PACKAGE else os.path.dirname(REPO_CONFIGS)


def resolve_path(path: str, *, what: str, key: str, extra_tried: Sequence[str] = ()) -> str:
    """Finds a file that a user named: from the current folder, then in this repository's configs/.

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
    tried = [os.path.abspath(local)]
    if not os.path.isabs(local):
        tried.append(os.path.normpath(os.path.join(REPO_CONFIGS, local)))
    for candidate in tried:
        if path and PathManager.isfile(candidate):
            return candidate
    places = "".join(f"\n  - {place}" for place in [*tried, *extra_tried])
    raise FileNotFoundError(f"{key}: the {what} {path!r} was not found. Tried:{places}")
