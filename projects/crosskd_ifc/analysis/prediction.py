"""Detections of images, videos and cameras: drawn, or as COCO results."""

import contextlib
import json
import logging
import os
import time
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
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
        results: JSON file for the detections as COCO results, all that the model gives; image and
            category ids count from 1, and each names its file and class. "": none.
        threshold: lowest score that is drawn.
        frames: the most of each video or camera; 0: all of them.
        force: replace existing files.

    Raises:
        ConfigError: before anything is detected, for outputs that exist and for two inputs that
            would be written to one file.
        OSError: for a disk that can't be written to.
    """
    last = list(detectors.values())[-1]
    outputs = {source: _output(source, folder) for source in sources} if folder else {}
    _refuse_same({source.path: path for source, path in outputs.items()})
    inputs = [source.path for source in sources]
    inputs += [d.cfg.MODEL.WEIGHTS for d in detectors.values()]
    read = {file_identity(path) for path in inputs} - {None}
    for out, option in [*((x, "--output") for x in outputs.values()), (results, "--json")]:
        if out:
            same = [out] if file_identity(out) in read else []
            claim_output(out, sources=same, force=force, option=option)
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
                            entries += _coco_results(ours, frame, images, last.class_names)
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


def _coco_results(
    found: Instances, frame: Frame, image_id: int, names: Sequence[str]
) -> List[Dict[str, Any]]:
    """The results of one picture, with "file_name" and "category" besides COCO's fields."""
    results = instances_to_coco_json(found, image_id)
    for one in results:
        one["category"] = names[one["category_id"]]
        one["category_id"] += 1
        one["file_name"] = frame.source.name
    return results


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
