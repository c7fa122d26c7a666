"""Loading all of a detector or nothing."""

from typing import Any, Mapping

from torch import nn

from ..common.errors import one_line
from ..config import ConfigError
from .reading import SafeReader, WeightsError
from .state_dicts import ADAPTER_PREFIX, describe_problems


class MisfitError(WeightsError):
    """Weights don't fit the model that they are for."""


class StrictReader(SafeReader):
    """Loads all of a detector or fails: what is missing would quietly stay random."""

    def _load_model(self, checkpoint):
        """
        Raises:
            MisfitError: unless all keys and shapes fit; adapters of a distillation may be more.
        """
        incompatible = super()._load_model(checkpoint)
        problems = describe_misfit(incompatible, with_adapters=False)
        if problems:
            raise MisfitError(problems)
        return incompatible


def describe_misfit(found: Any, *, with_adapters: bool) -> str:
    """In what a checkpoint doesn't fit its model, or "".

    Args:
        found: what a checkpointer's ``_load_model`` returns.
        with_adapters: whether those of a distillation that the model lacks count, too.
    """
    # fvcore reports a key of another shape as missing, too.
    other_shape = {k for k, _, _ in found.incorrect_shapes}
    more = found.unexpected_keys
    return describe_problems(
        missing=[k for k in found.missing_keys if k not in other_shape],
        unexpected=[k for k in more if with_adapters or not k.startswith(ADAPTER_PREFIX)],
        wrong_shapes=[
            f"{k} {ours} instead of {model}" for k, ours, model in found.incorrect_shapes
        ],
    )


def load_strictly(
    model: nn.Module, weights: str, *, key: str = "MODEL.WEIGHTS", source: str = "its config"
) -> Mapping[str, Any]:
    """Load all of a detector.

    Args:
        weights: a path or URL.
        key: the config key that named it, for the error.
        source: where the model comes from, for the error.

    Returns:
        What the file holds beside the weights.

    Raises:
        ConfigError: if the file can't be read or doesn't fit.
    """
    try:
        return StrictReader(model).load(weights)
    except MisfitError as error:
        raise ConfigError(
            f"{key} {weights!r} does not fit the model of {source}. Weights {error}"
        ) from None
    except Exception as error:  # readers raise what they like on foreign bytes
        raise ConfigError(
            f"{key} {weights!r} can't be read as weights: {one_line(error)}"
        ) from error
