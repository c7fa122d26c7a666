"""One training step, as the parts of a distillation see it.

Shape shorthand: N images.
"""

import dataclasses
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from .teacher import TeacherPass

# Statistics are read from the device only this often, in the steps that detectron2's writers log.
LOG_PERIOD = 20


@dataclasses.dataclass
class StepTrace:
    """What is known of one step; the student's parts fill in while its forward runs.

    Attributes:
        teacher: the teacher on this batch.
        inputs: the batch.
        factor: of the schedule; 0 must not run the teacher.
        log: whether statistics are wanted.
        features: the student's backbone features by name, each (N, C, Hi, Wi).
        heads: what the student's heads computed, a :class:`HeadTrace` or :class:`DenseTrace`.
    """

    teacher: TeacherPass
    inputs: List[Dict[str, Any]]
    factor: float
    log: bool
    features: Dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    heads: Any = None


def put_scalars(scalars: Dict[str, float]) -> None:
    """Statistics to the EventStorage, under ``crosskd/``."""
    for name, value in scalars.items():
        get_event_storage().put_scalar(f"crosskd/{name}", value, smoothing_hint=False)


def is_logging_step() -> bool:
    return (get_event_storage().iter + 1) % LOG_PERIOD == 0


@dataclasses.dataclass
class BranchTrace:
    """What one training pass of the mask or keypoint branch saw and computed; tensors carry their
    graph.

    Attributes:
        instances: per image its positive RoIs, P in all: ``proposal_boxes`` and ``gt_classes``.
        pooled: (P, C, H, W) output of the branch's pooler.
        logits: (P, K, H', W') of the branch's head, K classes (1 if class-agnostic) or keypoints.
    """

    instances: List[Instances] = dataclasses.field(default_factory=list)
    pooled: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None

    @property
    def boxes(self) -> List[Boxes]:
        """The boxes of the RoIs, per image, absolute pixels."""
        return [x.proposal_boxes for x in self.instances]


@dataclasses.dataclass
class BoxTrace:
    """What one pass of a box head saw and computed; tensors carry their graph.

    Attributes:
        proposals: per image, the boxes (``proposal_boxes``, absolute pixels) from before any
            ``TRAIN_ON_PRED_BOXES`` rewriting, and in training their ``gt_classes``.
        layers: layer name of the box head -> its output, ``pool`` (R, C, P, P), ``convk`` (R, C, P,
            P), ``fck`` (R, D).
        logits: (R, K + 1) class logits of the box predictor.
        deltas: (R, 4K) or (R, 4) box deltas of the box predictor.
    """

    proposals: List[Instances] = dataclasses.field(default_factory=list)
    layers: Dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    logits: Optional[torch.Tensor] = None
    deltas: Optional[torch.Tensor] = None

    @property
    def boxes(self) -> List[Boxes]:
        """The boxes of the proposals, per image."""
        return [p.proposal_boxes for p in self.proposals]


@dataclasses.dataclass
class HeadTrace:
    """What one pass of the ROI heads saw and computed.

    Attributes:
        stages: of each box head: one, or those of a Cascade R-CNN.
        mask, keypoint: of these branches, where there are such.
    """

    stages: List[BoxTrace]
    mask: BranchTrace = dataclasses.field(default_factory=BranchTrace)
    keypoint: BranchTrace = dataclasses.field(default_factory=BranchTrace)


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
        inside: (N, R) whether an anchor counts; None: all that aren't ignored do.
        boxes: for each image (R, 4), the matched ground truth.
    """

    layers: Dict[str, Dict[str, List[torch.Tensor]]]
    num_anchors: int
    predictions: Tuple[List[torch.Tensor], ...] = ()
    anchors: List[Boxes] = dataclasses.field(default_factory=list)
    labels: Optional[torch.Tensor] = None
    inside: Optional[torch.Tensor] = None
    boxes: List[torch.Tensor] = dataclasses.field(default_factory=list)

    @property
    def own(self) -> "DensePredictions":
        """The predictions of its own predictors."""
        shape = (-1, self.num_anchors)
        return DensePredictions(*([x.unflatten(1, shape) for x in y] for y in self.predictions))

    @property
    def valid(self) -> torch.Tensor:
        """(N, R) float, 1 for the anchors that distil."""
        valid = self.labels >= 0
        return (valid if self.inside is None else valid & self.inside).to(torch.float32)


@dataclasses.dataclass
class DensePredictions:
    """For each level class logits (N, Pi, A, K) and box deltas (N, Pi, A, 4).

    They are views of what the predictors gave: the logits are by far the largest tensors of a dense
    detector, too large to be copied into another order.
    """

    logits: List[torch.Tensor]
    deltas: List[torch.Tensor]
