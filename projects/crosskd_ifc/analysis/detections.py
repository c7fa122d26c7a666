"""Pictures of a distillation: boxes of student, cross-head and teacher side by side."""

import logging
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import Instances

from ..common.plotting import literal, pyplot, save_figure
from ..modeling.rcnn import CrossKDRCNN
from .drawing import bright_colors, draw_boxes

logger = logging.getLogger(__name__)

COLUMNS = ("ground truth", "teacher", "cross-head", "student")


def predict_all(student: CrossKDRCNN, batched_inputs: List[dict]) -> Dict[str, List[Instances]]:
    """Detections of teacher, cross-head and student on the same images.

    Args:
        student: in evaluation mode; without a teacher attached, only it detects.
        batched_inputs: raw images, as a test loader gives them.

    Returns:
        "teacher", "cross-head" (only with ``MIMIC`` "cross_head") and "student" -> one
        :class:`Instances` per image, on the CPU, in pixels of the images' "height" and "width".
    """
    teacher, results = getattr(student, "teacher", None), {}
    with torch.no_grad():
        if teacher is not None:
            results["teacher"] = teacher.detect(batched_inputs)
            if student.has_cross_head:
                results["cross-head"] = student.cross_head_inference(batched_inputs)
        results["student"] = student(batched_inputs)
    return {k: [x["instances"].to("cpu") for x in v] for k, v in results.items()}


def comparison_picture(
    rows: Sequence[Mapping[str, np.ndarray]],
    path: str,
    *,
    columns: Sequence[str] = COLUMNS,
    title: str = "",
) -> None:
    """Write a grid of pictures, one row per image and one titled column per model, as PNG.

    Args:
        rows: column name -> (H, W, 3) RGB uint8 picture, equal sizes within a row.
        path: file to write.
        columns: the columns, from left to right.
        title: a line above the grid.
    """
    plt = pyplot()
    shapes = [row[columns[0]].shape for row in rows]
    width = 3 / 320 * max(shape[1] for shape in shapes)  # of a column, in inches
    ratios = [shape[0] / shape[1] for shape in shapes]
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(width * len(columns), (width + 0.05) * sum(ratios) + 0.5),
        height_ratios=ratios,
        squeeze=False,
        layout="constrained",
    )
    for line, row in zip(axes, rows):
        for axis, column in zip(line, columns):
            axis.imshow(row[column])
            axis.set_axis_off()
    for axis, column in zip(axes[0], columns):
        axis.set_title(literal(column), fontsize=13)
    if title:
        figure.suptitle(literal(title), fontsize=13)
    save_figure(figure, path)


def compare_detections(
    student: CrossKDRCNN,
    inputs: Sequence[dict],
    class_names: Mapping[str, Sequence[str]],
    path: str,
    *,
    annotations: Optional[Sequence[List[dict]]] = None,
    threshold: float = 0.5,
) -> None:
    """Write ground truth | teacher | cross-head | student for some images, with masks where there
    are any.

    Args:
        student: with a teacher attached; it is put into evaluation mode.
        inputs: the images, as detectron2's test mapper gives them, "file_name" included.
        class_names: column of ``COLUMNS`` -> names of its classes. Classes of equal names are drawn
            in equal colours.
        path: PNG to write.
        annotations: for each image those of its data set; None leaves the column out, as does a
            student without a cross-head.
        threshold: detections below this score aren't drawn.
    """
    student.eval()
    rows, best = [], {}
    for i, one in enumerate(inputs):
        found = {name: instances[0] for name, instances in predict_all(student, [one]).items()}
        for name, instances in found.items():
            best[name] = max([best.get(name, 0.0), *instances.scores.tolist()])
        truth = None if annotations is None else annotations[i]
        rows.append(draw_row(one["file_name"], found, class_names, truth, threshold=threshold))
    columns = [column for column in COLUMNS if column in rows[0]]
    title = f"Detections with a score of at least {threshold:g}"
    for name in (column for column in columns if best.get(column, 1.0) < threshold):
        logger.warning(
            f"{name}: no detection reaches {threshold:g}, the highest score is {best[name]:.3f}; "
            "lower the threshold to see more"
        )
    comparison_picture(rows, path, columns=columns, title=title)


def draw_row(
    file_name: str,
    found: Mapping[str, Instances],
    class_names: Mapping[str, Sequence[str]],
    annotations: Optional[List[dict]] = None,
    *,
    threshold: float = 0.5,
) -> Dict[str, np.ndarray]:
    """The same image once for each column.

    Args:
        file_name: the image.
        found: column of ``COLUMNS`` -> detections, in pixels of the image.
        class_names: column -> names of its classes.
        annotations: those of its data set; None leaves the ground truth out.
        threshold: detections below this score aren't drawn.

    Returns:
        Column, in the order of ``COLUMNS`` -> (H, W, 3) RGB uint8, all of the same size.
    """
    names = list(dict.fromkeys(name for column in class_names.values() for name in column))
    palette = dict(zip(names, bright_colors(len(names))))
    picture = read_image(file_name, "RGB")
    shown = {name: x[x.scores >= threshold] for name, x in found.items()}
    if annotations is not None:
        with_masks = shown["student"].has("pred_masks")
        shown["ground truth"] = as_instances(annotations, picture.shape[:2], with_masks)
    return {
        column: _draw(picture, shown[column], class_names[column], palette)
        for column in COLUMNS
        if column in shown
    }


def spread_evenly(count: int, total: int) -> List[int]:
    """``count`` indices, or all if there are fewer, spread evenly over ``range(total)``."""
    if count + 2 > total:  # no room to stay away from both ends
        return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
    return np.linspace(0, total - 1, count + 2).round().astype(int)[1:-1].tolist()


def as_instances(
    annotations: List[dict], size: Tuple[int, int], with_masks: bool = False
) -> Instances:
    """Annotations in the fields of detections; crowds are left out, as detectron2's mapper does."""
    with_masks = with_masks and all("segmentation" in a for a in annotations)
    keys = ("bbox", "bbox_mode", "category_id", *(("segmentation",) if with_masks else ()))
    single = [{k: a[k] for k in keys} for a in annotations if not a.get("iscrowd", 0)]
    truth = annotations_to_instances(single, size, mask_format="bitmask")
    instances = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    if truth.has("gt_masks"):
        instances.pred_masks = truth.gt_masks.tensor
    return instances


def _draw(picture: np.ndarray, instances: Instances, class_names, palette) -> np.ndarray:
    names = [class_names[c] for c in instances.pred_classes.tolist()]
    labels = names
    if instances.has("scores"):
        labels = [f"{name} {score:.0%}" for name, score in zip(names, instances.scores.tolist())]
    height, width = picture.shape[:2]
    return draw_boxes(
        picture,
        instances.pred_boxes.tensor.numpy(),
        labels,
        [palette[name] for name in names],
        masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        # Small pictures are enlarged and big ones reduced, both to a readable column.
        height=round(height / width * min(max(width, 320), 480)),
    )
