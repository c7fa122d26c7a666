"""Which settings a run's results depend on."""

from typing import Any, Dict

from detectron2.config import CfgNode

from ..common.config_files import default_values, flat
from ..config import distillation_requested, fusion_name, fusion_route
from ..distillation.fusion import are_separate

# Keys of MODEL.CROSSKD that came after the first records, with the value that stands for what was
# done before.
_SINCE = {
    "MODEL.CROSSKD.LOSS.FUSED_WEIGHT": 1.0,
    "MODEL.CROSSKD.TEACHERS_LOSS": "mean",
    "MODEL.CROSSKD.LOSS.CLS_TYPE": "kl",
    "MODEL.CROSSKD.LOSS.FEATURE_TYPE": "pkd",
}
# Raise it when taps or weights that may be left open, where taps aren't combined, become others.
_SEPARATE_TAPS = 1
# Settings that don't belong to a run's results.
_NO_RESULT = ("OUTPUT_DIR", "MODEL.DEVICE", "SOLVER.CHECKPOINT_PERIOD", "WANDB.PROJECT")


def digested_settings(cfg: CfgNode) -> Dict[str, Any]:
    """What results depend on: all that isn't at its default; for a student that distils all of
    MODEL.CROSSKD that is set, so that a changed default is another setting."""
    before, settings, since = default_values(), {}, dict(_SINCE)
    kd = cfg.MODEL.CROSSKD
    if kd.LOSS.TAP_WEIGHTS:  # as their first records have it
        since["MODEL.CROSSKD.LOSS.FUSED_WEIGHT"] = 0.0
    distils = distillation_requested(cfg)
    combination = kd.FUSION.NAME or "mean"  # which was the default
    if distils and kd.MIMIC != "student_head":
        combination = fusion_name(cfg)
    is_separate = distils and are_separate(combination, kd.FUSION.IN_FEATURES)
    if is_separate:
        settings["separate taps"] = _SEPARATE_TAPS
    for key, value in flat(cfg):
        if key == "MODEL.CROSSKD.FUSION.NAME":
            value = combination
        if key == "MODEL.CROSSKD.FUSION.ROUTE" and not is_separate:
            value = value or _open_route(cfg, combination)
        if key == "MODEL.CROSSKD.TEACHER.STAGE" and value == 1:
            value = None  # as records have the first stage
        if key.startswith("MODEL.CROSSKD."):
            counts = value != since[key] if key in since else value not in (0, "", (), [], None)
            counts = counts and distils
        else:
            counts = key not in _NO_RESULT and value != before.get(key)
        if counts:
            settings[key] = value
    return settings


def _open_route(cfg: CfgNode, combination: str) -> str:
    """The route of one tap or combined ones where it is left open. Records name it "direct"
    wherever it was; to a tap's own layer both routes are the same."""
    fusion = cfg.MODEL.CROSSKD.FUSION
    is_there = tuple(fusion.IN_FEATURES) == (fusion.ENTRY,)
    return "direct" if combination != "none" or is_there else fusion_route(cfg)
