"""Whose predictions learn to mimic the teacher's, in a dense detector.

Shape shorthand: N images, A anchors per position, K foreground classes, C channels, (Hi, Wi) size
of level i, R anchors of an image over all levels.
"""

import contextlib
import dataclasses
import functools
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from detectron2.layers import cat
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from torch import nn

from .class_map import ClassMap
from .dense_pair import TOWERS, towers_of
from .step import TeacherPass
from .teacher import Teacher


@dataclasses.dataclass
class DenseTrace:
    """What a forward of the student computed; tensors carry their graph.

    Attributes:
        layers: tower -> layer -> its output for each level, (N, C, Hi, Wi).
        predictions: of its own predictors for each level, logits (N, Hi Wi A, K) and deltas (N,
            Hi Wi A, 4); in training only, as what follows.
        anchors: for each level.
        labels: (N, R): class, K for background, -1 for ignored.
        boxes: for each image (R, 4), the matched ground truth.
    """

    layers: Dict[str, Dict[str, List[torch.Tensor]]] = dataclasses.field(default_factory=dict)
    predictions: Tuple[List[torch.Tensor], ...] = ()
    anchors: List[Boxes] = dataclasses.field(default_factory=list)
    labels: Optional[torch.Tensor] = None
    boxes: List[torch.Tensor] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def own(self) -> "DensePredictions":
        """The predictions in the order of the anchors."""
        return DensePredictions(*(cat(x, dim=1) for x in self.predictions))

    def zero(self) -> torch.Tensor:
        return self.anchors[0].tensor.new_zeros(())


@dataclasses.dataclass
class DensePredictions:
    """Class logits (N, R, K) and box deltas (N, R, 4)."""

    logits: torch.Tensor
    deltas: torch.Tensor


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
        self, teacher: TeacherPass
    ) -> Tuple[Dict[str, List[Dict[str, torch.Tensor]]], List[List[torch.Tensor]]]:
        """The teacher's tower layers and predictions; no gradient.

        Returns:
            tower -> for each level layer -> (N, C, Hi, Wi), and the predictions as in
            :meth:`predict`.
        """
        features = teacher.features
        with teacher.running():
            levels = [features[name] for name in self.model.head_in_features]
            layers = {t: [named.trace(x) for x in levels] for t, named in self.towers.items()}
            outputs = {t: [x[self.towers[t].last] for x in layers[t]] for t in TOWERS}
            return layers, self.predict(outputs)

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

    def flatten(self, predictions: List[List[torch.Tensor]]) -> DensePredictions:
        """The predictions in the order of the anchors."""
        model = self.model
        logits, deltas = model._transpose_dense_predictions(predictions[:2], [model.num_classes, 4])
        return DensePredictions(cat(logits, dim=1), cat(deltas, dim=1))


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
        self.transform = teacher.model.box2box_transform
        self._teacher = teacher

    def maps(
        self,
        student: Mapping[str, Mapping[str, List[torch.Tensor]]],
        teacher: Mapping[str, List[Dict[str, torch.Tensor]]],
    ) -> List[List[torch.Tensor]]:
        """Cross-head predictions level by level, as of :meth:`DenseTeacher.predict`.

        Args:
            student: tower -> layer -> its output for each level.
            teacher: tower -> for each level layer -> its output.
        """
        outputs = {}
        for tower, named in self._teacher.towers.items():
            fusion = self.fusion[tower]
            outputs[tower] = []
            for level, theirs in enumerate(teacher[tower]):
                taps = {tap: student[tower][tap][level] for tap in fusion.taps}
                fused = fusion(taps, theirs[fusion.entry], named.run)
                outputs[tower].append(named.run(fused, after=fusion.entry))
        return self._teacher.predict(outputs)

    def predict(
        self, trace: DenseTrace, teacher: Mapping[str, List[Dict[str, torch.Tensor]]]
    ) -> DensePredictions:
        return self._teacher.flatten(self.maps(trace.layers, teacher))

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

    def __init__(self, student: DenseDetector, class_map: ClassMap):
        self._class_map = class_map
        self.transform = student.box2box_transform

    def predict(
        self, trace: DenseTrace, teacher: Mapping[str, List[Dict[str, torch.Tensor]]]
    ) -> DensePredictions:
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
    logits = channels(predictions.logits.flatten(0, 1))  # NRxM
    shape = predictions.deltas.shape[:2]
    return DensePredictions(logits.unflatten(0, shape), predictions.deltas)
