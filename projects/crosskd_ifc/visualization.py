"""Pictures of a distillation: boxes side by side, and learning curves.

matplotlib and detectron2's visualizer are imported inside the functions: training needs neither.
"""

import colorsys
import json
import logging
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from .rcnn import CrossKDRCNN

logger = logging.getLogger(__name__)

COLUMNS = ("ground truth", "teacher", "cross-head", "student")


def predict_all(student: CrossKDRCNN, batched_inputs: List[dict]) -> Dict[str, List[Instances]]:
    """Detections of teacher, cross-head and student on the same images.

    Args:
        student: in evaluation mode, with a teacher attached.
        batched_inputs: raw images, as a test loader gives them.

    Returns:
        "teacher", "cross-head" and "student" -> one :class:`Instances` per image, on the CPU, in
        pixels of the images' "height" and "width".
    """
    swapped = student.teacher.swap_channels(batched_inputs)
    with torch.no_grad():
        results = {
            "teacher": student.teacher.model(swapped),
            "cross-head": student.cross_head_inference(batched_inputs),
            "student": student(batched_inputs),
        }
    return {k: [x["instances"].to("cpu") for x in v] for k, v in results.items()}


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[Tuple[float, float, float]],
    *,
    height: int = 320,
) -> np.ndarray:
    """An enlarged copy of an image with labelled boxes, drawn by detectron2's visualizer.

    Args:
        image: (H, W, 3) RGB uint8.
        boxes: (B, 4) xyxy in pixels of ``image``.
        labels: B texts.
        colors: B RGB colours in [0, 1].
        height: height of the result in pixels, so that labels stay readable on small images.

    Returns:
        (height, width, 3) RGB uint8.
    """
    import cv2
    from detectron2.utils.visualizer import Visualizer

    scale = height / image.shape[0]
    size = (round(image.shape[1] * scale), height)
    canvas = Visualizer(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC))
    canvas.overlay_instances(
        boxes=boxes * scale, labels=list(labels), assigned_colors=list(colors), alpha=0.9
    )
    return canvas.output.get_image()


def comparison_picture(
    rows: Sequence[Mapping[str, np.ndarray]],
    path: str,
    *,
    columns: Sequence[str] = COLUMNS,
    title: str = "",
) -> None:
    """Write a grid of pictures, one row per image and one titled column per model, as PNG.

    Args:
        rows: column name -> (H, W, 3) RGB uint8 picture.
        path: file to write.
        columns: the columns, from left to right.
        title: a line above the grid.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(3 * len(columns), 3.05 * len(rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for line, row in zip(axes, rows):
        for axis, column in zip(line, columns):
            axis.imshow(row[column])
            axis.set_axis_off()
    for axis, column in zip(axes[0], columns):
        axis.set_title(column, fontsize=13)
    if title:
        figure.suptitle(title, fontsize=13)
    _save(figure, path)


def compare_on_dataset(
    student: CrossKDRCNN,
    loader,
    ground_truth: Sequence[dict],
    class_names: Sequence[str],
    path: str,
    *,
    images: int = 4,
    threshold: float = 0.5,
) -> None:
    """Write ground truth | teacher | cross-head | student for some images of a test loader.

    The images are spread evenly over the data set, the same for every run.

    Args:
        student: with a teacher attached; it is put into evaluation mode.
        loader: detectron2's test loader for the data set.
        ground_truth: the data set's dicts, in the loader's order.
        class_names: names of the classes, of teacher and student.
        path: PNG to write.
        images: number of rows.
        threshold: detections below this score aren't drawn.
    """
    from detectron2.data.detection_utils import read_image
    from detectron2.structures import BoxMode

    student.eval()
    palette = _bright_colors(len(class_names))
    wanted = set(np.linspace(0, len(ground_truth) - 1, images + 2).round().astype(int)[1:-1])
    rows = []
    for index, (inputs, truth) in enumerate(zip(loader, ground_truth)):
        if index not in wanted:
            continue
        picture = read_image(truth["file_name"], "RGB")
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in truth["annotations"]
        ]
        found = {"ground truth": (boxes, [a["category_id"] for a in truth["annotations"]], None)}
        for name, instances in predict_all(student, inputs).items():
            kept = instances[0][instances[0].scores >= threshold]
            found[name] = (
                kept.pred_boxes.tensor.numpy(),
                kept.pred_classes.tolist(),
                kept.scores.tolist(),
            )
        rows.append(
            {name: _draw(picture, *result, class_names, palette) for name, result in found.items()}
        )
    comparison_picture(rows, path, title=f"Detections with a score of at least {threshold}")


def _draw(picture, boxes, classes, scores: Optional[List[float]], class_names, palette):
    labels = [class_names[c] for c in classes]
    if scores is not None:
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, scores)]
    colors = [palette[c % len(palette)] for c in classes]
    return draw_boxes(picture, np.asarray(boxes).reshape(-1, 4), labels, colors)


def read_metrics(path: str) -> List[dict]:
    """The lines of a run's ``metrics.json``; a line that is still being written is left out."""
    lines = []
    with PathManager.open(path) as f:
        for line in f:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                logger.debug(f"{path}: incomplete line left out")
    return lines


def plot_curves(
    runs: Mapping[str, str], path: str, *, metric: str = "bbox/AP", title: str = ""
) -> None:
    """Plot the learning curves and the distillation losses of several runs, as PNG.

    Args:
        runs: label -> ``metrics.json`` of the run. One without distillation losses appears in the
            learning curves only.
        path: file to write.
        metric: the evaluation metric.
        title: a line above the plots.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    panels = {
        metric: f"{metric.split('/')[-1]} on the test set",
        "loss_cls": "classification loss (ground truth)",
        "loss_cls_kd": "classification loss (distillation)",
        "loss_box_reg_kd": "box loss (distillation)",
    }
    for i, (label, file) in enumerate(runs.items()):
        lines = read_metrics(file)
        for axis, key in zip(axes, panels):
            points = [(line["iteration"], line[key]) for line in lines if key in line]
            if points:
                marker = "o" if key == metric else ""
                axis.plot(*zip(*points), marker=marker, label=label, color=f"C{i}")
    for axis, name in zip(axes, panels.values()):
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("iteration")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=9)
    if title:
        figure.suptitle(title)
    _save(figure, path)


def _bright_colors(count: int) -> List[Tuple[float, float, float]]:
    """Evenly spread hues, all light enough to read on a photo and on a label's black ground."""
    return [colorsys.hsv_to_rgb(i / count, 0.75, 1.0) for i in range(count)]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: str) -> None:
    with PathManager.open(path, "wb") as f:
        figure.savefig(f, format="png", dpi=100)
    _pyplot().close(figure)
