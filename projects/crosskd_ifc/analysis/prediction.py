"""Detections of images, videos and cameras: drawn, or as COCO results."""

import contextlib
import json
import logging
import os
import time
from collections import defaultdict
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..common.files import claim_output, file_identity, replacing
from ..config import ConfigError
from .detector import Detector
from .drawing import bright_colors, draw_boxes
from .inputs import Frame, Source, read_frames

logger = logging.getLogger(__name__)


class Done(NamedTuple):
    """What :func:`predict` did.

    Attributes:
        images: number of pictures, frames counted one by one.
        detections: of the student in the files written.
        seconds: in all.
        files: that were written.
        unreadable: sources that could not be read to their end.
    """

    images: int
    detections: int
    seconds: float
    files: List[str]
    unreadable: List[str]


def predict(
    detectors: Mapping[str, Detector],
    sources: Sequence[Source],
    *,
    folder: str = "",
    results: str = "",
    annotations: str = "",
    threshold: float = 0.5,
    frames: int = 0,
    force: bool = False,
) -> Done:
    """Detect in all sources, one picture at a time, and write what was found.

    A source that can't be read is told in the log and left out. Ctrl-C ends it well: what was
    found so far is written.

    Args:
        detectors: title -> detector, drawn side by side in this order; the last one's detections
            are the results.
        sources: from :func:`find_sources`.
        folder: for pictures, named and nested as the inputs; a video makes an .mp4. "":
            none.
        results: JSON file for the detections as COCO results, all that the model gives. "": none.
        annotations: COCO JSON file whose image ids (by file name) and category ids (by name) the
            results take. Without it both are counted from 1; each result also names its file.
        threshold: lowest score that is drawn.
        frames: the most of each video or camera; 0: all of them.
        force: replace existing files.

    Raises:
        ConfigError: before anything is detected, for outputs that exist and for annotations that
            don't fit the images or classes; for two inputs that would be written to one file.
        OSError: for a disk that can't be written to.
    """
    last = list(detectors.values())[-1]
    outputs = {source: _output(source, folder) for source in sources} if folder else {}
    _refuse_same({source.path: path for source, path in outputs.items()})
    inputs = [*(source.path for source in sources), annotations]
    inputs += [d.cfg.MODEL.WEIGHTS for d in detectors.values()]
    read = {file_identity(path) for path in inputs} - {None}
    for out, option in [*((x, "--output") for x in outputs.values()), (results, "--json")]:
        if out:
            same = [out] if file_identity(out) in read else []
            claim_output(out, sources=same, force=force, option=option)
    ids = CocoIds(last.class_names, annotations, sources if results else ())
    draw = _Drawing(detectors, threshold)
    entries: List[dict] = []
    start, images, drawn, unreadable = time.perf_counter(), 0, 0, []
    files: List[str] = []
    is_over = False
    try:
        for source in tqdm(sources, unit="input", disable=None):
            try:
                with _writer(outputs.get(source), files) as write:
                    for frame in read_frames(source, frames):
                        found = {name: d.detect(frame.image) for name, d in detectors.items()}
                        ours = list(found.values())[-1]
                        images += 1
                        drawn += int((ours.scores >= threshold).sum())
                        if results:
                            entries += ids.entries(ours, frame)
                        if write is not None:
                            write(draw(frame.image, found), frame.fps)
            except OSError as error:
                if error.errno:  # not of the input, but of the disk that is written to
                    raise
                told = str(error)
                logger.warning(told if source.path in told else f"{source.path}: {told}")
                unreadable.append(source.path)
        is_over = True
    except KeyboardInterrupt:
        is_over = True
    finally:  # also of an error of the model, such as a full GPU
        if results and (is_over or entries):
            with replacing(results) as f:
                f.write(json.dumps(entries).encode())
            files.append(results)
    seconds = time.perf_counter() - start
    return Done(images, len(entries) if results else drawn, seconds, files, unreadable)


