"""timm's feature extractors as backbones.

Shape shorthand: N images, C channels of a feature, (Hi, Wi) its size.
"""

import logging
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..common.errors import said
from ..config import ConfigError

logger = logging.getLogger(__name__)

NORMS = ("", "FrozenBN", "SyncBN")
_LEVELS = {f"res{i}": 2**i for i in (2, 3, 4, 5)}
# Of the trial that finds out what a network gives: an odd multiple of the largest stride, since
# images are padded to any.
_TRIAL_SIZE = 96


class TimmBackbone(Backbone):
    """A timm network that gives its features of strides 4 to 32, called ``res2`` to ``res5`` as
    detectron2 calls those of a ResNet.

    Weights: :func:`timm_weights`.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        freeze_at: int = 0,
        norm: str = "",
    ):
        """
        Args:
            name: of a timm model.
            out_features: of "res2" to "res5".
            freeze_at: 1 freezes the stem, 2 also what leads to ``res2``, and so on to 5.
            norm: "": as timm builds it; "FrozenBN" or "SyncBN" in place of all its BatchNorms.

        Raises:
            ConfigError: naming the key.
        """
        super().__init__()
        strides = _strides(name)
        missing = [f for f in out_features if f not in strides]
        if missing or not out_features:
            raise ConfigError(
                f"MODEL.FPN.IN_FEATURES is {list(out_features)}; timm's {name!r} gives "
                f"{', '.join(strides)} (strides 4, 8, 16, 32)"
            )
        if norm not in NORMS:
            raise ConfigError(
                f"MODEL.TIMM.NORM is {norm!r}; possible: {', '.join(map(repr, NORMS))}"
            )
        names = [f for f in strides if f in out_features]
        self.features = _create(name, out_indices=[strides[f] for f in names])
        self._channels_last = _gives_channels_last(self.features)
        self._out_features = names
        self._out_feature_strides = {f: _LEVELS[f] for f in names}
        channels = self.features.feature_info.channels()
        self._out_feature_channels = dict(zip(names, channels))
        self._try(name)
        if norm == "FrozenBN":
            self.features = _freeze_norms(self.features)
        elif norm == "SyncBN":
            self.features = _timm().layers.convert_sync_batchnorm(self.features)
        self._freeze(name, freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> Dict[str, Any]:
        name = cfg.MODEL.TIMM.NAME
        if not name:
            raise ConfigError("MODEL.TIMM.NAME is empty; give a timm model, such as convnext_atto")
        if input_shape.channels != 3:
            raise ConfigError("MODEL.PIXEL_MEAN: timm's networks take images of three channels")
        _warn_of_other_input(cfg, name)
        return {
            "name": name,
            "out_features": cfg.MODEL.FPN.IN_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "norm": cfg.MODEL.TIMM.NORM,
        }

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Features by name, each (N, C, Hi, Wi), of images (N, 3, H, W)."""
        found = self.features(x)
        if self._channels_last:
            found = [y.permute(0, 3, 1, 2).contiguous() for y in found]
        return dict(zip(self._out_features, found))

    @torch.enable_grad()
    def _try(self, name: str) -> None:
        """Refuse a network that takes only images of one size, or gives other maps than it says.
        What none of its features comes from is not to learn: DDP wants a gradient for all that is.
        """
        training = self.training
        self.eval()
        try:
            found = self(torch.zeros(1, 3, _TRIAL_SIZE, _TRIAL_SIZE))
        except Exception as error:  # of timm's many networks
            raise ConfigError(
                f"MODEL.TIMM.NAME {name!r} can't read images of any size: {said(error)}"
            ) from error
        self.train(training)
        for feature, shape in self.output_shape().items():
            side = _TRIAL_SIZE // shape.stride
            if found[feature].shape != (1, shape.channels, side, side):
                raise ConfigError(
                    f"MODEL.TIMM.NAME {name!r} gives {feature} as {tuple(found[feature].shape)}, "
                    f"not {(1, shape.channels, side, side)}"
                )
        parameters, total = list(self.parameters()), sum(x.sum() for x in found.values())
        for p, gradient in zip(
            parameters, torch.autograd.grad(total, parameters, allow_unused=True)
        ):
            p.requires_grad_(gradient is not None)

    def _freeze(self, name: str, freeze_at: int) -> None:
        """Freeze the modules up to a feature: no gradient, and the statistics of their norms."""
        if freeze_at <= 0:
            return
        try:
            modules, ends = _in_order(self.features)
        except StopIteration:
            raise ConfigError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but what leads to which feature isn't "
                f"known of timm's {name!r}; set it to 0"
            ) from None
        for place in modules[: ends[min(freeze_at, max(ends))]]:
            module = self.features.get_submodule(place)
            for p in module.parameters():
                p.requires_grad = False
            frozen = _freeze_norms(module)
            if frozen is not module:
                parent, _, leaf = place.rpartition(".")
                setattr(self.features.get_submodule(parent), leaf, frozen)


