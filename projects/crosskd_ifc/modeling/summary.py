"""What will be distilled, in a few lines for the log."""

import logging
import warnings
from typing import Dict, List

import torch
from detectron2.config import CfgNode
from torch import nn

from ..common.random_state import same_random_state
from ..config import teacher_configs
from ..data.class_names import class_names
from ..distillation.fusion import FeatureFusion, Shape
from ..distillation.head_layers import NamedLayers, box_stages, towers_of
from .classes import num_classes
from .student import Student

_SIDE = 256  # pixels, of the image that is counted with: a small one, since counting takes seconds


def describe_distillation(student: Student, cfg: CfgNode) -> str:
    """A block of lines: both networks and their sizes, what enters where, losses, schedule and
    classes.

    Counting operations runs each network once, in evaluation mode on a small image; weights, modes
    and random state are left as they were.

    Args:
        student: with an attached teacher.
        cfg: its config.
    """
    if student.distiller is None:
        return "Nothing will be distilled: MODEL.CROSSKD.ENABLED is False"
    kd = cfg.MODEL.CROSSKD
    lines = [
        ("student", f"{type(student).__name__}, {_size_of(student)}"),
        *_describe_teachers(student, kd.TEACHERS_LOSS),
        *_describe_heads(student, kd),
        ("losses", _describe_losses(student, cfg)),
        ("schedule", _describe_schedule(kd.SCHEDULE)),
        ("classes", _describe_classes(student, cfg)),
    ]
    if kd.INHERIT:
        lines.append(("inherited", f"{', '.join(kd.INHERIT)} start from the teacher's weights"))
    width = max(len(name) for name, _ in lines)
    return "What will be distilled:\n" + "\n".join(f"  {n:<{width}}  {text}" for n, text in lines)


def _describe_teachers(student: Student, loss: str) -> List[tuple]:
    texts = [f"{x.description}, {_size_of(x.model)}" for x in student.teachers]
    if len(texts) == 1:
        return [("teacher", texts[0])]
    how = "the mean of all their losses" if loss == "mean" else "one of them, drawn in each step"
    numbered = [(f"teacher {i}", text) for i, text in enumerate(texts, 1)]
    return [*numbered, ("teaching", f"{how}; what follows is of teacher 1")]


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_flops(model: nn.Module) -> float:
    """Multiply-adds of a detector for one image of 256 x 256 pixels, by fvcore's counter.

    With random weights, the number of proposals and so the work of a RoI head can be another than
    after training.
    """
    from detectron2.utils.analysis import FlopCountAnalysis

    modes = {module: module.training for module in model.modules()}
    level = logging.getLogger("torch.fx").level
    with same_random_state(model.device), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing fixes
        logging.getLogger("torch.fx").setLevel(logging.ERROR)
        try:
            noise = torch.Generator().manual_seed(0)
            image = torch.randint(0, 256, (3, _SIDE, _SIDE), generator=noise).float()
            counter = FlopCountAnalysis(model.eval(), [{"image": image.to(model.device)}])
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return counter.total()
        finally:
            logging.getLogger("torch.fx").setLevel(level)
            for module, mode in modes.items():
                module.training = mode


def _size_of(model: nn.Module) -> str:
    parameters = f"{count_parameters(model) / 1e6:.2f} M parameters"
    try:
        flops = f"{count_flops(model) / 1e9:.2f} GFLOPs (multiply-adds) for {_SIDE}x{_SIDE} pixels"
    except Exception as error:  # tracing a network of the user's own can fail in any way
        flops = f"FLOPs not counted ({type(error).__name__})"
    return f"{parameters}, {flops}"


def _describe_heads(student: Student, kd: CfgNode) -> List[tuple]:
    lines = []
    if not (kd.LOSS.CLS_WEIGHT or kd.LOSS.BOX_WEIGHT):
        return [("predictions", "not compared: LOSS.CLS_WEIGHT and LOSS.BOX_WEIGHT are 0")]
    if not student.has_cross_head or kd.MIMIC == "both":
        lines.append(("own head", "the student's own predictions mimic the teacher's"))
    if not student.has_cross_head:
        return lines
    if hasattr(student, "roi_heads"):
        ours, theirs = (box_stages(m.roi_heads) for m in _networks(student))
        for part in student.distiller.box.parts:
            pair = part.stages
            layers = ours[pair.student].layers, theirs[pair.teacher].layers
            of = f" of stage {pair.teacher + 1}" if len(theirs) > 1 else ""
            name = f"cross-head {pair.name}".rstrip()
            lines += _describe_fusion(name, part.fusion, *layers, of=of)
        return lines
    ours, theirs = (towers_of(m.head) for m in _networks(student))
    for tower, fusion in student.distiller.fusion.items():
        lines += _describe_fusion(f"{tower} tower", fusion, ours[tower], theirs[tower])
    return lines


