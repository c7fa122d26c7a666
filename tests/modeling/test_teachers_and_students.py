"""The cells of the table in docs/teachers_and_students.md that say no; the others are trained in
test_lazy_teachers.py, test_cascade_teachers.py, test_cascade_students.py, test_rcnn.py,
test_dense.py, test_mask.py, test_keypoint.py and test_sigmoid_classifiers.py."""

import pytest
from detectron2.modeling import build_model
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
