"""What distillation of a box head compares with the teacher's predictions: those of the cross-head,
and the student's own.

Shape shorthand: R RoIs over all images, K the teacher's foreground classes (background is column
K).
"""

import dataclasses
from typing import List, Mapping, Optional

import torch

from ..compatibility.class_map import ClassMap
from ..fusion import FeatureFusion
from ..head_layers import BoxStage
from ..traces import BoxTrace


@dataclasses.dataclass
class BoxPredictions:
    """Class logits (R, K + 1) and box deltas (R, 4K) or (R, 4)."""

    logits: torch.Tensor
    deltas: torch.Tensor


@dataclasses.dataclass
class Term(BoxPredictions):
    """Predictions that are compared with the teacher's; of a cross-head also the feature that they
    come from, shaped as the teacher's at the entry layer.

    Attributes:
        name: "combined" or a tap; "" for the student's own.
        weight: of its losses.
    """

    name: str = ""
    weight: float = 1.0
    feature: Optional[torch.Tensor] = None


class CrossHead:
    """Cross-head predictions: the student's combined taps, or taps by themselves, through the
    teacher's remaining layers and predictor.

    The gradient flows through the frozen layers into the taps and adapters. All predictions are in
    the teacher's classes.
    """

    def __init__(self, teacher: BoxStage, fusion: FeatureFusion):
        self.fusion = fusion
        self._stage, self._layers, self.predictor = teacher, teacher.layers, teacher.predictor

    def predict(self, trace: BoxTrace, teacher: Mapping[str, torch.Tensor]) -> BoxPredictions:
        """From the combined feature.

        Args:
            trace: of the student's box head.
            teacher: layer name -> output of the teacher's box head on the same RoIs.
        """
        entry = self.fusion.entry
        fused = self.fusion(trace.layers, teacher[entry], self._layers.run)
        return BoxPredictions(*self._stage.predict(self._layers.run(fused, after=entry)))

    def terms(self, trace: BoxTrace, teacher: Mapping[str, torch.Tensor]) -> List[Term]:
        """What is compared with the teacher; arguments as of :meth:`predict`.

        All go through the teacher's remaining layers as one batch of rows.
        """
        entry, weights = self.fusion.entry, self.fusion.terms
        features = self.fusion.features(trace.layers, teacher[entry], self._layers.run)
        rows = torch.cat(features) if len(features) > 1 else features[0]
        predictions = self._stage.predict(self._layers.run(rows, after=entry))
        parts = (x.split(len(features[0])) if len(features) > 1 else [x] for x in predictions)
        return [
            Term(logits, deltas, name, weights[name], feature)
            for name, feature, logits, deltas in zip(weights, features, *parts)
        ]

    def targets(self, predictions: BoxPredictions) -> BoxPredictions:
        """What the predictions are compared with: the teacher's own."""
        return predictions


class StudentHead:
    """The student's own predictions, compared class by class (prediction mimicking)."""

    fusion = None

    def __init__(self, student: BoxStage, teacher: BoxStage, class_map: ClassMap):
        self._class_map, self.predictor = class_map, student.predictor
        # Deltas are offsets times these weights: the teacher's in the student's encoding.
        ours, theirs = (x.predictor.box2box_transform.weights for x in (student, teacher))
        self._scales = [a / b for a, b in zip(ours, theirs)]

    def terms(self, trace: BoxTrace, teacher: Mapping[str, torch.Tensor]) -> List[Term]:
        """The student's predictions for the classes that have a teacher class."""
        m = self._class_map
        return [Term(m.student_logits(trace.logits), m.student_deltas(trace.deltas))]

    def targets(self, predictions: BoxPredictions) -> BoxPredictions:
        """The teacher's predictions in these classes, boxes encoded as the student's."""
        m, deltas = self._class_map, predictions.deltas
        if set(self._scales) != {1.0}:
            columns = deltas.unflatten(1, (-1, 4)).unbind(dim=2)
            scaled = [x * scale for x, scale in zip(columns, self._scales)]
            deltas = torch.stack(scaled, dim=2).flatten(1)
        return BoxPredictions(m.teacher_logits(predictions.logits), m.teacher_deltas(deltas))
