"""Mask R-CNN R50-FPN, COCO 1x, taught by the model zoo's LSJ Mask R-CNN R101-FPN (400 epochs, 48.9
box AP). Teacher and weights come from the zoo. 8 GPUs, 16 images a step.

    python tools/lazyconfig_train_net.py --num-gpus 8 --config-file \
        configs/COCO-InstanceSegmentation/crosskd_ifc_mask_rcnn_R_50_from_LSJ_R_101.py
"""

from detectron2 import model_zoo

from crosskd_ifc import CrossKDRCNN, CrossKDROIHeads

student = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, model, train = student.dataloader, student.model, student.train
lr_multiplier, optimizer = student.lr_multiplier, student.optimizer

train.output_dir = "output/coco/crosskd_ifc_mask_rcnn_R_50_from_LSJ_R_101"
model._target_ = CrossKDRCNN
model.roi_heads._target_ = CrossKDROIHeads
# The keys of MODEL.CROSSKD, see docs/options.md. The teacher's box head has four convolutions and
# one linear layer: the student's pool and fc1, which it has, too, are read by the rest of it.
crosskd = dict(
    TEACHER=dict(CONFIG_FILE="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),
    FUSION=dict(NAME="none", IN_FEATURES=["pool", "fc1"]),
)
