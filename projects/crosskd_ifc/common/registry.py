"""Registries of what a config may name, and the settings that it gives to what is named."""

import inspect
import math
from typing import Any, Callable, Dict, List, Optional, Sequence

from fvcore.common.registry import Registry

from ..config import ConfigError


class NamedRegistry(Registry):
    """A registry under the names that YAML files use, which are not Python class names."""

    def register(self, obj=None, *, name: Optional[str] = None):  # type: ignore[override]
        def add(obj_):
            self._do_register(name or obj_.__name__, obj_)
            return obj_

        return add if obj is None else add(obj)

    def names(self) -> List[str]:
        return sorted(name for name, _ in self)


def read_options(key: str, given: Sequence, taker: Callable) -> Dict[str, Any]:
    """A setting of NAME VALUE pairs as keyword arguments.

    Args:
        key: of the config, for messages.
        given: name, value, name, value, ...
        taker: whose keyword-only arguments with a default are the possible names. Where a default
            is a number, or True or False, so must the value be.

    Raises:
        ConfigError: naming ``key``, what is wrong and the possible names.
    """
    possible = {
        name: parameter.default
        for name, parameter in inspect.signature(taker).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
    shown = ", ".join(f"{name} [{value}]" for name, value in possible.items()) or "none"
    given, problem = tuple(given), ""
    names, values = given[::2], given[1::2]
    if len(names) != len(values):
        problem = "it must be NAME VALUE pairs"
    elif len(set(map(str, names))) < len(names):
        problem = "a name stands in it twice"
    for name, value in zip(names, values):
        if name not in possible:
            problem = problem or f"there is no {name!r}"
        elif isinstance(possible[name], bool):
            if not isinstance(value, bool):
                problem = problem or f"{name} must be True or False"
        elif isinstance(possible[name], (int, float)) and not _is_number(value):
            problem = problem or f"{name} must be a number"
    if problem:
        raise ConfigError(f"{key} is {given}: {problem}; possible names [defaults]: {shown}")
    return dict(zip(names, values))


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
