"""Reading, comparing and writing weight files."""

import contextlib
import os
import tempfile
from typing import Any, Iterator, Mapping, Sequence

import torch
from detectron2.utils.file_io import PathManager

# Parameters of a student's own distillation, which neither deployment nor a later student needs.
ADAPTER_PREFIX = "fusion."


def is_missing(weights: str) -> bool:
    """Whether this is a local path, with or without detectron2's ``?query``, without a file."""
    path = weights.split("?")[0]
    return "://" not in path and not PathManager.isfile(path)


def is_state_dict(x: Any) -> bool:
    """Whether this maps names to tensors."""
    return isinstance(x, Mapping) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in x.items()
    )


def describe_mismatch(found: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> str:
    """In what names and shapes of ``found`` differ from ``expected`` (name -> tensor), or ""."""
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in found
        if k in expected and found[k].shape != expected[k].shape
    ]
    return describe_problems(
        missing=[k for k in expected if k not in found],
        unexpected=[k for k in found if k not in expected],
        wrong_shapes=shapes,
    )


def describe_problems(
    *, missing: Sequence[str], unexpected: Sequence[str], wrong_shapes: Sequence[str]
) -> str:
    """The first names of each kind and how many there are; "" if there are none."""
    problems = []
    for what, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", wrong_shapes),
    ):
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
            problems.append(f"{what}: {', '.join(names[:3])}{more}")
    return "; ".join(problems)


def refuse_overwriting(out: str, *, sources: Sequence[str], force: bool) -> None:
    """Refuse an ``out`` that exists, without ``force``, or that is one of the ``sources``.

    Raises:
        FileExistsError: naming the file.
    """
    if not os.path.lexists(out):
        return
    if any(os.path.exists(s) and os.path.exists(out) and os.path.samefile(s, out) for s in sources):
        raise FileExistsError(f"{out}: this would overwrite the input; give another OUT")
    if not force:
        raise FileExistsError(f"{out} exists; give another OUT, or --force to replace it")


@contextlib.contextmanager
def staging_folder(parent: str) -> Iterator[str]:
    """A temporary folder in ``parent``, from which complete files are moved to their place."""
    PathManager.mkdirs(parent)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as folder:
        yield folder
