"""YAML that means what it says, from files that may be anybody's."""

import math
from typing import Any, Dict

import yaml

# A config has some 300; aliases of aliases can stand for billions.
_MOST_VALUES = 100_000


def load_yaml(text: str) -> Any:
    """The content of a text of plain values.

    Raises:
        Exception: yaml.YAMLError, as :func:`check_yaml` and for tags that would run code; whatever
            else PyYAML raises for a value that isn't of its tag's type, such as ``!!bool foo``.
    """
    check_yaml(text)
    return yaml.safe_load(text)


def check_yaml(text: str) -> None:
    """Refuse what YAML would read as something else than is meant.

    Raises:
        yaml.YAMLError: for a key that is there twice, and for aliases that stand for more values
            than any config has. (Single aliases are in what detectron2 dumps.)
    """
    if _count_values(yaml.compose(text, yaml.SafeLoader), {}) > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases (*name) stand for more than {_MOST_VALUES} values")


def _count_values(node: Any, known: Dict[Any, float]) -> float:
    """As many as are there with each alias written out."""
    if node in known:
        return known[node]
    known[node] = math.inf  # if it leads back to itself
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"{twice} is there twice in the section that begins in line {line}"
            )
        children = [node for pair in children for node in pair]
    known[node] = 1 + sum(_count_values(child, known) for child in children)
    return known[node]
