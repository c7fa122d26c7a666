"""The file of a protocol as typed models: what its keys may hold."""

from reprlib import repr as short
from typing import Annotated, Any, Dict, List, Optional

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    StringConstraints,
    ValidationError,
)

from ..config import ConfigError
from ..data.files import read_yaml

OWN_KEYS = ("SEED", "OUTPUT_DIR", "DATASETS.TEST")  # set by the protocol's other keys


def _all_different(values: List[Any]) -> List[Any]:
    if len({str(value) for value in values}) < len(values):
        raise ValueError("expected different values")
    return values


def _no_key_of_the_protocol(key: str) -> str:
    if key in OWN_KEYS:
        raise ValueError(f"expected config keys other than {', '.join(OWN_KEYS)}")
    return key


def _no_mapping(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("expected a value; write nested keys as MODEL.CROSSKD.KEY")
    return value


# Names become parts of paths.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\z")]
Text = Annotated[str, StringConstraints(min_length=1)]
Seeds = Annotated[List[NonNegativeInt], Field(min_length=1), AfterValidator(_all_different)]
Opts = Dict[
    Annotated[str, AfterValidator(_no_key_of_the_protocol)],
    Annotated[Any, AfterValidator(_no_mapping)],
]
Arms = Annotated[Dict[Name, "ArmEntry"], Field(min_length=1)]
Pair = Annotated[List[str], Field(min_length=2, max_length=2), AfterValidator(_all_different)]


class _Entry(BaseModel):
    """What stands in the file, described in :mod:`.protocol`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ArmEntry(_Entry):
    """An arm, as it stands in the file."""

    config: Text
    title: str = ""
    opts: Opts = {}
    seeds: Optional[Seeds] = None
    versus: Annotated[List[str], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)] = []


class ProtocolEntry(_Entry):
    """A protocol, as it stands in the file."""

    name: Name
    title: str = ""
    seeds: Seeds
    validation: str = ""
    test: Text
    opts: Opts = {}
    teacher: Optional[ArmEntry] = None
    arms: Arms
    ablations: Dict[Text, Arms] = {}
    contrasts: Annotated[List[Pair], AfterValidator(_all_different)] = []
    margin: Annotated[Optional[PositiveFloat], Field(allow_inf_nan=False)] = None
    stability: bool = False


def read_protocol_file(path: str) -> ProtocolEntry:
    """Read a protocol's file. What its names stand for is not looked at.

    Raises:
        ValueError: naming the file, for what is no YAML.
        ConfigError: naming the key, for what is no protocol.
    """
    raw = read_yaml(path)
    try:
        return ProtocolEntry.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_tell(error)) from None


def _tell(error: ValidationError) -> str:
    """The first fault in one line: key, what is given, what is possible."""
    # A misspelt key is told before the one that is missing for it.
    faults = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    fault, path = faults[0], list(faults[0]["loc"])
    is_key = path[-1:] == ["[key]"]
    key = ".".join(short(part).strip("'") for part in path[: -1 if is_key else None]) or "content"
    if fault["type"] == "extra_forbidden":
        known = ProtocolEntry.model_fields if len(path) == 1 else ArmEntry.model_fields
        return f"{key}: unknown key; known are {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{key}: the key is missing"
    reason = fault["msg"].replace("Input should", "it should").replace("Value error, ", "")
    return f"{key}: {reason}" if is_key else f"{key} is {short(fault['input'])}; {reason}"