def _in_order(features: nn.Module) -> Tuple[List[str], Dict[int, int]]:
    """The names of a feature extractor's modules as they run, and for each FREEZE_AT how many of
    them come up to that feature (1: before the first of stride 4)."""
    # Also the features that aren't taken, as res2 of a dense detector.
    known = features.feature_info.info[: max(features.feature_info.out_indices) + 1]
    wanted = {x["module"]: x["reduction"] for x in known if x["reduction"] >= 4}
    flat = {name.replace(".", "_"): name for name in wanted}
    names: List[str] = []
    for name, child in features.named_children():
        inside = [n for n, _ in child.named_children() if f"{name}.{n}" in wanted]
        names += [f"{name}.{n}" for n, _ in child.named_children()] if inside else [name]
    ends, first = {}, None
    for module, stride in wanted.items():
        place = next(i for i, n in enumerate(names) if n == module or flat.get(n) == module)
        ends[int(math.log2(stride))] = place + 1
        first = place if first is None else first
    return names, {1: first, **ends}


def _freeze_norms(module: nn.Module) -> nn.Module:
    return _timm().utils.model.freeze_batch_norm_2d(module)


def _strides(name: str) -> Dict[str, int]:
    """Feature name -> its index in timm's list, the last one of each stride."""
    by_stride = {s: i for i, s in enumerate(_create(name).feature_info.reduction())}
    return {f: by_stride[stride] for f, stride in _LEVELS.items() if stride in by_stride}


def _gives_channels_last(features: nn.Module) -> bool:
    return str(getattr(features, "output_fmt", "NCHW")).endswith("NHWC")


def _create(name: str, **options) -> nn.Module:
    """A timm network that gives its features, with random weights unless ``options`` say so.

    Raises:
        ConfigError: if there is none of that name.
    """
    timm = _timm_with(name)
    try:
        return timm.create_model(name, features_only=True, **{"pretrained": False, **options})
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"MODEL.TIMM.NAME {name!r} gives no features: {said(error)}") from error


def _timm():
    try:
        import timm
        import timm.layers
        import timm.utils.model
    except ImportError as error:
        raise ConfigError(
            "MODEL.TIMM.NAME needs timm, which is not installed (pip install timm, or this "
            "project's extra 'timm')"
        ) from error
    return timm


def _timm_with(name: str):
    """timm, which is known to have this model."""
    timm = _timm()
    if not timm.is_model(name):
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} doesn't have; "
            "timm.list_models() lists what it has"
        )
    return timm


def timm_input(name: str) -> CfgNode:
    """The config keys by which a model sees what timm's pretrained network saw: RGB, its mean and
    std on the scale of detectron2's images, 0 to 255."""
    pretrained = _timm_with(name).get_pretrained_cfg(name)
    mean, std = ([round(255 * x, 3) for x in getattr(pretrained, key)] for key in ("mean", "std"))
    return CfgNode({"MODEL": {"PIXEL_MEAN": mean, "PIXEL_STD": std}, "INPUT": {"FORMAT": "RGB"}})


def _warn_of_other_input(cfg: CfgNode, name: str) -> None:
    wanted = timm_input(name)
    found = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    expected = (wanted.INPUT.FORMAT, wanted.MODEL.PIXEL_MEAN, wanted.MODEL.PIXEL_STD)
    same = found[0] == expected[0] and all(
        abs(a - b) < 0.01 for x, y in zip(found[1:], expected[1:]) for a, b in zip(x, y)
    )
    if not same:
        logger.warning(
            f"timm's weights of {name} are for INPUT.FORMAT {expected[0]}, MODEL.PIXEL_MEAN "
            f"{expected[1]} and PIXEL_STD {expected[2]}; this config has {found[0]}, "
            f"{list(found[1])} and {list(found[2])}, which only a training from scratch may have"
        )


def timm_weights(
    name: str, state: Optional[Mapping[str, torch.Tensor]] = None
) -> Dict[str, torch.Tensor]:
    """Trained weights of a timm network by the names that they have in a detector with
    :func:`build_timm_fpn_backbone`.

    Args:
        name: of a timm model.
        state: the state dict of timm's classifier; None: timm downloads its own.

    Raises:
        ConfigError: if there is no such model.
        ValueError: if ``state`` doesn't fit it.
    """
    timm = _timm_with(name)
    overlay = {} if state is None else {"pretrained_cfg_overlay": {"state_dict": dict(state)}}
    try:
        whole = timm.create_model(name, pretrained=True, **overlay)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"not the weights of timm's {name}: {error}") from error
    overlay = {"pretrained_cfg_overlay": {"state_dict": whole.state_dict()}}
    features = _create(name, pretrained=True, **overlay)
    return {f"backbone.bottom_up.features.{k}": v for k, v in features.state_dict().items()}


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm network with a feature pyramid, P6 by pooling, for two-stage detectors.

    Args:
        cfg: MODEL.TIMM, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT are read.
        input_shape: of the image.
    """
    return _pyramid(cfg, input_shape, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_timm_p6p7_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm network with a feature pyramid, P6 and P7 by convolutions from P5, for dense
    detectors.

    Args:
        cfg: MODEL.TIMM, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT are read.
        input_shape: of the image.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _pyramid(cfg, input_shape, LastLevelP6P7(channels, channels, in_feature="p5"))


def _pyramid(cfg: CfgNode, input_shape: ShapeSpec, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=TimmBackbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
