"""Dataset cards as typed models: what these classes declare is what a card may hold."""

import os
import re
from reprlib import repr as short  # a hostile card's values may be huge
from typing import Annotated, Any, Dict, List, Literal, Optional, Tuple, Union

from detectron2.utils.file_io import PathManager
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from .files import read_yaml

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


def _expand(value: str, info: ValidationInfo) -> str:
    """The absolute path; a relative one starts at the card, or at its root once that is known."""
    names = [a or b for a, b in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", value)]
    for name in names:
        if not os.environ.get(name):
            raise ValueError(f"expected the environment variable {name} to be set")
    value = os.path.expanduser(os.path.expandvars(value))
    return os.path.normpath(os.path.join(info.context["folder"], value))


def _enter(root: str, info: ValidationInfo) -> str:
    if not PathManager.isdir(root):
        raise ValueError(f"expected an existing folder; {root} is none (paths start at the card)")
    info.context["folder"] = root
    return root


def _without_ending(name: str) -> str:
    if name.endswith(".txt"):
        raise ValueError("expected the name of a file in ImageSets/Main, without .txt")
    return name


def _unique(names: Tuple[str, ...]) -> Tuple[str, ...]:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"expected each name once; classes[{i}] is {short(name)} again")
    return names


# Names become parts of file names.
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
_Path = Annotated[str, Field(pattern=r"^[^\x00]+$"), AfterValidator(_expand)]
_Class = Annotated[str, Field(pattern=r"\S")]
# Not strict: YAML has lists, no tuples.
_Classes = Annotated[Tuple[_Class, ...], Field(strict=False, min_length=1), AfterValidator(_unique)]
_SPLITS = Field(min_length=1)


class CocoFiles(TypedDict):
    """The files of a split: its json, and the folder that the json's file names start from."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    json: _Path
    images: _Path


class _Card(BaseModel):
    """A checked dataset card. Paths are absolute; nothing but the card itself has been read.

    Attributes:
        path: the card file, or "" for a data set that is registered without one.
        name: data set names are ``<name>_<split>``.
        root: the data set's folder.
        classes: class names in the order of their ids; None: as in the json (coco only).
        year: 2007 (11-point AP) or 2012; None where no VOC evaluator needs it.
    """

    model_config = _STRICT

    path: str = Field("", alias="<file>")  # not a key of the file
    name: _Name
    root: Annotated[_Path, AfterValidator(_enter)]
    classes: Optional[_Classes] = None
    year: None = None


class VocCard(_Card):
    """A VOC folder. ``splits``: split -> name of ImageSets/Main/<x>.txt."""

    format: Literal["voc"]
    splits: Annotated[Dict[_Name, Annotated[_Name, AfterValidator(_without_ending)]], _SPLITS]
    classes: _Classes
    evaluator: Literal["coco", "pascal_voc"]
    year: Optional[Literal[2007, 2012]] = None

    @model_validator(mode="after")
    def _suits_the_voc_evaluator(self) -> "VocCard":
        if self.evaluator != "pascal_voc":
            return self
        if self.year is None:
            raise ValueError("the key 'year' is missing: 2007 or 2012, for pascal_voc")
        for i, name in enumerate(self.classes):
            if re.search(r"[/\\\0]", name):
                raise ValueError(
                    f"classes[{i}] is {short(name)}; expected no slash: the VOC evaluator writes a "
                    "file of this name"
                )
            if len(name.encode()) > 251:  # of 255 bytes that a file's name may have
                raise ValueError(
                    f"classes[{i}] is {short(name)}; expected at most 251 bytes: the VOC evaluator "
                    "writes a file of this name"
                )
        return self


class CocoCard(_Card):
    """COCO json files. ``splits``: split -> :class:`CocoFiles`."""

    format: Literal["coco"]
    splits: Annotated[Dict[_Name, CocoFiles], _SPLITS]
    evaluator: Literal["coco"] = "coco"


Card = Union[VocCard, CocoCard]
_ANY: TypeAdapter = TypeAdapter(Annotated[Card, Field(discriminator="format")])


def load_card(path: str) -> Card:
    """Reads and checks a dataset card, but not the data set.

    Raises:
        ValueError: names the card, the key, what was given and what is possible.
    """
    path = os.path.realpath(path)  # a link to a card and the card are the same card
    try:
        raw = read_yaml(path)
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: it is {short(raw)}; expected keys and values")
    except ValueError as error:
        raise ValueError(f"dataset card {error}") from error
    try:
        content = {**raw, "<file>": path}
        return _ANY.validate_python(content, context={"folder": os.path.dirname(path)})
    except ValidationError as error:
        said = _first_error(error, raw)
        raise ValueError(f"dataset card {path}: {said}") from None


def _first_error(error: ValidationError, raw: Dict[Any, Any]) -> str:
    """The first fault of a card as one line that opens with its key."""
    first = error.errors(include_url=False)[0]
    kind, value = first["type"], first["input"]
    if kind.startswith("union_tag"):
        if "format" not in raw:
            return "the key 'format' is missing"
        return f"format is {short(raw['format'])}; expected 'voc' or 'coco'"
    of_format, *loc = first["loc"]
    if kind == "extra_forbidden":
        known = CocoFiles.__annotations__ if len(loc) > 1 else _known(str(of_format))
        return f"unknown key {_key(loc)}; known are {', '.join(known)}"
    if kind == "missing":
        return f"the key {_key(loc)!r} is missing"
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    said = said.replace("tuple", "list").replace("Tuple", "List")  # as YAML calls them
    said = said.replace("a valid string", "text (quotes make text of 1, yes or no)")
    if loc and loc[-1] == "[key]":
        return f"a key of {_key(loc[:-2])} is {short(value)}; {said}"
    return f"{_key(loc)} is {short(value)}; {said}" if loc else said


def _known(of_format: str) -> List[str]:
    model = VocCard if of_format == "voc" else CocoCard
    return [key for key in model.model_fields if key != "path"]


def _key(loc: List[Any]) -> str:
    """splits.train.json or classes[1]."""
    parts = (f"[{x}]" if isinstance(x, int) else f".{short(x)[1:-1]}" for x in loc)
    return "".join(parts).lstrip(".")
