"""Cautious readers of the files of a data set: cards, VOC lists, annotations, images.

Files are taken as untrusted. Whatever is wrong with one is a single ValueError that names it.
"""

import hashlib
import io
import json
import os
import re
import warnings
from reprlib import repr as short
from typing import Any, Dict, List, NamedTuple, Optional, Tuple
from xml.etree import ElementTree

from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..common.safe_yaml import load_yaml
from .near_duplicates import is_available, perceptual_hash

# What photos come in. Pillow knows more, and starts Ghostscript for EPS, whatever a file's name is.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, *_):
        # Called before any entity of the document type is read.
        raise ValueError("<!DOCTYPE> is not allowed in an annotation")


def read_text(path: str, *, drop_bom: bool = False) -> str:
    """Returns the content of a UTF-8 file.

    Args:
        drop_bom: without the mark that Windows' editors begin it with. Detectron2 keeps it.
    """
    if not PathManager.isfile(path):  # a folder, or a device that never ends
        raise ValueError(f"{path}: {'not a file' if PathManager.exists(path) else 'no such file'}")
    try:
        with PathManager.open(path, "rb") as f:
            return f.read().decode("utf-8-sig" if drop_bom else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


def read_yaml(path: str) -> Any:
    """Returns the content of a YAML file of plain values, without a key that is there twice."""
    text = read_text(path)
    try:
        return load_yaml(text)
    except Exception as error:  # PyYAML raises what it likes on wrong tags
        raise ValueError(f"{path}: not valid YAML: {error}") from error


def voc_list_path(root: str, split: str) -> str:
    return f"{root}/ImageSets/Main/{split}.txt"


def read_voc_lines(root: str, split: str) -> Tuple[str, List[str]]:
    """Returns the path of ``root``/ImageSets/Main/``split``.txt, and its lines."""
    path = voc_list_path(root, split)
    # Only these end a line of a file: str.splitlines knows more, which are blanks to numpy.
    lines = re.split("\r\n|\r|\n", read_text(path))
    return path, lines if lines[-1] else lines[:-1]


def read_voc_split(root: str, split: str) -> List[str]:
    """Returns the image ids in ``root``/ImageSets/Main/``split``.txt.

    Raises:
        ValueError: also for content that detectron2's VOC reader couldn't read.
    """
    path, lines = read_voc_lines(root, split)
    ids = [line.strip() for line in lines if line.strip()]
    for line in ids:
        # numpy.loadtxt, which detectron2 uses, splits at blanks and takes # for a comment.
        if len(line.split()) > 1 or "#" in line:
            raise ValueError(f"{path}: expected one image id per line, found {line[:80]!r}")
    if len(ids) < 2:
        raise ValueError(f"{path}: {len(ids)} images; detectron2's VOC reader needs at least 2")
    return ids


def voc_files(root: str, split: str) -> List[str]:
    """Returns the path of a VOC split's list, and those of its annotations."""
    names = [f"{image_id}.xml" for image_id in read_voc_split(root, split)]
    paths = (os.path.join(root, "Annotations", name) for name in names)
    return [voc_list_path(root, split), *paths]


def parse_xml(path: str) -> ElementTree.Element:
    """Returns the root of an XML file. Document types, and with them all entities, are refused."""
    text = read_text(path)
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        # Bytes, as detectron2: from a str the encoding that the file declares would be ignored.
        parser.feed(text.encode())
        return parser.close()
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: no such encoding
        raise ValueError(f"{path}: not valid XML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_voc_annotation(
    path: str,
) -> Tuple[Tuple[int, int], List[Tuple[str, List[float], ElementTree.Element]]]:
    """Reads a VOC annotation file. Document types, and with them all entities, are refused.

    Returns:
        (width, height), and for each object its class name, the box (xmin, ymin, xmax, ymax) as it
        stands in the file (any floats, also nan), and its XML element.

    Raises:
        ValueError: also for content that detectron2's VOC reader couldn't read.
    """
    tree = parse_xml(path)

    def get(element, tag, convert, where=""):
        found = element.find(tag)
        content = None if found is None else found.text
        try:
            return convert(content)
        except (TypeError, ValueError):
            fault = f"is {content[:40]!r}" if content else "is missing or empty"
            raise ValueError(f"{path}: <{tag.replace('/', '><')}> {fault}{where}") from None

    def name(content):
        if not content:
            raise ValueError
        return content

    size = get(tree, "size/width", int), get(tree, "size/height", int)
    objects = []
    for number, element in enumerate(tree.findall("object"), 1):
        where = f" in object {number}"
        box = [get(element, f"bndbox/{k}", float, where) for k in ("xmin", "ymin", "xmax", "ymax")]
        objects.append((get(element, "name", name, where), box, element))
    return size, objects


def read_json(path: str, *, drop_bom: bool = False) -> Any:
    """Returns the content of a JSON file; see :func:`read_text`."""
    text = read_text(path, drop_bom=drop_bom)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def read_coco_json(path: str, *, drop_bom: bool = False) -> Dict[str, Any]:
    """Returns the content of a COCO json file, which may lack annotations, as in test sets.

    Raises:
        ValueError: also if images, categories or annotations aren't lists (of anything).
    """
    content = read_json(path, drop_bom=drop_bom)
    for key in ("images", "categories", "annotations"):
        default = [] if key == "annotations" else None
        if not isinstance(content, dict) or not isinstance(content.get(key, default), list):
            raise ValueError(f"{path}: no COCO annotations, it has no list {key!r}")
    return content


class ImageFacts(NamedTuple):
    """What `inspect_image` finds out.

    Attributes:
        size: (width, height) after the EXIF orientation, as detectron2 sees it; None if unknown.
        stored_size: the same before turning.
        digest: equal for files of equal content; None if the file can't be opened.
        hash: of `perceptual_hash`; None if it can't be decoded, or the package is missing.
        faults: pairs of a kind from `findings.KINDS` and a detail, which may be "".
    """

    size: Optional[Tuple[int, int]]
    stored_size: Optional[Tuple[int, int]]
    digest: Optional[str]
    faults: List[Tuple[str, str]]
    hash: Optional[Any] = None


def inspect_image(path: str) -> ImageFacts:
    """Decodes an image in full, within Pillow's limit against decompression bombs; never raises."""
    faults: List[Tuple[str, str]] = []
    if not PathManager.isfile(path):
        stem = os.path.splitext(path)[0]
        near = [e for e in (".jpg", ".JPG", ".jpeg", ".png") if PathManager.isfile(stem + e)]
        detail = f"there is {os.path.basename(stem)}{near[0]}" if near else ""
        return ImageFacts(None, None, None, [("missing image", detail)])
    try:
        with PathManager.open(path, "rb") as f:
            data = f.read()
    except OSError as error:
        return ImageFacts(None, None, None, [("unreadable image", error.strerror or str(error))])
    digest = hashlib.sha1(data).hexdigest()
    size = stored = bits = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                image.load()  # first: some formats hold their EXIF data behind the pixels
                size = stored = image.size
                orientation = _orientation(image, faults)
                if orientation >= 5:
                    size = stored[::-1]
                if image.mode.startswith(("I", "F")):
                    faults.append(("more than 8 bits", f"mode {image.mode}"))
                elif is_available():
                    bits = perceptual_hash(image)
        except Image.DecompressionBombError as error:
            faults.append(("image too large", str(error).split(",")[0]))
        except UnidentifiedImageError:
            faults.append(("unreadable image", "not an image" if data else "the file is empty"))
        except OSError as error:
            kind = "truncated image" if "truncated" in str(error) else "unreadable image"
            faults.append((kind, str(error)))
        except Exception as error:  # Pillow's decoders raise what they like on hostile bytes
            faults.append(("unreadable image", f"{type(error).__name__}: {error}"))
    large = [w for w in caught if issubclass(w.category, Image.DecompressionBombWarning)]
    faults += [("large image", str(w.message).split(",")[0]) for w in large[:1]]
    if any("exif" in str(warning.message).lower() for warning in caught):
        faults.append(("bad EXIF", "corrupt"))
    return ImageFacts(size, stored, digest, faults, bits)


def _orientation(image, faults: List[Tuple[str, str]]) -> int:
    """Returns the EXIF orientation that detectron2 applies: 2 to 8, or 1 for none."""
    raw = image.info.get("exif", b"")
    body = raw[6:] if raw[:6] == b"Exif\0\0" else raw
    try:
        value = image.getexif().get(274)
    except Exception as error:
        faults.append(("bad EXIF", f"{type(error).__name__}: {error}"))
        return 1
    if body and body[:4] not in (b"II*\0", b"MM\0*"):
        faults.append(("bad EXIF", "no TIFF header"))  # Pillow is silent about it
    if value is not None and value not in range(1, 9):
        faults.append(("bad EXIF", f"orientation {short(value)}, expected 1 to 8"))
    if value not in range(2, 9):
        return 1
    faults.append(("EXIF orientation", f"orientation {value}"))
    return value