def _networks(student: Student) -> tuple:
    return student, student.teacher.model


def _describe_fusion(
    name: str, fusion: FeatureFusion, ours: NamedLayers, theirs: NamedLayers, *, of: str = ""
) -> List[tuple]:
    shapes = {tap: _text(ours.shapes[tap]) for tap in fusion.taps}
    detached = {tap: ", detached" if tap in fusion.detach else "" for tap in fusion.taps}
    taps = [f"{tap} ({shape}{detached[tap]})" for tap, shape in shapes.items()]
    is_combined = "combined" in fusion.terms and len(taps) > 1
    route = fusion.route if is_combined or len(taps) == 1 else f"each {fusion.route}"
    route = "" if fusion.taps == (fusion.entry,) else route  # both are the same
    made = [type(fusion.combine).__name__] if is_combined else []
    made += [] if fusion.align == "none" else [fusion.align]
    entry = f"the teacher's {fusion.entry} ({_text(theirs.shapes[fusion.entry])}){of}"
    after = theirs.names[theirs.depth(fusion.entry) + 1 :]
    then = "".join(f"{layer}, " for layer in after) + "predictor"
    learned = {f"adapter of {tap}": module for tap, module in fusion.adapters.items()}
    learned["combination"] = fusion.combine
    counts = {what: count_parameters(module) for what, module in learned.items()}
    learns = ", ".join(f"{what} {count:,}" for what, count in counts.items() if count)
    said = {"combined": fusion.taps[0]} if len(taps) == 1 else {}
    terms = ", ".join(
        f"{weight:g} x {said.get(term, term)}" for term, weight in fusion.terms.items()
    )
    way = [", ".join(taps), route, ", ".join(made), entry, f"its {then}"]
    return [
        (name, " -> ".join(filter(None, way))),
        ("terms", terms or "none"),
        ("adapters", f"{learns} parameters" if learns else "none: the shapes agree"),
    ]


def _text(shape: Shape) -> str:
    # A tower's map has any size.
    return f"{shape[0]} channels" if shape[1:] == (0, 0) else "x".join(map(str, shape))


def _describe_losses(student: Student, cfg: CfgNode) -> str:
    loss = cfg.MODEL.CROSSKD.LOSS
    is_two_stage = hasattr(student, "roi_heads")
    box_type = loss.BOX_TYPE or ("l1" if is_two_stage else student.kd_box_type)
    has_softmax = is_two_stage and not any(
        stage.predictor.use_sigmoid_ce for stage in box_stages(student.teacher.model.roi_heads)
    )
    combined = ", all levels added" if loss.FEATURE_COMBINE else ", level with level"
    softmax = f"{loss.CLS_TYPE}, temperature {loss.TEMPERATURE:g}"
    notes: Dict[str, str] = {
        "CLS_WEIGHT": softmax if has_softmax else "quality focal",
        "BOX_WEIGHT": box_type,
        "FEATURE_WEIGHT": ", ".join([loss.FEATURE_TYPE + combined, *loss.FEATURE_LEVELS]),
    }
    found = []
    for key, value in loss.items():
        has_no_masks = key == "MASK_WEIGHT" and not cfg.MODEL.MASK_ON
        is_loss = key.endswith("_WEIGHT") and key != "FUSED_WEIGHT"  # which the terms tell
        if is_loss and value and not has_no_masks:
            note = f" ({notes[key]})" if key in notes else ""
            found.append(f"{key[: -len('_WEIGHT')].lower()} {value:g}{note}")
    return ", ".join(found) or "none"


def _describe_schedule(schedule: CfgNode) -> str:
    start, warmup, stop = schedule.START_ITER, schedule.WARMUP_ITERS, schedule.STOP_ITER
    rise = f", rising over {warmup} iterations" if warmup > 0 else ""
    end = f"to iteration {stop}" if stop >= 0 else "to the end"
    return f"from iteration {start}{rise}, {end}"


def _describe_classes(student: Student, cfg: CfgNode) -> str:
    ours, theirs = (num_classes(model) for model in _networks(student))
    names = class_names(cfg)
    shown = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    kind = tuple(teacher_configs(cfg)[0][1].MODEL.CROSSKD.TEACHER.CLASS_MAP)
    relation = f"TEACHER.CLASS_MAP {kind}" if kind else "in the same order"
    return f"the student's {ours}{shown}, the teacher's {theirs}, {relation}"
