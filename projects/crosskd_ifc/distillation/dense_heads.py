"""Whose predictions learn to mimic the teacher's, in a dense detector.

Shape shorthand: N images, A anchors per position, K foreground classes, C channels, (Hi, Wi) size
of level i with Pi = Hi Wi positions, R anchors of an image over all levels.
"""

import contextlib
import dataclasses
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from detectron2.layers import cat
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from torch import nn

from .compatibility.class_map import ClassMap
from .compatibility.dense import TOWERS, towers_of
from .teacher import Teacher
from .traces import TeacherPass


@dataclasses.dataclass
class DenseTrace:
    """What a forward of the student computed; tensors carry their graph.

    Attributes:
        layers: tower -> layer -> its output for each level, (N, C, Hi, Wi).
        num_anchors: A.
        predictions: of its own predictors for each level, logits (N, Hi Wi A, K) and deltas (N,
            Hi Wi A, 4); in training only, as what follows.
        anchors: for each level.
        labels: (N, R): class, K for background, -1 for ignored.
        boxes: for each image (R, 4), the matched ground truth.
    """

    layers: Dict[str, Dict[str, List[torch.Tensor]]]
    num_anchors: int
    predictions: Tuple[List[torch.Tensor], ...] = ()
    anchors: List[Boxes] = dataclasses.field(default_factory=list)
    labels: Optional[torch.Tensor] = None
    boxes: List[torch.Tensor] = dataclasses.field(default_factory=list)

    @property
    def own(self) -> "DensePredictions":
        """The predictions of its own predictors."""
        shape = (-1, self.num_anchors)
        return DensePredictions(*([x.unflatten(1, shape) for x in y] for y in self.predictions))

    def zero(self) -> torch.Tensor:
        return self.anchors[0].tensor.new_zeros(())


@dataclasses.dataclass
class DensePredictions:
    """For each level class logits (N, Pi, A, K) and box deltas (N, Pi, A, 4).

    They are views of what the predictors gave: the logits are by far the largest tensors of a dense
    detector, too large to be copied into another order.
    """

    logits: List[torch.Tensor]
    deltas: List[torch.Tensor]


def by_anchor(levels: List[torch.Tensor]) -> torch.Tensor:
    """For each level (N, Pi, A, ...) -> (N, R, ...), in the order of the anchors."""
    return cat([x.flatten(1, 2) for x in levels], dim=1)


@contextlib.contextmanager
def record_towers(head: RetinaNetHead) -> Iterator[Dict[str, Dict[str, List[torch.Tensor]]]]:
    """Within this context, a forward of ``head`` fills tower -> layer -> outputs per level."""
    layers: Dict[str, Dict[str, List[torch.Tensor]]] = {name: {} for name in TOWERS}
    handles = []

    def keep(outputs: List[torch.Tensor]):
        def hook(module, inputs, output):
            outputs.append(output)

        return hook

    for tower, named in towers_of(head).items():
        for layer in named.names[1:]:
            outputs = layers[tower].setdefault(layer, [])
            handles.append(named.output_module(layer).register_forward_hook(keep(outputs)))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


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
    """Cross-head predictions: for each level, the student's taps of a tower are combined,
    standardized to the teacher's feature at the entry layer, rectified, and sent through the
    teacher's layers after it and its predictor.

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
        """Cross-head predictions level by level, as of :meth:`DenseTeacher.predict`.

        Args:
            student: tower -> layer -> its output for each level.
            teacher: tower -> for each level the teacher's output of the entry layer.
        """
        outputs = {}
        for tower, named in self._teacher.towers.items():
            fusion = self.fusion[tower]
            outputs[tower] = []
            for level, theirs in enumerate(teacher[tower]):
                taps = {tap: student[tower][tap][level] for tap in fusion.taps}
                fused = fusion(taps, theirs, named.run)
                outputs[tower].append(named.run(fused, after=fusion.entry))
        return self._teacher.predict(outputs)

    def predict(
        self, trace: DenseTrace, teacher: Mapping[str, List[torch.Tensor]]
    ) -> DensePredictions:
        return self._teacher.by_level(self.maps(trace.layers, teacher))

    def targets(self, predictions: DensePredictions) -> DensePredictions:
        """What the predictions are compared with: the teacher's own."""
        return predictions

    def connected_zero(self, trace: DenseTrace) -> torch.Tensor:
        """0, with a graph to every learned parameter of the fusions."""
        zeros = [f.connected_zero() for f in self.fusion.values()]
        zeros = [z for z in zeros if z is not None]
        return sum(zeros) if zeros else trace.zero()


class DenseStudentHead:
    """The student's own predictions, compared class by class (plain prediction mimicking)."""

    fusion = None
    entries = dict.fromkeys(TOWERS, "")

    def __init__(self, student: DenseDetector, class_map: ClassMap):
        self._class_map = class_map
        self.transform = student.box2box_transform

    def predict(self, trace: DenseTrace, teacher: Mapping[str, List[None]]) -> DensePredictions:
        """The student's predictions for the classes that have a teacher class."""
        return _selected(self._class_map.student_channels, trace.own)

    def targets(self, predictions: DensePredictions) -> DensePredictions:
        """The teacher's predictions in these classes."""
        return _selected(self._class_map.teacher_channels, predictions)

    def connected_zero(self, trace: DenseTrace) -> torch.Tensor:
        return trace.zero()


def _selected(
    channels: Callable[[torch.Tensor], torch.Tensor], predictions: DensePredictions
) -> DensePredictions:
    """Only some of the classes."""
    logits = [channels(x.flatten(0, 2)).unflatten(0, x.shape[:3]) for x in predictions.logits]
    return DensePredictions(logits, predictions.deltas)
