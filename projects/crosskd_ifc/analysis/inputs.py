"""What a user wants detections of: image files, folders of them, videos, cameras."""

import logging
import os
from typing import Dict, Iterator, List, NamedTuple, Sequence

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image

from ..common.errors import one_line
from ..common.paths import is_seen_anyway
from ..config import ConfigError
from ..data.mapper import check_image

logger = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_CAMERA = "camera:"


class Source(NamedTuple):
    """An image, a video or a camera.

    Attributes:
        path: the file, or ``camera:N``.
        name: what is written for it, relative to the output folder.
        is_image: whether it is a single picture.
    """

    path: str
    name: str
    is_image: bool


class Frame(NamedTuple):
    """One picture.

    Attributes:
        image: (H, W, 3) uint8 BGR.
        source: where it is from.
        fps: pictures per second of the source, 0 for an image file.
    """

    image: np.ndarray
    source: Source
    fps: float


def find_sources(words: Sequence[str], *, excluded: str = "") -> List[Source]:
    """What the words of a command line name, folders searched through.

    Args:
        words: image files, videos, folders, ``camera:0``, ``camera:1``, ...
        excluded: a folder that is left out: the one that is written to.

    Raises:
        ConfigError: for what doesn't exist, a file of another kind, a folder without any, and for
            two inputs of one name.
    """
    found: List[Source] = []
    for word in words:
        if word.startswith(_CAMERA):
            if not word[len(_CAMERA) :].isdigit():
                raise ConfigError(f"{word}: a camera is named camera:0, camera:1, ...")
            found.append(Source(word, word.replace(":", ""), False))
        elif os.path.isdir(word):
            inside = sorted(_walk(word, os.path.abspath(excluded) if excluded else ""))
            if not inside:
                raise ConfigError(f"{word}: there is no image or video in this folder")
            found += inside
        elif not os.path.exists(word):
            raise ConfigError(f"{word}: no such file or folder")
        elif not word.lower().endswith(IMAGES + VIDEOS):
            raise ConfigError(f"{word}: not one of {', '.join(IMAGES + VIDEOS)}")
        else:
            found.append(_source(word, os.path.dirname(word)))
    names: Dict[str, Source] = {}
    for source in found:
        other = names.setdefault(source.name, source)
        if os.path.realpath(other.path) != os.path.realpath(source.path):
            raise ConfigError(
                f"{other.path} and {source.path} have the same name, {source.name}, in what is "
                "written; take one at a time, or the folder that holds both"
            )
    return list(names.values())


def _walk(folder: str, excluded: str) -> Iterator[Source]:
    root, linked = os.path.realpath(folder), set()

    def is_new(path: str) -> bool:
        is_output = os.path.realpath(path) == os.path.realpath(excluded)
        return not is_output and not is_seen_anyway(path, root, linked)

    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if is_new(os.path.join(parent, name))]
        for name in files:
            # macOS puts ._a.jpg beside a.jpg on other systems' disks.
            if name.lower().endswith(IMAGES + VIDEOS) and not name.startswith("._"):
                yield _source(os.path.join(parent, name), folder)


def _source(path: str, folder: str) -> Source:
    name = os.path.relpath(path, folder or ".")
    return Source(path, name, path.lower().endswith(IMAGES))


def read_frames(source: Source, limit: int = 0) -> Iterator[Frame]:
    """The pictures of a source, one after the other.

    Args:
        source: what to read.
        limit: of frames of a video or camera; 0: all of a video, a camera's until Ctrl-C.

    Raises:
        OSError: if it can't be read.
    """
    if source.is_image:
        yield Frame(_read_image(source.path), source, 0.0)
        return
    is_camera = source.path.startswith(_CAMERA)
    number = int(source.path[len(_CAMERA) :]) if is_camera else None
    capture = cv2.VideoCapture(source.path if number is None else number)
    try:
        if not capture.isOpened():
            raise OSError(f"{source.path} can't be opened")
        fps, count = capture.get(cv2.CAP_PROP_FPS) or 25.0, 0
        while not limit or count < limit:
            is_good, image = capture.read()
            if not is_good:
                break
            count += 1
            yield Frame(image, source, fps)
        if not count:
            raise OSError(f"{source.path} gives no picture")
        told = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # nearly right, or 0 or less if unknown
        if count < 0.9 * told and count != limit and not is_camera:
            logger.warning(
                f"{source.path}: only {count} of its {told} pictures could be read; it may be "
                "damaged"
            )
    finally:
        capture.release()


def _read_image(path: str) -> np.ndarray:
    try:
        check_image(path)  # as in training
        return read_image(path, "BGR")  # turned as its EXIF data say
    except Exception as error:  # image readers raise what they like
        raise OSError(f"{path} can't be read: {one_line(error)}") from error
