"""A student that starts from its teacher's weights where the two agree.

The inheriting start of ICD (Kang et al., 2021), FGD (Yang et al., 2022) and PKD (Cao et al., 2022).
"""

import logging
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from torch import nn

from ..config import ConfigError, head_section
from ..distillation.compatibility.anchors import differing_key
from ..distillation.compatibility.class_map import MASKED, ClassMap
from ..distillation.teacher import Teacher
from .classes import build_class_map

logger = logging.getLogger(__name__)


class _Rows(NamedTuple):
    """How the first dimension of a predictor's tensors counts classes.

    Attributes:
        each: rows of a class, side by side.
        has_background: a last row of each group is background's.
        repeated: all classes follow one another as often as there are anchors.
    """

    each: int = 1
    has_background: bool = False
    repeated: bool = False


_PER_CLASS = {
    "roi_heads.box_predictor.cls_score": _Rows(has_background=True),
    "roi_heads.box_predictor.bbox_pred": _Rows(each=4),
    "roi_heads.mask_head.predictor": _Rows(),
    "head.cls_score": _Rows(repeated=True),  # of dense detectors
}

# What reads the last layer of a head -> that head.
_READERS = (
    (r"roi_heads\.box_predictor((\.\d+)?)\..*", r"roi_heads.box_head\1"),
    (r"head\.cls_score", "head.cls_subnet"),
    (r"head\.(bbox_pred|ctrness)", "head.bbox_subnet"),
)
# A layer of a head, or its end; a tower's layers are compared otherwise.
_HEAD = re.compile(r"(roi_heads\.(?:box|mask|keypoint)_head(?:\.\d+)?)\.(.*)|(head\.\w+_subnet)\.")

_RPN_PREDICTORS = ("objectness_logits", "anchor_deltas")

# By what equally shaped convolutions differ -> the config key.
_CONVOLUTIONS = {
    "stride": "MODEL.RESNETS.STRIDE_IN_1X1 or RES5_DILATION",
    "dilation": "MODEL.RESNETS.RES5_DILATION",
    "padding": "MODEL.RESNETS.RES5_DILATION",
}
# Prefix of a convolution -> the config key of its norm.
_NORMS = {
    "backbone.fpn_": "MODEL.FPN.NORM",
    "backbone.": "MODEL.RESNETS.NORM",
    "roi_heads.box_head.": "MODEL.ROI_BOX_HEAD.NORM",
    "roi_heads.mask_head.": "MODEL.ROI_MASK_HEAD.NORM",
}


