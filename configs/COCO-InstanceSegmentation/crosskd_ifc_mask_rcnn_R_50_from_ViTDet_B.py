"""Mask R-CNN R50-FPN, COCO 1x, taught by ViTDet-B (51.6 box AP). Needs timm. 8 GPUs, 16 images a
step.

detectron2's package has ViTDet's model, but not the files of its projects/ViTDet: the weights are
that project's. For another of its models, name its config's path in a checkout of detectron2, and
its weights.
    python tools/lazyconfig_train_net.py --num-gpus 8 --config-file \
        configs/COCO-InstanceSegmentation/crosskd_ifc_mask_rcnn_R_50_from_ViTDet_B.py
"""

from .crosskd_ifc_mask_rcnn_R_50_from_LSJ_R_101 import (  # noqa: F401
    crosskd,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

train.output_dir = "output/coco/crosskd_ifc_mask_rcnn_R_50_from_ViTDet_B"
# The teacher pads all images to squares of 1024 pixels; it takes no larger ones.
dataloader.train.mapper.augmentations[0].max_size = 1024
crosskd.TEACHER = dict(
    CONFIG_FILE="common/models/mask_rcnn_vitdet.py",
    WEIGHTS="https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/"
    "model_final_61ccd1.pkl",
)
