"""Whether taps, entry and route fit the heads of student and teacher."""

from typing import Sequence, Tuple

from detectron2.config import CfgNode

from ...config import ConfigError, fusion_name, fusion_route
from ..fusion import FeatureFusion, are_separate
from ..head_layers import NamedLayers
from .settings import check_unused


def make_fusion(
    cfg: CfgNode,
    taps: Tuple[str, ...],
    entry: str,
    align: str,
    ours: NamedLayers,
    theirs: NamedLayers,
    *,
    head: str,
) -> FeatureFusion:
    """A fusion from layers of the student to one of the teacher.

    Args:
        cfg: the student's config.
        taps, align: as of :class:`FeatureFusion`.
        entry: also; "" for the deepest tap's layer.
        ours, theirs: the layers of student and teacher.
        head: what has them, for errors.

    Raises:
        ConfigError: if there are no such layers, the shapes can't be bridged, the fusion refuses
            the taps, or weights or detached taps don't fit them.
    """
    kd, loss, name = cfg.MODEL.CROSSKD.FUSION, cfg.MODEL.CROSSKD.LOSS, fusion_name(cfg)
    _check_layers("IN_FEATURES", taps, ours, f"student's {head}")
    entry, route = entry or max(taps, key=ours.depth), fusion_route(cfg)
    _check_layers("ENTRY", (entry,), theirs, f"teacher's {head}")
    if route == "through":
        _check_layers("IN_FEATURES", taps, theirs, f"teacher's {head} (route 'through')")
        _check_depths(taps, entry, theirs)
    if loss.TAP_WEIGHTS and len(taps) == 1:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TAP_WEIGHTS is {tuple(loss.TAP_WEIGHTS)}, but there is one tap, "
            f"{taps[0]!r}: the weight of its loss is LOSS.FUSED_WEIGHT; set TAP_WEIGHTS to ()"
        )
    if loss.TAP_WEIGHTS and len(loss.TAP_WEIGHTS) != len(taps):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TAP_WEIGHTS is {tuple(loss.TAP_WEIGHTS)}, but FUSION.IN_FEATURES "
            f"has {len(taps)} taps, {taps}; give one weight for each, or ()"
        )
    if not set(kd.DETACH) <= set(taps) or set(kd.DETACH) == set(taps):
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.DETACH is {tuple(kd.DETACH)}; it must name some, not all, of "
            f"the taps {taps}"
        )
    if are_separate(name, taps):
        check_unused(
            cfg.MODEL.CROSSKD,
            ("FUSION.DETACH", "LOSS.FUSED_WEIGHT"),
            "FUSION.NAME 'none' (the default of box heads) doesn't combine the taps",
        )
    try:
        fusion = FeatureFusion(
            fused_weight=loss.FUSED_WEIGHT,
            tap_weights=loss.TAP_WEIGHTS,
            detach=kd.DETACH,
            name=name,
            taps=taps,
            entry=entry,
            route=route,
            align=align,
            student_shapes=ours.shapes,
            teacher_shapes=theirs.shapes,
        )
    except ValueError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION (NAME '{name}', IN_FEATURES {taps}, ENTRY '{entry}'): {error}"
        ) from None
    if not fusion.terms:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.FUSED_WEIGHT is 0, and no tap of {taps} has a loss of its own, so "
            "there is none at all; give it another value"
        )
    return fusion


def _check_layers(key: str, names: Sequence[str], layers: NamedLayers, whose: str) -> None:
    known = [name for name in layers.names if name != "input"]  # of a tower
    for name in names:
        if name not in known:
            raise ConfigError(
                f"MODEL.CROSSKD.FUSION.{key}: the {whose} has no layer {name!r}; it has "
                f"{', '.join(known)}"
            )


def _check_depths(taps: Sequence[str], entry: str, theirs: NamedLayers) -> None:
    deeper = [tap for tap in taps if theirs.depth(tap) > theirs.depth(entry)]
    if deeper:
        possible = theirs.names[: theirs.depth(entry) + 1]
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.IN_FEATURES: {deeper} lie deeper than ENTRY '{entry}', so "
            "route 'through' has no teacher layers to run; take taps from "
            f"{[name for name in possible if name != 'input']}, or ROUTE direct"
        )