class WeightInheritance:
    """What ``MODEL.CROSSKD.INHERIT`` means for a student and a teacher; :meth:`apply` does it."""

    def __init__(self, cfg: CfgNode, student: nn.Module, teacher: Teacher):
        """
        Args:
            cfg: the student's config.
            student: whose tensors are replaced by :meth:`apply`.
            teacher: whose tensors replace them.

        Raises:
            ConfigError: for a prefix without a tensor that can be inherited, or if the classes of a
                predictor don't correspond.
        """
        self._student, self._teacher = student, teacher
        self.prefixes = tuple(cfg.MODEL.CROSSKD.INHERIT)
        self._tower_norm = f"MODEL.{head_section(cfg)}.NORM"
        # Name -> rows of the teacher's tensor for the student's, None for all as they are.
        self.inherited: Dict[str, Optional[List[int]]] = {}
        # Name -> why it isn't inherited.
        self.left: Dict[str, str] = {}
        ours, theirs = student.state_dict(), teacher.model.state_dict()
        covered = [n for n in ours if any(_is_below(n, p) for p in self.prefixes)]
        class_map = None
        if any(_class_rows(n) for n in covered) and not _is_teachers_own(cfg):
            class_map = build_class_map(cfg, student, teacher, "MODEL.CROSSKD.INHERIT")
        for name in covered:
            self._plan(name, ours[name], theirs.get(name), class_map)
        for prefix in self.prefixes:
            self._check(prefix, ours)
        self._check_input(cfg)

    def apply(self) -> None:
        """Copy the teacher's tensors into the student, and log what was and wasn't inherited."""
        ours, theirs = self._student.state_dict(), self._teacher.model.state_dict()
        with torch.no_grad():
            for name, rows in self.inherited.items():
                target, source = ours[name], theirs[name].to(ours[name].device)
                if rows is None:
                    target.copy_(source)
                    continue
                kept = [i for i, row in enumerate(rows) if row != MASKED]
                target[kept] = source[[rows[i] for i in kept]].to(target.dtype)
        for prefix in self.prefixes:
            names = [n for n in self.inherited if _is_below(n, prefix)]
            left = {n: why for n, why in self.left.items() if _is_below(n, prefix)}
            logger.info(
                f"INHERIT {prefix}: {len(names)} of {len(names) + len(left)} tensors start from "
                f"the teacher's: {', '.join(names)}"
            )
            if left:
                reasons = ", ".join(f"{name} ({why})" for name, why in left.items())
                logger.info(f"INHERIT {prefix}: not inherited: {reasons}")

    def _plan(
        self,
        name: str,
        ours: torch.Tensor,
        theirs: Optional[torch.Tensor],
        class_map: Optional[ClassMap],
    ) -> None:
        per_class = _class_rows(name)
        other = "" if theirs is None else self._other_meaning(name)
        if name.endswith(".fed_loss_cls_weights"):
            self.left[name] = "it counts the classes of the student's own data"
        elif theirs is None:
            self.left[name] = "the teacher has none"
        elif other:
            self.left[name] = f"it means something else: {other} differs"
        elif per_class is not None and class_map is None:
            self.left[name] = "the teacher's classes are others"
        elif per_class is not None and _counts_classes(ours, theirs, per_class, class_map):
            self.inherited[name] = _rows(per_class, class_map, len(ours))
        elif ours.shape != theirs.shape:
            self.left[name] = f"{tuple(ours.shape)}, the teacher's is {tuple(theirs.shape)}"
        else:
            self.inherited[name] = None

    def _other_meaning(self, name: str) -> str:
        """The config key by which equally shaped tensors of the two networks differ in meaning."""
        ours, theirs = self._student, self._teacher.model
        module = name.rpartition(".")[0]
        if _layers_before(ours, module) != _layers_before(theirs, module):
            return "what lies before it in its head"
        if module in ("proposal_generator.rpn_head." + x for x in _RPN_PREDICTORS):
            generators = ours.proposal_generator, theirs.proposal_generator
            return differing_key(*generators) if all(isinstance(g, RPN) for g in generators) else ""
        if module == "head.bbox_pred":
            return _differing_encoding(ours.box2box_transform, theirs.box2box_transform)
        if not module.startswith("roi_heads.box_predictor."):
            return self._differing_layer(module)
        predictors = [m.get_submodule(module.rpartition(".")[0]) for m in (ours, theirs)]
        if module.endswith(".bbox_pred"):
            weights = {tuple(p.box2box_transform.weights) for p in predictors}
            return "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS" if len(weights) > 1 else ""
        kinds = {p.use_sigmoid_ce for p in predictors}
        return "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE" if len(kinds) > 1 else ""

    def _differing_layer(self, name: str) -> str:
        """What makes two layers of equal shapes compute something else, or "": a config key, or a
        module around them."""
        pyramids = {getattr(m.backbone, "_fuse_type", "") for m in self._both()}
        if name.startswith("backbone.fpn_") and len(pyramids) > 1:
            return "MODEL.FPN.FUSE_TYPE"
        tower = re.match(r"head\.\w+_subnet", name)
        if tower:
            kinds = ([_kind(x) for x in m.get_submodule(tower[0])] for m in self._both())
            return self._tower_norm if any(a != b for a, b in zip(*kinds)) else ""
        for around in _modules_around(name):
            kinds = [_kind(m.get_submodule(around)) for m in self._both()]
            if kinds[0] != kinds[1]:
                return f"{around} ({kinds[0]}, the teacher's {kinds[1]})"
        # A convolution's norm belongs to it.
        a, b = (m.get_submodule(name.removesuffix(".norm")) for m in self._both())
        for attribute, key in _CONVOLUTIONS.items():
            if getattr(a, attribute, None) != getattr(b, attribute, None):
                return key
        if _kind(getattr(a, "norm", None)) == _kind(getattr(b, "norm", None)):
            return ""
        keys = (key for prefix, key in _NORMS.items() if name.startswith(prefix))
        return next(keys, "its norm")

    def _both(self) -> Tuple[nn.Module, nn.Module]:
        return self._student, self._teacher.model

    def _check(self, prefix: str, ours: Dict[str, torch.Tensor]) -> None:
        if any(_is_below(n, prefix) for n in self.inherited):
            return
        left = [f"{n} ({why})" for n, why in self.left.items() if _is_below(n, prefix)]
        reason = f"none of its tensors fits: {', '.join(left[:3])}"
        if not left:
            modules = sorted({".".join(n.split(".")[:2]) for n in ours})
            reason = f"the student has no such module; it has {', '.join(modules)}"
        raise ConfigError(
            f"MODEL.CROSSKD.INHERIT: nothing of {prefix!r} can start from the teacher's "
            f"({self._teacher.description}): {reason}"
        )

    def _check_input(self, cfg: CfgNode) -> None:
        """Refuse the layer that sees the image where the networks' images differ."""
        ours, theirs = self._student, self._teacher.model
        channels, state = len(ours.pixel_mean), ours.state_dict()
        first = [n for n in self.inherited if state[n].dim() == 4 and state[n].shape[1] == channels]
        differs = [
            key
            for key, a, b in (
                ("INPUT.FORMAT", cfg.INPUT.FORMAT, self._teacher.input_format),
                ("MODEL.PIXEL_MEAN", ours.pixel_mean.tolist(), theirs.pixel_mean.tolist()),
                ("MODEL.PIXEL_STD", ours.pixel_std.tolist(), theirs.pixel_std.tolist()),
            )
            if first and a != b
        ]
        if differs:
            raise ConfigError(
                f"MODEL.CROSSKD.INHERIT: {first[0]} would start from the teacher's "
                f"({self._teacher.description}), which reads other images: {', '.join(differs)} "
                "differ; make them equal, or name modules without this layer"
            )


