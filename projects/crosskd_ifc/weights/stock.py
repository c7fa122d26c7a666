"""The stock detectron2 model that a student is in evaluation."""

import functools
import operator
from typing import Union

import yaml
from detectron2.config import CfgNode, LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, build_resnet_backbone
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..common.building import build_detector
from ..common.lazy_config import explain
from ..config import ConfigError, remove_crosskd_ifc_config
from .own_code import own_code
from .reading import load_weights

# This project's classes -> the stock ones that they are in evaluation.
STOCK_CLASSES = {
    "CrossKDRCNN": GeneralizedRCNN,
    "CrossKDRetinaNet": RetinaNet,
    "CrossKDFCOS": FCOS,
    "CrossKDRPN": RPN,
    "CrossKDROIHeads": StandardROIHeads,
    "CrossKDCascadeROIHeads": CascadeROIHeads,
}
# Config keys that name them.
_NAMING = ("META_ARCHITECTURE", "PROPOSAL_GENERATOR.NAME", "ROI_HEADS.NAME")
# Arguments of stock FCOS that it keeps under the same names.
_FCOS_SETTINGS = (
    *("head_in_features", "num_classes", "center_sampling_radius", "focal_loss_alpha"),
    *("focal_loss_gamma", "test_score_thresh", "test_topk_candidates", "test_nms_thresh"),
    "max_detections_per_image",
)
# Keys that detectron2's release 0.6 of 2021 doesn't know; at their defaults they aren't written.
_SINCE_0_6 = (
    *(f"MODEL.ROI_BOX_HEAD.USE_{name}" for name in ("FED_LOSS", "SIGMOID_CE")),
    *(f"MODEL.ROI_BOX_HEAD.FED_LOSS_{name}" for name in ("FREQ_WEIGHT_POWER", "NUM_CLASSES")),
    *(f"SOLVER.{name}" for name in ("BASE_LR_END", "NUM_DECAYS", "RESCALE_INTERVAL")),
    "DATALOADER.REPEAT_SQRT",
)
_HEADER = """\
# A student exported by CrossKD-IFC: a model of stock detectron2.
# {} is an absolute path: change it if you move the files.
"""


def is_fcos(cfg: CfgNode) -> bool:
    """Whether stock detectron2 builds this model from a LazyConfig only."""
    return cfg.MODEL.META_ARCHITECTURE in ("FCOS", "CrossKDFCOS")


