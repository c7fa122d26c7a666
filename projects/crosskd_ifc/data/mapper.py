"""Reads the samples of a data set: whatever is wrong with an image is one error that names it."""

from typing import Any, Callable, Dict, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..common.command_line import tool_command
from .files import IMAGE_FORMATS


class SampleError(ValueError):
    """An image, or what a data set says about it, can't be used; the message names the file.

    Raised where a data set is loaded, and where an image is read."""


class CheckedMapper:
    """A mapper whose every failure is a :class:`SampleError` that names the image.

    Attributes:
        mapper: the mapper inside.
    """

    def __init__(self, mapper: Callable[[Dict], Any], *, check_image: bool = False):
        """
        Args:
            mapper: a record in detectron2's format -> what the model gets.
            check_image: look at the image's header first, and refuse what detectron2's own mapper
                would read wrongly or decode without a limit.
        """
        self.mapper, self._check_image = mapper, check_image

    def __call__(self, record: Dict) -> Any:
        path = record.get("file_name")
        if self._check_image and path is not None:
            check_image(path)
        name = path if path is not None else f"image id {record.get('image_id')}"
        try:
            mapped = self.mapper(record)
        except SampleError:
            raise
        except Exception as error:  # decoders raise what they like on hostile bytes
            said = " ".join(str(error).split())
            raise SampleError(
                f"{name}: detectron2 can't use this image: {type(error).__name__}: {said}"
            ) from error
        if mapped is None:  # for which detectron2 would take another image at random
            raise SampleError(
                f"{name}: the mapper gives None; leave it out of the data set instead"
            )
        return mapped


def build_mapper(cfg: CfgNode, is_train: bool) -> CheckedMapper:
    """Returns detectron2's mapper of a config, checked."""
    return CheckedMapper(DatasetMapper(cfg, is_train), check_image=True)


def check_image(path: str) -> Tuple[int, int]:
    """(width, height) as detectron2 sees it, turned by its EXIF tag; errors as of
    :func:`read_header`."""
    return read_header(path)[0]


def read_header(path: str) -> Tuple[Tuple[int, int], int]:
    """Refuses an image that is missing, unreadable, over Pillow's limit against decompression bombs
    or of more than 8 bits (which detectron2 would clip at 255). Reads its header only.

    Returns:
        (width, height) as detectron2 sees it, turned by its EXIF tag, and what this says: 1 for
        upright, 2 to 8 for mirrored or turned.

    Raises:
        SampleError: naming the file and what to do.
    """
    advice = f"repair or remove it; {tool_command('prepare_data')} check lists all such files"
    if not PathManager.isfile(path):
        raise SampleError(f"{path}: the image is missing; {advice}")
    try:
        with PathManager.open(path, "rb") as f:
            with Image.open(f, formats=IMAGE_FORMATS) as image:
                mode, size = image.mode, image.size
                orientation = image.getexif().get(274)
    except UnidentifiedImageError:
        raise SampleError(f"{path}: not an image, or an empty file; {advice}") from None
    except Image.DecompressionBombError as error:
        raise SampleError(f"{path}: too large to be decoded safely ({error}); {advice}") from None
    except Exception as error:  # as above
        said = f"{type(error).__name__}: {error}"
        raise SampleError(f"{path}: unreadable image ({said}); {advice}") from error
    if mode.startswith(("I", "F")):
        raise SampleError(
            f"{path}: more than 8 bits per channel (Pillow's mode {mode}), which detectron2 would "
            "clip at 255; convert it to 8 bits"
        )
    orientation = orientation if orientation in range(2, 9) else 1
    return size[::-1] if orientation >= 5 else size, orientation
