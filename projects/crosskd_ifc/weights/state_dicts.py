"""State dicts and files of weights: what they are, and in what they differ."""

from typing import Any, Mapping, Sequence

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
