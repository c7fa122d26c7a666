"""crosskd_ifc_R_18_shapes.yaml as a LazyConfig.

Train the teacher (faster_rcnn_R_34_shapes.yaml) first.
    python tools/lazyconfig_train_net.py --config-file configs/quick/crosskd_ifc_R_18_shapes.py
"""

from crosskd_ifc import CrossKDRCNN, CrossKDROIHeads

from .common_shapes import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

train.output_dir = "output/quick/lazy_crosskd_ifc"
model._target_ = CrossKDRCNN
model.roi_heads._target_ = CrossKDROIHeads
# The keys of MODEL.CROSSKD, see docs/options.md.
crosskd = dict(
    TEACHER=dict(
        CONFIG_FILE="quick/faster_rcnn_R_34_shapes.yaml",
        WEIGHTS="output/quick/teacher/model_final.pth",
    ),
    FUSION=dict(NAME="none", IN_FEATURES=["pool", "fc1", "fc2"]),
)
