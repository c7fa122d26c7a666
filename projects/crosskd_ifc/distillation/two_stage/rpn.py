"""Mimicking of the teacher's region proposal network.

Shape shorthand: N images, A anchors per position, (Hi, Wi) size of level i, B anchors of an image
over all levels.
"""

from typing import List, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN

from ...config import ConfigError
from .. import losses as L
from ..compatibility.anchors import check_same_padding, differing_key
from ..compatibility.two_stage import refuse_teacher
from ..teacher import Teacher
from ..traces import StepTrace


class RPNMimic:
    """``[quality_focal(o, o_t) + sum sigmoid(o_t) |d - d_t|_1] / (batch_size_per_image N)`` over
    the anchors that the student's RPN sampled.

    o, d are the student's objectness logits and anchor deltas, o_t, d_t the teacher's.
    """

    @configurable
    def __init__(self, *, teacher: Teacher, weight: float):
        """
        Args:
            teacher: with an RPN on the same anchors.
            weight: of the loss.
        """
        self.weight = weight
        self._rpn = teacher.model.proposal_generator

    @classmethod
    def from_config(cls, cfg: CfgNode, student: GeneralizedRCNN, teacher: Teacher):
        _check_rpn(student, teacher)
        return {"teacher": teacher, "weight": cfg.MODEL.CROSSKD.LOSS.RPN_WEIGHT}

    def loss(
        self,
        step: StepTrace,
        logits: List[torch.Tensor],
        deltas: List[torch.Tensor],
        labels: List[torch.Tensor],
        batch_size_per_image: int,
    ) -> torch.Tensor:
        """The weighted loss, a scalar; 0 with a graph where the schedule's factor is 0.

        Args:
            step: the current one; its student parts are not known yet.
            logits, deltas: of the student, per level (N, Hi Wi A) and (N, Hi Wi A, 4).
            labels: per image (B,), -1 for anchors that weren't sampled.
            batch_size_per_image: anchors sampled for each image.
        """
        found, found_deltas = cat(logits, dim=1), cat(deltas, dim=1)  # NxB, NxBx4
        if step.factor == 0:
            return found.sum() * 0
        wanted, wanted_deltas = self._teacher(step)
        # A mask, not indices: indices make a GPU wait.
        sampled = (torch.stack(labels) >= 0).to(torch.float32).flatten()
        normalizer = batch_size_per_image * len(labels)
        loss = L.quality_focal(
            found.reshape(-1, 1),
            wanted.reshape(-1, 1),
            beta=1.0,
            weights=sampled,
            normalizer=normalizer,
        )
        confidence = L.at_least_float32(wanted).sigmoid().flatten() * sampled
        distance = (L.at_least_float32(found_deltas) - L.at_least_float32(wanted_deltas)).abs()
        distance = (distance.sum(dim=2).flatten() * confidence).sum() / normalizer
        return (loss + distance) * (self.weight * step.factor)

    def _teacher(self, step: StepTrace) -> Tuple[torch.Tensor, torch.Tensor]:
        """The teacher's objectness logits (N, B) and deltas (N, B, 4), in the student's order."""
        features = step.teacher.features
        with step.teacher.running():
            logits, deltas = self._rpn.rpn_head([features[f] for f in self._rpn.in_features])
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
        return cat(logits, dim=1), cat(deltas, dim=1)


def _check_rpn(student: GeneralizedRCNN, teacher: Teacher) -> None:
    ours, theirs = student.proposal_generator, teacher.model.proposal_generator
    if not hasattr(ours, "mimicking"):
        raise ConfigError(
            "MODEL.CROSSKD.LOSS.RPN_WEIGHT needs MODEL.PROPOSAL_GENERATOR.NAME CrossKDRPN; the "
            f"student has {'none' if ours is None else type(ours).__name__}"
        )
    if type(theirs) is not RPN and not hasattr(theirs, "mimicking"):
        refuse_teacher(
            teacher,
            f"proposes with {type(theirs).__name__}; MODEL.CROSSKD.LOSS.RPN_WEIGHT needs an RPN",
        )
    differs = differing_key(ours, theirs)
    if differs:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.RPN_WEIGHT compares anchor by anchor, but {differs} is not the "
            f"teacher's ({teacher.description}); make them equal, or set it to 0.0"
        )
    check_same_padding("LOSS.RPN_WEIGHT", student, teacher)