def _kind(module: Optional[nn.Module]) -> str:
    """What a module is; all BatchNorms, frozen ones too, have tensors of the same meaning."""
    is_batch = isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d))
    return "BatchNorm" if is_batch else type(module).__name__


def _modules_around(name: str) -> List[str]:
    """The modules of a backbone that a layer is part of, without the backbone itself."""
    parts = name.removesuffix(".norm").split(".")
    return [".".join(parts[:n]) for n in range(2, len(parts))] if parts[0] == "backbone" else []


def _layers_before(model: nn.Module, name: str) -> List[str]:
    """Kinds of the layers in front of one of a head's; of all its layers for what reads the last.

    Norms don't count: they belong to a layer.
    """
    for reader, head in _READERS:
        if re.fullmatch(reader, name):
            name = re.sub(reader, head, name) + "."  # its end
            break
    match = _HEAD.fullmatch(name)
    if not match:
        return []
    kinds: List[str] = []
    layer = (match[2] or "").removesuffix(".norm")
    for other, module in model.get_submodule(match[1] or match[3]).named_modules():
        if layer and other == layer:
            break
        if any(x.dim() > 1 for x in module.parameters(recurse=False)):
            kinds.append(_kind(module))
    return kinds


def _is_below(name: str, prefix: str) -> bool:
    # Any prefix of a name, as detectron2's FPN has no module of its own: "backbone.fpn".
    return name.startswith(prefix)


def _is_teachers_own(cfg: CfgNode) -> bool:
    return "teacher" in tuple(cfg.MODEL.CROSSKD.TEACHER.CLASS_MAP)


def _class_rows(name: str):
    # Those of the stages of a Cascade R-CNN are counted in their names.
    return _PER_CLASS.get(re.sub(r"(box_predictor)\.\d+", r"\1", name.rpartition(".")[0]))


def _differing_encoding(ours, theirs) -> str:
    """The config key by which the box encodings of two dense detectors differ."""
    weights = {tuple(x.weights) for x in (ours, theirs) if isinstance(x, Box2BoxTransform)}
    return "MODEL.RETINANET.BBOX_REG_WEIGHTS" if len(weights) > 1 else ""


def _counts_classes(ours, theirs, rows: _Rows, class_map: ClassMap) -> bool:
    """Whether both tensors have rows for their classes, and are otherwise alike."""
    sizes = [
        n * rows.each + rows.has_background
        for n in (class_map.num_classes, class_map.num_teacher_classes)
    ]
    groups = len(ours) // sizes[0] if rows.repeated else 1
    fits = [len(ours), len(theirs)] == [groups * size for size in sizes]
    return fits and ours.shape[1:] == theirs.shape[1:]


def _rows(rows: _Rows, class_map: ClassMap, count: int) -> Optional[List[int]]:
    """The teacher's row for each of the student's ``count``."""
    if class_map.is_identity:
        return None
    group = [
        MASKED if t == MASKED else t * rows.each + i
        for t in class_map.teacher_classes
        for i in range(rows.each)
    ]
    theirs = class_map.num_teacher_classes * rows.each + rows.has_background
    group += [theirs - 1] * rows.has_background
    return [
        MASKED if row == MASKED else i * theirs + row
        for i in range(count // len(group))
        for row in group
    ]
