"""What LazyConfigs for the built-in data set (128x128 images) share: data, solver and a Faster
R-CNN R18-FPN, those of Base-shapes.yaml and faster_rcnn_R_18_shapes.yaml.
"""

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

import crosskd_ifc  # noqa: F401  registers the data set

train = model_zoo.get_config("common/train.py").train
train.update(device="cpu", seed=1, max_iter=220, eval_period=110)
train.checkpointer.period = 100

resize = L(T.ResizeShortestEdge)(short_edge_length=[128], max_size=128, sample_style="choice")
dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="crosskd_shapes_train"),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[resize, L(T.RandomFlip)(horizontal=True)],
        image_format="BGR",
    ),
    total_batch_size=4,
    num_workers=0,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="crosskd_shapes_test", filter_empty=False),
    mapper=L(DatasetMapper)(is_train=False, augmentations=[resize], image_format="BGR"),
    num_workers=0,
)
dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    output_dir="${train.output_dir}/inference",
    allow_cached_coco=False,
)


def steps(max_iter, warmup):
    """The learning rate's factor: a warm-up, then steps at 70 % and 90 %."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[0.1**i for i in range(3)],
            milestones=[int(max_iter * 0.7), int(max_iter * 0.9)],
            num_updates=max_iter,
        ),
        warmup_length=warmup / max_iter,
        warmup_factor=0.001,
    )


lr_multiplier = steps(train.max_iter, 80)
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.04

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.pixel_std = [57.375, 57.12, 58.395]
stages = model.backbone.bottom_up.stages
stages.depth = 18
del stages["stride_in_1x1"]  # of bottlenecks
# From scratch: there are no pretrained weights, so all of the backbone is trained, with BatchNorm.
stages.norm = model.backbone.bottom_up.stem.norm = model.backbone.norm = "BN"
model.backbone.out_channels = 64
rpn, heads = model.proposal_generator, model.roi_heads
rpn.head.in_channels = 64
rpn.anchor_generator.sizes = [[16], [32], [64], [96], [128]]
rpn.anchor_matcher.thresholds = [0.3, 0.6]
rpn.update(batch_size_per_image=64, pre_nms_topk=(400, 300), post_nms_topk=(300, 200))
heads.update(num_classes=8, batch_size_per_image=64)
heads.box_pooler.sampling_ratio = 1  # of the time of a step on a CPU, RoIAlign takes a good part
heads.box_head.input_shape.channels = 64
heads.box_head.fc_dims = [256, 256]
heads.box_predictor.input_shape.channels = 256
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    del heads[key]
