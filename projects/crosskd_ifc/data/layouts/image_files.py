"""The files below a folder, and which of its images an annotation means."""

import functools
import os
import re
import unicodedata
from collections import defaultdict
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple

from PIL import Image

from ...common.paths import is_seen_anyway
from ..files import read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case
SPLITS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


class Match(NamedTuple):
    """An image that an annotation may mean.

    Attributes:
        path: of the image.
        closeness: the larger, the surer. Whether the image lies in the very folder that is written;
            how many of the folders written before its name it has; how many folders, and words of
            folders, it shares with the annotation file.
    """

    path: str
    closeness: Tuple[bool, int, int, int]


class Files:
    """The files below a folder, by suffix, and the images by name.

    Attributes:
        unreadable: annotation files and folders that can't be read at all -> why.
    """

    def __init__(self, root: str):
        self.root = root
        self.by_suffix: Dict[str, List[str]] = defaultdict(list)
        self.unreadable: Dict[str, str] = {}
        self._by_name: Dict[str, List[str]] = defaultdict(list)
        self._linked: Set[str] = set()
        self.images: List[str] = []

        def note(error: OSError) -> None:
            self.unreadable[error.filename] = f"{error.filename}: {error.strerror}"

        for folder, folders, names in os.walk(root, onerror=note, followlinks=True):
            folders[:] = sorted(name for name in folders if self._is_new(folder, name))
            for name in sorted(names):
                stem, suffix = os.path.splitext(folded(name))
                path = os.path.join(folder, name)
                if name.startswith("."):
                    continue
                if suffix in IMAGE_SUFFIXES:
                    self.images.append(path)
                    self._by_name[folded(name)].append(path)
                    self._by_name[stem].append(path)
                else:
                    self.by_suffix[suffix].append(path)

    def _is_new(self, folder: str, name: str) -> bool:
        """Whether to look through a subfolder: not a hidden one, nor a link to what is seen
        anyway."""
        path = os.path.join(folder, name)
        return not name.startswith(".") and not is_seen_anyway(path, self.root, self._linked)

    def read(self, read: Callable[[str], Any], path: str) -> Any:
        """What ``read`` makes of a file; None if it can't, which is noted."""
        try:
            return read(path)
        except ValueError as error:
            self.unreadable[path] = str(error)
            return None

    def lines(self, path: str) -> List[str]:
        """Of a text file, those that aren't blank; none if it can't be read, which is noted."""
        text = self.read(lambda path: read_text(path, drop_bom=True), path) or ""
        return [line.strip() for line in re.split("[\r\n]", text) if line.strip()]

    def matches(self, name: str, near: str) -> List[Match]:
        """The images that a name in the annotation file ``near`` may mean; one, if it is clear.

        That is the file at the place that is written. Else those of its name, with or without
        suffix, that are the closest, but never one whose folders tell another split.
        """
        written, last = os.path.split(name.replace("\\", "/").strip())
        bases = (os.path.dirname(near), self.root) if written else (os.path.dirname(near),)
        places = [self._place(os.path.normpath(os.path.join(base, written))) for base in bases]
        for place in places:
            path = os.path.join(place, last)
            if self._has(path) and os.path.isfile(path):
                return [Match(path, self._closeness(path, written, near, places))]
        last = folded(last)
        stem, suffix = os.path.splitext(last)
        # What follows a dot may be a part of the name.
        stem = stem if suffix in Image.registered_extensions() else last
        found = self._by_name.get(last) or self._by_name.get(stem, [])
        # If the folder that is written is there, the image is in it, or missing.
        here = [place for place in places if self._has(place)]
        inside = tuple(place + os.sep for place in here if written and os.path.isdir(place))
        found = [path for path in found if not inside or path.startswith(inside)]
        found = [path for path in found if not self._in_another_split(path, near)]
        scored = [Match(path, self._closeness(path, written, near, places)) for path in found]
        most = max((match.closeness for match in scored), default=None)
        return [match for match in scored if match.closeness == most]

    def _has(self, path: str) -> bool:
        return f"{path}{os.sep}".startswith(self.root + os.sep)

    def _place(self, path: str) -> str:
        """The same place below the folder, if a link leads there."""
        return path if self._has(path) else os.path.realpath(path)

    def _closeness(
        self, path: str, written: str, near: str, places: Sequence[str]
    ) -> Tuple[bool, int, int, int]:
        folder = os.path.dirname(path)
        ours, theirs = self.parts(folder), self.parts(os.path.dirname(near))
        tail = common_tail(ours, path_parts(written))
        # The file b.csv may stand beside the folder b.
        shared = set(ours) & {*theirs, _stem(near)}
        words = _words(ours) & (_words(theirs) | self._splits_by_name(path, near))
        return folder in places, tail, len(shared), len(words)

    def _in_another_split(self, path: str, near: str) -> bool:
        ours = splits_in(self.parts(os.path.dirname(path)))
        theirs = splits_in(self.parts(os.path.dirname(near))) | self._splits_by_name(path, near)
        return bool(ours and theirs and not ours & theirs)

    @staticmethod
    def _splits_by_name(path: str, near: str) -> Set[str]:
        """Of an annotation file's own name, unless that is the image's."""
        return set() if _stem(path) == _stem(near) else splits_in((_stem(near),))

    def parts(self, path: str) -> Tuple[str, ...]:
        """The names on the way from the folder to a path below it, in lower case."""
        return path_parts(path[len(self.root) :])


def folded(name: str) -> str:
    """In lower case, and with accents as most systems write them: macOS takes them apart."""
    return unicodedata.normalize("NFC", name).lower()


def common_tail(a: Sequence[str], b: Sequence[str]) -> int:
    """How many names two paths have in common, from the last one on."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


@functools.lru_cache(maxsize=10_000)
def path_parts(path: str) -> Tuple[str, ...]:
    """The names of a path in lower case, without dots."""
    return tuple(x for x in folded(path).replace("\\", "/").split("/") if x not in ("", ".", ".."))


@functools.lru_cache(maxsize=10_000)
def splits_in(names: Tuple[str, ...]) -> Set[str]:
    """The splits that the words in names tell."""
    words = (word for name in names for word in re.findall("[a-z]+", name.lower()))
    return {SPLITS[word] for word in words if word in SPLITS}


def split_of(path: str) -> str:
    """The split that a file's name tells, such as instances_train.json; "" for none or several."""
    found = splits_in((os.path.basename(path),))
    return next(iter(found)) if len(found) == 1 else ""


@functools.lru_cache(maxsize=10_000)
def _words(names: Tuple[str, ...]) -> Set[str]:
    words = {word for name in names for word in re.findall(r"[^\W\d_]+|\d+", name)}
    return {SPLITS.get(word, word) for word in words}


@functools.lru_cache(maxsize=10_000)
def _stem(path: str) -> str:
    return folded(os.path.splitext(os.path.basename(path))[0])