class CocoIds:
    """The image and category ids of COCO results."""

    def __init__(self, class_names: Sequence[str], annotations: str, sources: Sequence[Source]):
        """
        Args:
            class_names: of the model.
            annotations: COCO JSON file; "" counts both from 1.
            sources: that will be asked for.

        Raises:
            ConfigError: if the annotations can't be read, or lack a class or an image.
        """
        self._names, self._images = list(class_names), {}
        self._categories = {name: i + 1 for i, name in enumerate(self._names)}
        self._next = 1
        self._listed = bool(annotations)
        self._last: Dict[str, List[str]] = defaultdict(list)
        if not annotations:
            return
        try:
            with PathManager.open(annotations) as f:
                content = json.load(f)
            self._categories = {c["name"]: c["id"] for c in content["categories"]}
            self._images = {image["file_name"]: image["id"] for image in content["images"]}
            for name in self._images:
                self._last[os.path.basename(name)].append(name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ConfigError(f"--annotations {annotations}: not COCO's JSON ({reason})") from None
        for name in self._names:
            if name not in self._categories:
                raise ConfigError(
                    f"--annotations {annotations}: no category is called {name!r}, as the model's "
                    f"class is; there are {', '.join(self._categories)}"
                )
        names: Dict[int, str] = {}
        for source in sources:
            number = self._listed_id(source)
            if number is None:
                listed = next(iter(self._images), "none")
                raise ConfigError(
                    f"--annotations {annotations}: no image is called {source.name}; the first one "
                    f"is {listed}"
                )
            other = names.setdefault(number, source.name)
            if other != source.name:
                raise ConfigError(
                    f"--annotations {annotations}: {other} and {source.name} can't both be its "
                    f"{os.path.basename(source.name)}"
                )

    def entries(self, found: Instances, frame: Frame) -> List[Dict[str, Any]]:
        """The results of one picture, with "file_name" and "category" besides COCO's fields."""
        if self._listed:
            image_id = self._listed_id(frame.source)
        else:
            image_id, self._next = self._next, self._next + 1
        results = instances_to_coco_json(found, image_id)
        for one in results:
            name = self._names[one["category_id"]]
            one.update(category_id=self._categories[name], category=name)
            one["file_name"] = frame.source.name
        return results

    def _listed_id(self, source: Source) -> Optional[int]:
        # It may be listed from a folder above the one that was given.
        paths = os.path.abspath(source.path), os.path.realpath(source.path)
        longest = [name for path in paths for name in self._ends_of(path)[:1]]
        for name in (*longest, source.name, os.path.basename(source.name)):
            if name in self._images:
                return self._images[name]
        return None

    def _ends_of(self, path: str) -> List[str]:
        """The listed names that a path ends with, the longest first."""
        named = self._last[os.path.basename(path)]
        ends = [name for name in named if f"{os.sep}{path}".endswith(f"{os.sep}{name}")]
        return sorted(ends, key=len, reverse=True)


class _Drawing:
    """Draws the detections of one or two detectors, side by side under their titles."""

    def __init__(self, detectors: Mapping[str, Detector], threshold: float):
        names = dict.fromkeys(name for d in detectors.values() for name in d.class_names)
        self._palette = dict(zip(names, bright_colors(len(names))))
        self._detectors, self._threshold = detectors, threshold

    def __call__(self, image: np.ndarray, found: Mapping[str, Instances]) -> np.ndarray:
        """
        Args:
            image: (H, W, 3) BGR.
            found: title -> detections.

        Returns:
            (H', W', 3) BGR, no smaller than the image.
        """
        pictures = []
        for title, instances in found.items():
            chosen = instances[instances.scores >= self._threshold]
            names = [self._detectors[title].class_names[c] for c in chosen.pred_classes.tolist()]
            scores = chosen.scores.tolist()
            picture = draw_boxes(
                np.ascontiguousarray(image[:, :, ::-1]),
                chosen.pred_boxes.tensor.numpy(),
                [f"{name} {score:.0%}" for name, score in zip(names, scores)],
                [self._palette[name] for name in names],
                masks=chosen.pred_masks.numpy() if chosen.has("pred_masks") else None,
                height=max(image.shape[0], 320),
            )
            if len(found) > 1:
                strip = np.full((28, picture.shape[1], 3), 255, np.uint8)
                cv2.putText(strip, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1)
                picture = np.vstack([strip, picture])
            pictures.append(picture)
        # Codecs want even sizes.
        together = np.hstack(pictures)[:, :, ::-1]
        height, width = (length + length % 2 for length in together.shape[:2])
        edges = (height - together.shape[0], width - together.shape[1])
        return np.pad(together, ((0, edges[0]), (0, edges[1]), (0, 0)), mode="edge")


def _output(source: Source, folder: str) -> str:
    stem, extension = os.path.splitext(source.name)
    if not source.is_image:
        return os.path.join(folder, f"{stem}.mp4")
    keeps = extension.lower() in (".jpg", ".jpeg", ".png")
    return os.path.join(folder, source.name if keeps else f"{source.name}.png")


def _refuse_same(outputs: Mapping[str, str]) -> None:
    """Refuse two inputs with one output; input -> output."""
    inputs: Dict[str, str] = {}
    for path, output in outputs.items():
        other = inputs.setdefault(output, path)
        if other != path:
            raise ConfigError(
                f"{other} and {path} would be written to the same file; take one at a time"
            )


@contextlib.contextmanager
def _writer(path: Optional[str], written: List[str]) -> Iterator[Any]:
    """Gives ``write(picture, fps)`` for one file, an image or a video, and notes it in ``written``;
    None without a path."""
    if path is None:
        yield None
        return
    if not path.endswith(".mp4"):

        def write_image(picture: np.ndarray, _: float) -> None:
            is_good, encoded = cv2.imencode(os.path.splitext(path)[1], picture)
            if not is_good:
                raise OSError(f"{path} can't be written")
            with replacing(path) as f:
                f.write(encoded.tobytes())
            written.append(path)

        yield write_image
        return
    videos: List[Tuple[Any, Tuple[int, int]]] = []

    def write_frame(picture: np.ndarray, fps: float) -> None:
        size = picture.shape[1], picture.shape[0]
        if not videos:
            video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
            if not video.isOpened():
                raise OSError(f"{path} can't be written as a video")
            videos.append((video, size))
            written.append(path)
        videos[0][0].write(np.ascontiguousarray(picture))

    try:
        yield write_frame
    finally:
        for video, _ in videos:
            video.release()
