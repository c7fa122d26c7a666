"""A small ViT as a teacher for the built-in data set, from scratch, 1,600 steps.

    python tools/lazyconfig_train_net.py --config-file configs/quick/faster_rcnn_vit_shapes.py
"""

from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import SimpleFeaturePyramid, ViT
from torch import nn

from .common_shapes import dataloader, model, steps, train  # noqa: F401

train.update(output_dir="output/quick/vit_teacher", max_iter=1600, eval_period=800)
train.checkpointer.period = 400
lr_multiplier = steps(train.max_iter, 160)
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.update(lr=5e-4, weight_decay=0.05)

# Patches of 8 pixels (16 are half a small object), all attending to all: strides 4, 8 and 16.
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=128,
        patch_size=8,
        embed_dim=192,
        depth=8,
        num_heads=3,
        drop_path_rate=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        out_feature="last_feat",
        pretrain_img_size=128,
        pretrain_use_cls_token=False,
    ),
    in_feature="last_feat",
    out_channels=64,
    scale_factors=(2.0, 1.0, 0.5),
    norm="LN",
    square_pad=128,
)
levels = ["p2", "p3", "p4"]
model.proposal_generator.in_features = levels
model.proposal_generator.anchor_generator.update(
    sizes=[[16, 24], [32, 48], [64, 96]], strides=[4, 8, 16]
)
model.proposal_generator.head.num_anchors = 6
model.roi_heads.box_in_features = levels
model.roi_heads.box_pooler.scales = (1 / 4, 1 / 8, 1 / 16)
