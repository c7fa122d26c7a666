"""The images of a test set on which a student errs most."""

from typing import List, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.structures import Instances, pairwise_iou
from torch import nn

from .detections import as_instances, predict_all

_SAME = 0.5  # overlap from which a box counts as found


class Errors(NamedTuple):
    """Those of a detector on one image.

    Attributes:
        missed: objects that it hasn't found.
        false: detections of no object.
        right: detections of an object, one for each.
    """

    missed: int
    false: int
    right: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing to find and nothing was
        found."""
        total = 2 * self.right + self.missed + self.false
        return 2 * self.right / total if total else 1.0


def count_errors(found: Instances, truth: Instances) -> Errors:
    """Detections and objects paired one to one, of the same class and with an overlap (IoU) of at
    least 0.5; the most confident detection chooses first.

    Args:
        found: with ``pred_boxes``, ``pred_classes`` and ``scores``.
        truth: with ``pred_boxes`` and ``pred_classes``.
    """
    overlaps = pairwise_iou(found.pred_boxes, truth.pred_boxes)
    same = found.pred_classes[:, None] == truth.pred_classes[None]
    overlaps = torch.where(same, overlaps, torch.zeros_like(overlaps)).numpy()
    right = 0
    for i in np.argsort(-found.scores.numpy(), kind="stable"):
        if overlaps.shape[1] and overlaps[i].max() >= _SAME:
            overlaps[:, overlaps[i].argmax()] = 0  # each object is found once
            right += 1
    return Errors(len(truth) - right, len(found) - right, right)


def rank_images(
    student: nn.Module,
    inputs: Sequence[dict],
    annotations: Sequence[List[dict]],
    *,
    threshold: float = 0.5,
) -> List[int]:
    """The indices of the images, the one with the lowest F1 of the student first; of equal ones
    that with more errors.

    Args:
        student: in evaluation mode.
        inputs: as a test loader gives them.
        annotations: for each image those of its data set.
        threshold: detections below this score don't count.
    """
    found = []
    for one, truth in zip(inputs, annotations):
        instances = predict_all(student, [one])["student"][0]
        found.append(errors_of(instances, truth, threshold))
    return sorted(range(len(found)), key=lambda i: (found[i].f1, -found[i].missed - found[i].false))


def errors_of(instances: Instances, annotations: List[dict], threshold: float) -> Errors:
    """:func:`count_errors` of the detections with a score of at least ``threshold``."""
    truth = as_instances(annotations, instances.image_size)
    return count_errors(instances[instances.scores >= threshold], truth)
