"""The cells of the table in docs/teachers_and_students.md that say no; the others are trained in
test_lazy_teachers.py, test_cascade_teachers.py, test_cascade_students.py, test_rcnn.py,
test_dense.py, test_mask.py, test_keypoint.py and test_sigmoid_classifiers.py."""

import pytest
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from helpers import tiny_cfg
from test_cascade_students import student_cfg
from test_cascade_teachers import CASCADE
from test_dense import dense_cfg

from crosskd_ifc import ConfigError, attach_teacher

C4 = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 32]], "MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
)
STUDENTS = {
    "RCNN": tiny_cfg,
    "Cascade R-CNN": student_cfg,
    "RetinaNet": lambda: dense_cfg("RetinaNet"),
    "FCOS": lambda: dense_cfg("FCOS"),
}
TEACHERS = {
    "RCNN": lambda: tiny_cfg(architecture="GeneralizedRCNN"),
    "Cascade R-CNN": lambda: tiny_cfg(*CASCADE),
    "C4": lambda: tiny_cfg(*C4),
    "RetinaNet": lambda: dense_cfg("RetinaNet", stock=True),
    "FCOS": lambda: dense_cfg("FCOS", stock=True),
}
NO = [
    *((x, teacher) for x in ("RCNN", "Cascade R-CNN") for teacher in ("C4", "RetinaNet", "FCOS")),
    *(("RetinaNet", teacher) for teacher in ("RCNN", "Cascade R-CNN", "C4", "FCOS")),
    *(("FCOS", teacher) for teacher in ("RCNN", "Cascade R-CNN", "C4", "RetinaNet")),
]


@pytest.mark.parametrize("student, teacher", NO)
def test_a_teacher_of_another_family_is_refused_with_the_reason(student, teacher):
    cfg = STUDENTS[student]()
    with pytest.raises(
        ConfigError, match="TEACHER.CONFIG_FILE: the teacher .* (needs|no box head)"
    ):
        attach_teacher(build_model(cfg), cfg, teacher=build_model(TEACHERS[teacher]()))


class ContextHeads(StandardROIHeads):
    def _forward_box(self, features, proposals):
        return super()._forward_box({k: 2 * v for k, v in features.items()}, proposals)


class ContextCascadeHeads(CascadeROIHeads):
    def _run_stage(self, features, proposals, stage):
        return super()._run_stage([2 * x for x in features], proposals, stage)


class ContextMaskHeads(StandardROIHeads):
    def _forward_mask(self, features, instances):
        return super()._forward_mask({k: 2 * v for k, v in features.items()}, instances)


MASKS = ("MODEL.MASK_ON", True)


@pytest.mark.parametrize(
    "heads, opts, message",
    [
        (ContextHeads, (), "has ContextHeads with a _forward_box of their own"),
        (ContextCascadeHeads, CASCADE, "has ContextCascadeHeads with a _run_stage of their own"),
        (ContextMaskHeads, MASKS, "LOSS.MASK_WEIGHT: .*ContextMaskHeads .* a _forward_mask of"),
    ],
)
def test_a_teacher_whose_heads_compute_more_than_their_layers_is_refused(heads, opts, message):
    cfg = tiny_cfg(*(MASKS if heads is ContextMaskHeads else ()))
    teacher = build_model(tiny_cfg(*opts))
    teacher.roi_heads.__class__ = heads
    with pytest.raises(ConfigError, match=message):
        attach_teacher(build_model(cfg), cfg, teacher=teacher)
