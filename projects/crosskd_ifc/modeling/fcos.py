"""FCOS from a yacs config, which detectron2 builds from LazyConfig only, and FCOS that distils.

Shape shorthand: C channels of the pyramid, K foreground classes.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from detectron2.utils import comm

from ..distillation.traces import DenseTrace
from .backbones import build_crosskd_fcos_resnet_fpn_backbone
from .dense import DenseStudent

# Configs of earlier versions have this name. It isn't registered: other projects register theirs.
_OLD_BACKBONE = "build_fcos_resnet_fpn_backbone"


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """detectron2's FCOS, built from ``MODEL.FCOS``; weights are interchangeable with it.

    Attributes:
        input_format: channel order of the images, such as "BGR".
    """

    @configurable
    def __init__(self, *, input_format: str, **kwargs: Any):
        """
        Args:
            input_format: channel order of the images.
            kwargs: of detectron2's FCOS.
        """
        super().__init__(**kwargs)
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode):
        settings = cfg.MODEL.FCOS
        if cfg.MODEL.BACKBONE.NAME == _OLD_BACKBONE:
            image = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
            backbone = build_crosskd_fcos_resnet_fpn_backbone(cfg, image)
        else:
            backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        inputs = [shapes[name] for name in settings.IN_FEATURES]
        head = fcos.FCOSHead(
            input_shape=inputs,
            num_classes=settings.NUM_CLASSES,
            conv_dims=[inputs[0].channels] * settings.NUM_CONVS,
            norm=settings.NORM,
            prior_prob=settings.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": settings.IN_FEATURES,
            "num_classes": settings.NUM_CLASSES,
            "center_sampling_radius": settings.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": settings.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": settings.FOCAL_LOSS_GAMMA,
            "test_score_thresh": settings.SCORE_THRESH_TEST,
            "test_topk_candidates": settings.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": settings.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """The parent's, whose box loss needs float32 deltas under mixed precision, too."""
        deltas = [x.float() for x in pred_anchor_deltas]
        return super().losses(anchors, pred_logits, gt_labels, deltas, gt_boxes, pred_centerness)


@META_ARCH_REGISTRY.register()
class CrossKDFCOS(DenseStudent, FCOS):
    """``FCOS`` that, once a teacher is attached, also returns distillation losses in training.

    Centerness is trained on the ground truth alone.
    """

    stock_class = fcos.FCOS
    kd_depth = 2
    kd_box_type = "iou"

    def kd_normalizer(self, trace: DenseTrace) -> torch.Tensor:
        """The sum of the centerness targets over the positives, averaged over processes, at least
        1."""
        targets = self.compute_ctrness_targets(trace.anchors, trace.boxes)  # NxR
        # NaN outside of the boxes.
        targets = torch.where(self.positives(trace), targets, torch.zeros_like(targets))
        return mean_over_processes(targets.sum()).clamp(min=1)


def mean_over_processes(x: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar over all processes."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(x)
        x = x / comm.get_world_size()
    return x
