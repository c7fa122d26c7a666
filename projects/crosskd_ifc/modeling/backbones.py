"""Feature pyramids of dense detectors: that of FCOS, and those of RetinaNets trained with mmdet,
which have no ReLU between P6 and P7."""

from typing import List

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7, build_retinanet_resnet_fpn_backbone


@BACKBONE_REGISTRY.register()
def build_crosskd_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet with a feature pyramid whose P6 and P7 are made from P5 (Tian et al., 2020,
    "FCOS: A simple and strong anchor-free object detector", section 2.2).

    Args:
        cfg: MODEL.RESNETS and MODEL.FPN are read.
        input_shape: of the image.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """P6 and P7, each by a convolution of stride 2, P7 from P6 as it is."""

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """P6 (N, C, Hi/2, Wi/2) and P7 (N, C, Hi/4, Wi/4) of a map (N, C', Hi, Wi)."""
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_mmdet_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """detectron2's ``build_retinanet_resnet_fpn_backbone`` (P6 from res5) without ReLU before P7.

    Args:
        cfg: MODEL.RESNETS and MODEL.FPN are read.
        input_shape: of the image.
    """
    return _without_relu(build_retinanet_resnet_fpn_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_mmdet_retinanet_p5_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_crosskd_fcos_resnet_fpn_backbone`` (P6 from P5) without ReLU before P7.

    Args:
        cfg: MODEL.RESNETS and MODEL.FPN are read.
        input_shape: of the image.
    """
    return _without_relu(build_crosskd_fcos_resnet_fpn_backbone(cfg, input_shape))


def _without_relu(backbone: FPN) -> FPN:
    stock = backbone.top_block
    backbone.top_block = LastLevelP6P7WithoutReLU(
        stock.p6.in_channels, stock.p6.out_channels, stock.in_feature
    )
    return backbone
