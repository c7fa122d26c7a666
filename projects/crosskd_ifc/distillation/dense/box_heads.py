"""The heads that distillation of dense detectors compares: the teacher's, the student's features
sent through the teacher's, and the student's own.

Shape shorthand: N images, A anchors per position, K foreground classes, C channels, (Hi, Wi) size
of level i with Pi = Hi Wi positions.
"""

import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from torch import nn

from ..compatibility.class_map import ClassMap
from ..fusion import FeatureFusion
from ..head_layers import TOWERS, towers_of
from ..teacher import Teacher, TeacherPass
from ..traces import DensePredictions, DenseTrace


@dataclasses.dataclass
class DenseTerm(DensePredictions):
    """Predictions that are compared with the teacher's.

    Attributes:
        name: "combined" or a tap; "" for the student's own.
        weight: of its losses.
    """

    name: str = ""
    weight: float = 1.0


class DenseTeacher:
    """A teacher's head, tower by tower."""

    def __init__(self, teacher: Teacher):
        self.model = teacher.model
        self.towers = towers_of(self.model.head)

    def run(
        self, teacher: TeacherPass, entries: Mapping[str, str]
    ) -> Tuple[Dict[str, List[Optional[torch.Tensor]]], List[List[torch.Tensor]]]:
        """The teacher's predictions, and what it has at the entry layers; no gradient.

        Args:
            entries: tower -> the layer to keep; "" keeps none.

        Returns:
            tower -> for each level (N, C, Hi, Wi) or None, and the predictions as in
            :meth:`predict`.
        """
        features = teacher.features
        kept: Dict[str, List[Optional[torch.Tensor]]] = {tower: [] for tower in TOWERS}
        outputs: Dict[str, List[torch.Tensor]] = {tower: [] for tower in TOWERS}
        with teacher.running():
            for tower, layers in self.towers.items():
                entry = entries[tower]
                for name in self.model.head_in_features:
                    # Only the entry's output stays alive.
                    x = layers.run(features[name], layers.names[0], entry or layers.names[0])
                    kept[tower].append(x if entry else None)
                    outputs[tower].append(layers.run(x, entry or layers.names[0]))
            return kept, self.predict(outputs)

    def predict(self, outputs: Mapping[str, List[torch.Tensor]]) -> List[List[torch.Tensor]]:
        """What its head gives for the outputs of its towers.

        Args:
            outputs: tower -> for each level (N, C, Hi, Wi).

        Returns:
            For each level the logits (N, A K, Hi, Wi), the deltas (N, 4 A, Hi, Wi) and, for FCOS,
            the centerness (N, 1, Hi, Wi).
        """
        head = self.model.head
        found = [
            [head.cls_score(x) for x in outputs["cls"]],
            [head.bbox_pred(x) for x in outputs["bbox"]],
        ]
        if isinstance(head, FCOSHead):
            found.append([head.ctrness(x) for x in outputs["bbox"]])
        return found

    def by_level(self, predictions: List[List[torch.Tensor]]) -> DensePredictions:
        """Logits and deltas of :meth:`predict` with the columns of each anchor last."""
        columns = self.model.num_classes, 4
        return DensePredictions(
            *([_columns_last(x, c) for x in maps] for maps, c in zip(predictions, columns))
        )


def _columns_last(x: torch.Tensor, columns: int) -> torch.Tensor:
    """(N, A columns, Hi, Wi) -> (N, Pi, A, columns), a view."""
    return x.unflatten(1, (-1, columns)).flatten(3).permute(0, 3, 1, 2)


class DenseCrossHead:
    """Cross-head predictions: for each level, the student's taps of a tower are combined (or taken
    by themselves), standardized to the teacher's feature at the entry layer, rectified, and sent
    through the teacher's layers after it and its predictor.

    The gradient flows through the frozen layers into the taps and adapters. All predictions are in
    the teacher's classes.
    """

    def __init__(self, teacher: DenseTeacher, fusion: nn.ModuleDict):
        """
        Args:
            fusion: tower -> :class:`FeatureFusion`.
        """
        self.fusion = fusion
        self.entries = {tower: f.entry for tower, f in fusion.items()}
        self.transform = teacher.model.box2box_transform
        self._teacher = teacher

    def maps(
        self,
        student: Mapping[str, Mapping[str, List[torch.Tensor]]],
        teacher: Mapping[str, List[torch.Tensor]],
    ) -> List[List[torch.Tensor]]:
        """Predictions from the combined features, as of :meth:`DenseTeacher.predict`.

        Args:
            student: tower -> layer -> its output for each level.
            teacher: tower -> for each level the teacher's output of the entry layer.
        """
        return self._run(student, teacher, lambda fusion, *inputs: fusion(*inputs))

    def terms(
        self, trace: DenseTrace, teacher: Mapping[str, List[torch.Tensor]]
    ) -> List[DenseTerm]:
        """What is compared with the teacher; all terms go through its remaining layers as one
        batch of images."""
        weights = self.fusion["cls"].terms

        def images(fusion: FeatureFusion, *inputs) -> torch.Tensor:
            features = fusion.features(*inputs)
            return torch.cat(features) if len(features) > 1 else features[0]

        maps = self._run(trace.layers, teacher, images)
        found = self._teacher.by_level(maps)
        if len(weights) == 1:
            parts = [(found.logits, found.deltas)]
        else:
            parts = zip(
                *(zip(*(x.chunk(len(weights)) for x in y)) for y in (found.logits, found.deltas))
            )
        return [
            DenseTerm(list(logits), list(deltas), name, weights[name])
            for name, (logits, deltas) in zip(weights, parts)
        ]

    def _run(self, student, teacher, feature_of: Callable[..., torch.Tensor]):
        """The teacher's remaining layers and predictors on a feature of each tower and level."""
        outputs = {}
        for tower, named in self._teacher.towers.items():
            fusion = self.fusion[tower]
            outputs[tower] = []
            for level, theirs in enumerate(teacher[tower]):
                taps = {tap: student[tower][tap][level] for tap in fusion.taps}
                feature = feature_of(fusion, taps, theirs, named.run)
                outputs[tower].append(named.run(feature, after=fusion.entry))
        return self._teacher.predict(outputs)

    def targets(self, predictions: DensePredictions) -> DensePredictions:
        """What the predictions are compared with: the teacher's own."""
        return predictions


class DenseStudentHead:
    """The student's own predictions, compared class by class (prediction mimicking)."""

    fusion = None
    entries = dict.fromkeys(TOWERS, "")

    def __init__(self, student: DenseDetector, class_map: ClassMap):
        self._class_map = class_map
        self.transform = student.box2box_transform

    def terms(self, trace: DenseTrace, teacher: Mapping[str, List[Any]]) -> List[DenseTerm]:
        """The student's predictions for the classes that have a teacher class."""
        found = _selected(self._class_map.student_channels, trace.own)
        return [DenseTerm(found.logits, found.deltas)]

    def targets(self, predictions: DensePredictions) -> DensePredictions:
        """The teacher's predictions in these classes."""
        return _selected(self._class_map.teacher_channels, predictions)


def _selected(
    channels: Callable[[torch.Tensor], torch.Tensor], predictions: DensePredictions
) -> DensePredictions:
    """Only some of the classes."""
    logits = [channels(x.flatten(0, 2)).unflatten(0, x.shape[:3]) for x in predictions.logits]
    return DensePredictions(logits, predictions.deltas)
