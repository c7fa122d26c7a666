"""Whether the anchors and the padded images of student and teacher are the same."""

from typing import Tuple

from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from torch import nn

from ...config import ConfigError
from ..teacher import Teacher


def differing_key(ours: RPN, theirs: RPN) -> str:
    """The config key by which two RPNs answer for other anchors or in another encoding, or ""."""
    anchors = differing_anchors(
        ours.anchor_generator, theirs.anchor_generator, "MODEL.RPN.IN_FEATURES"
    )
    if anchors:
        return anchors
    if tuple(ours.box2box_transform.weights) != tuple(theirs.box2box_transform.weights):
        return "MODEL.RPN.BBOX_REG_WEIGHTS"
    return ""


def check_same_padding(
    key: str, student: nn.Module, teacher: Teacher, advice: str = "set it to 0.0"
) -> None:
    """Refuse backbones that pad images to different sizes, so that their maps differ in size.

    Args:
        key: what needs it, below MODEL.CROSSKD.
        advice: the end of the message.

    Raises:
        ConfigError: naming ``key``.
    """
    ours, theirs = (_describe_padding(m.backbone) for m in (student, teacher.model))
    if ours != theirs:
        raise ConfigError(
            f"MODEL.CROSSKD.{key} compares feature maps, but the student pads images to {ours} and "
            f"the teacher ({teacher.description}) to {theirs}; {advice}"
        )


def padding(backbone: Backbone) -> Tuple[int, int]:
    """What both sides of a batch of images are multiples of, and the side of the square that they
    are first padded to, 0 for none: as detectron2's ``ImageList`` reads it."""
    constraints = backbone.padding_constraints
    multiple = constraints.get("size_divisibility", backbone.size_divisibility)
    return max(multiple, 1), constraints.get("square_size", 0)


def _describe_padding(backbone: Backbone) -> str:
    multiple, square = padding(backbone)
    side = -(-square // multiple) * multiple
    return f"a square of {side} pixels" if square else f"multiples of {multiple} pixels"


def differing_anchors(ours: nn.Module, theirs: nn.Module, strides: str) -> str:
    """The config key by which two anchor generators differ, or "".

    Args:
        ours, theirs: the generators.
        strides: what to name where the strides differ.
    """
    if any(type(g) is not DefaultAnchorGenerator for g in (ours, theirs)):
        return "MODEL.ANCHOR_GENERATOR.NAME"
    if ours.strides != theirs.strides:
        return strides
    cells = [list(g.cell_anchors) for g in (ours, theirs)]
    if len(cells[0]) != len(cells[1]) or not all(
        x.shape == y.shape and x.equal(y) for x, y in zip(*cells)
    ):
        return "MODEL.ANCHOR_GENERATOR.SIZES or ASPECT_RATIOS"
    if ours.offset != theirs.offset:
        return "MODEL.ANCHOR_GENERATOR.OFFSET"
    return ""