def build_student(cfg: CfgNode) -> nn.Module:
    """The model of a config on the CPU, in evaluation mode, with random weights.

    Raises:
        ConfigError: if the config can't be built.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return build_detector(cfg, what="the config").eval()


def stock_config(cfg: CfgNode, weights: str) -> Union[CfgNode, DictConfig]:
    """The config of the same model in evaluation, for stock detectron2.

    Args:
        cfg: with the keys of :func:`add_crosskd_ifc_config`.
        weights: path of its weights.

    Returns:
        A config that plain ``get_cfg()`` can merge; of FCOS, a LazyConfig.

    Raises:
        ConfigError: if stock detectron2 has no such config.
    """
    if cfg.MODEL.TIMM.NAME:
        raise ConfigError(
            f"MODEL.TIMM.NAME is {cfg.MODEL.TIMM.NAME!r}: stock detectron2 has no timm backbones; "
            "the checkpoint loads as it is wherever `import crosskd_ifc` has registered them"
        )
    if is_fcos(cfg):
        return _lazy_config(cfg, weights)
    ours, stock = cfg.clone(), get_cfg()
    ours.defrost()
    remove_crosskd_ifc_config(ours)
    stock.merge_from_other_cfg(ours)
    for key in _NAMING:
        *nodes, leaf = key.split(".")
        node = functools.reduce(operator.getitem, nodes, stock.MODEL)
        if node[leaf] in STOCK_CLASSES:
            node[leaf] = STOCK_CLASSES[node[leaf]].__name__
    stock.MODEL.WEIGHTS = weights
    # Whoever trains on with this config must not write into the student's own folder.
    stock.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    return stock


def write_config(stock: Union[CfgNode, DictConfig], path: str) -> None:
    """Write the file that :func:`load_stock` reads."""
    if isinstance(stock, CfgNode):
        key, text = "MODEL.WEIGHTS", _for_any_version(stock).dump()
    else:
        LazyConfig.save(stock, path)
        with PathManager.open(path) as f:
            key, text = "train.init_checkpoint", f.read()
    header, files = _HEADER.format(key), own_code(stock)
    if files:
        header += f"# It needs code of your own: {', '.join(map(ascii, files))}.\n"
    with PathManager.open(path, "w") as f:
        f.write(header + text)


def _for_any_version(stock: CfgNode) -> CfgNode:
    kept, defaults = stock.clone(), get_cfg()
    for name in _SINCE_0_6:
        *nodes, leaf = name.split(".")
        node, default = (functools.reduce(operator.getitem, nodes, x) for x in (kept, defaults))
        if leaf in node and node[leaf] == default[leaf]:
            del node[leaf]
    return kept


def load_stock(config: str, weights: str, *, lazy: bool) -> nn.Module:
    """The model that stock detectron2 makes of these two files, on the CPU, in evaluation mode.

    Args:
        config: a file that :func:`write_config` wrote.
        weights: the file of its weights.
        lazy: whether the config is a LazyConfig.

    Raises:
        ConfigError: if it has parts that aren't stock detectron2's, or can't be read again.
    """
    if lazy:
        try:
            model = instantiate(LazyConfig.load(config).model).eval()
        except Exception as error:  # what LazyConfig.save couldn't write
            raise ConfigError(
                "the student's LazyConfig can't be written as YAML, since it holds more than calls "
                f"of named functions and plain values: {explain(error)}"
            ) from error
    else:
        cfg = get_cfg()
        cfg.merge_from_file(config, allow_unsafe=False)
        model = build_student(cfg)
    classes = map(type, model.modules())
    ours = {c.__name__ for c in classes if any(map(is_ours, c.__mro__))}
    if ours:
        raise ConfigError(
            f"the config's model has parts without stock counterpart: {', '.join(ours)}"
        )
    model.load_state_dict(load_weights(weights)["model"])
    return model


def is_ours(kind: type) -> bool:
    """Whether a class is of this package."""
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _lazy_config(cfg: CfgNode, weights: str) -> DictConfig:
    model = build_student(cfg)
    backbone, settings, L = model.backbone, cfg.MODEL.FCOS, LazyCall
    kinds = [type(x) for x in (backbone, backbone.bottom_up, backbone.top_block)]
    if kinds != [FPN, ResNet, LastLevelP6P7]:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ConfigError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} makes {names}; an FCOS is written "
            "for stock detectron2 with FPN, ResNet, LastLevelP6P7 only"
        )
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    resnet = {key: yaml.safe_load(cfg.MODEL[key].dump()) for key in ("BACKBONE", "RESNETS")}
    resnet["BACKBONE"]["NAME"] = build_resnet_backbone.__name__
    detector = L(FCOS)(
        backbone=L(FPN)(
            bottom_up=L(build_resnet_backbone)(
                cfg={"MODEL": resnet}, input_shape=L(ShapeSpec)(channels=len(model.pixel_mean))
            ),
            in_features=list(backbone.in_features),
            out_channels=channels,
            norm=cfg.MODEL.FPN.NORM,
            top_block=L(LastLevelP6P7)(
                in_channels=backbone.top_block.p6.in_channels,
                out_channels=channels,
                in_feature=backbone.top_block.in_feature,
            ),
            fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        ),
        head=L(FCOSHead)(
            input_shape=[L(ShapeSpec)(channels=channels) for _ in settings.IN_FEATURES],
            num_classes=settings.NUM_CLASSES,
            conv_dims=[channels] * settings.NUM_CONVS,
            norm=settings.NORM,
            prior_prob=settings.PRIOR_PROB,
        ),
        **{name: getattr(model, name) for name in _FCOS_SETTINGS},
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
    )
    return lazy_stock_config(detector, cfg, weights)


def lazy_stock_config(model: DictConfig, cfg: CfgNode, weights: str) -> DictConfig:
    """A LazyConfig with what whoever runs the model has to know.

    Args:
        model: its node, of stock classes.
        cfg: says how its images are read.
        weights: path of its weights.
    """
    image = {"format": cfg.INPUT.FORMAT}
    image.update(min_size=cfg.INPUT.MIN_SIZE_TEST, max_size=cfg.INPUT.MAX_SIZE_TEST)
    return OmegaConf.create(
        {"model": model, "train": {"init_checkpoint": weights}, "input": image},
        flags={"allow_objects": True},
    )
