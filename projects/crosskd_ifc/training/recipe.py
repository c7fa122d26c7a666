"""Configs of a teacher, a plain and a distilled student for a dataset card, sized to its data."""

import os
import shlex
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import yaml
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from torchvision.models import ResNet18_Weights, ResNet34_Weights

from ..common.command_line import tool_command
from ..common.files import replacing
from ..common.paths import REPO_CONFIGS, resolve_path
from ..data.card import load_card
from ..data.cards import drop_degenerate_boxes, register_card
from ..data.findings import COUNTED
from ..data.mapper import SampleError
from ..data.outlines import check_outlines

BACKBONES = {"R18": 18, "R34": 34, "R50": 50, "R101": 101}
# detector -> (config to start from, architecture that distils, learning rate of 16 images)
DETECTORS: Dict[str, Tuple[str, str, float]] = {
    "faster_rcnn": ("Base-RCNN-FPN.yaml", "CrossKDRCNN", 0.02),
    "mask_rcnn": ("Base-RCNN-FPN.yaml", "CrossKDRCNN", 0.02),
    "retinanet": ("Base-RetinaNet.yaml", "CrossKDRetinaNet", 0.01),
    "fcos": ("Base-FCOS.yaml", "CrossKDFCOS", 0.01),
}
_NAMES = ("teacher", "student", "distilled")
_IMAGES_PER_GPU = 4
_SHORTEST, _LONGEST = 800, 1333  # detectron2's test size
_CPU_SHORTEST = 240
_EPOCHS = {True: 24, False: 72}  # detectron2's 2x and 6x, for few images never less than:
_STEPS = {True: 2000, False: 4000}


def write_configs(
    card: str,
    output: str,
    *,
    teacher: str,
    student: str,
    detector: str = "faster_rcnn",
    pretrained: bool = True,
    gpus: int = 1,
    force: bool = False,
) -> str:
    """Writes base.yaml, and teacher.yaml, student.yaml and distilled.yaml over it.

    Args:
        card: a dataset card; trains on its split train and tests on val (else test, or the last);
            else trains on trainval, which holds val, and tests on test (else val); else trains on
            the first.
        output: folder for the configs. The trainings' folders lie in it, too.
        teacher, student: of `BACKBONES`.
        detector: of `DETECTORS`, for both.
        pretrained: start from ImageNet weights, else from random ones.
        gpus: 0 for a CPU.
        force: replace existing configs.

    Returns:
        What was chosen and why, and the commands to run, for people.

    Raises:
        ValueError: naming the card, the file, or the option.
        FileExistsError: a config exists.
    """
    if gpus < 0:
        raise ValueError(f"--gpus {gpus}: expected 0 (a CPU) or more")
    path = resolve_path(card, what="dataset card", key="configs")
    train, test, why = _splits(path)
    records, _ = drop_degenerate_boxes(DatasetCatalog.get(train))
    records = [record for record in records if record["annotations"]]
    if not records:
        raise ValueError(f"{card}: there is no box to train on in {train}")
    masks = _mask_settings(records) if detector == "mask_rcnn" else {}
    folder = os.path.realpath(output)
    files = {name: os.path.join(folder, f"{name}.yaml") for name in ("base", *_NAMES)}
    for file in files.values():
        if os.path.lexists(file) and not force:
            raise FileExistsError(f"{file} exists; give another --output, or --force")

    base, notes = _base(records, detector, pretrained=pretrained, gpus=gpus)
    base["DATASETS"] = {"CARDS": [path], "TRAIN": [train], "TEST": [test]}
    notes += [f"Evaluations: on {test}, {why}."] if why else []
    most = max(len(x["annotations"]) for name in (train, test) for x in DatasetCatalog.get(name))
    if most > COUNTED:
        base["TEST"]["DETECTIONS_PER_IMAGE"] = limit = -(-3 * most // 200) * 100
        notes.append(
            f"Up to {most} objects in an image: a detector gives up to {limit} detections, and the "
            "AP counts as many (COCO's own counts 100)."
        )
    for section, settings in masks.items():
        base[section].update(settings)
    outputs = {name: os.path.join(folder, "output", name) for name in _NAMES}
    weights = {name: os.path.join(outputs[name], "model_final.pth") for name in _NAMES}
    distilling = _distilling(detector, files["teacher"], weights["teacher"])
    deltas: Dict[str, Dict[str, Any]] = {
        "teacher": {"_BASE_": "base.yaml", **_backbone(teacher, pretrained)},
        "student": {"_BASE_": "base.yaml", **_backbone(student, pretrained)},
        "distilled": {"_BASE_": "student.yaml", "MODEL": distilling},
    }

    train_net = tool_command("train_net") + (f" --num-gpus {gpus}" if gpus > 1 else "")
    commands = {n: f"{train_net} --config-file {shlex.quote(files[n])}" for n in _NAMES}
    converting = {n: _convert(n) if pretrained else "" for n in (teacher, student)}
    headers = {
        "teacher": [f"Teacher, {detector} {teacher}-FPN.", converting[teacher]],
        "student": [f"Plain student, {detector} {student}-FPN.", converting[student]],
        "distilled": [
            f"Distilled student, {detector} {student}-FPN, by {_method(detector)}. "
            "Train the teacher first."
        ],
    }
    os.makedirs(folder, exist_ok=True)
    head = f"What the configs beside this one share: {detector} for {train}.\n" + "\n".join(notes)
    _write(files["base"], head, base)
    for name in _NAMES:
        header = "\n  ".join(line for line in (*headers[name], commands[name]) if line)
        _write(files[name], header, {**deltas[name], "OUTPUT_DIR": outputs[name]})
    notes.append(f"Distillation: {_method(detector)}.")
    alone = os.path.join(folder, "student_alone")
    steps = [
        *sorted({command for command in converting.values() if command}),
        *commands.values(),
        f"{tool_command('export_student')} {shlex.join([weights['distilled'], alone])}",
        f"{tool_command('predict')} {shlex.quote(alone)} YOUR_OTHER_PHOTOS",
    ]
    told = [*notes, "", *(f"Wrote {file}" for file in files.values()), "", "Next, in this order:"]
    return "\n".join([*told, *(f"  {step}" for step in steps)])


def _splits(card: str) -> Tuple[str, str, str]:
    """The data sets of a card to train and to test on, and why the latter isn't an apart val."""
    names = dict(zip(load_card(card).splits, register_card(card)))
    first, last = [*names.values()][0], [*names.values()][-1]
    train = next((names[s] for s in ("train", "trainval") if s in names), first)
    has_all = train == names.get("trainval")  # val's images, too
    tests = ("test", "val") if has_all else ("val", "test")
    test = next((names[s] for s in tests if s in names), last)
    if train == test:
        return train, test, "too: there is no other split. They say little"
    if test == names.get("val"):
        return train, test, f"whose images {train} has too. They say little" if has_all else ""
    return train, test, f"since {'trainval holds val' if has_all else 'there is no val'}"


def _mask_settings(records: Sequence[dict]) -> Dict[str, Dict[str, Any]]:
    """What Mask R-CNN needs beyond Faster R-CNN.

    Raises:
        ValueError: an object has no usable outline.
    """
    outlines = [a.get("segmentation") for r in records for a in r["annotations"]]
    mask_format = "bitmask" if any(isinstance(x, dict) for x in outlines) else "polygon"
    try:
        check_outlines(records, polygons=mask_format == "polygon")
    except SampleError as error:
        raise ValueError(f"--detector mask_rcnn: {error}") from error
    head = {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 4, "POOLER_RESOLUTION": 14}
    return {
        "MODEL": {"MASK_ON": True, "ROI_MASK_HEAD": head},
        "INPUT": {"MASK_FORMAT": mask_format},
    }


def _base(
    records: Sequence[dict], detector: str, *, pretrained: bool, gpus: int
) -> Tuple[Dict[str, Any], List[str]]:
    """Settings that all configs share, and a line on each choice."""
    start, _, full_rate = DETECTORS[detector]
    with open(os.path.join(REPO_CONFIGS, start), encoding="utf-8") as f:
        cfg = yaml.safe_load(f)
    model = cfg["MODEL"]
    short, long, told = _image_size(records, gpus)
    notes = [told]
    boxes = _scaled_boxes(records, short, long)
    if detector != "fcos":
        anchors, told = _anchors(boxes, detector == "retinanet")
        model["ANCHOR_GENERATOR"] = anchors
        notes.append(told)
    batch = min(16, _IMAGES_PER_GPU * max(gpus, 1)) if gpus <= 4 else _IMAGES_PER_GPU * gpus
    steps = max(_STEPS[pretrained], int(round(_EPOCHS[pretrained] * len(records) / batch, -2)))
    rate = round(full_rate * batch / 16, 6)
    notes.append(
        f"Schedule: {steps} steps of {batch} images ({steps * batch / len(records):.0f} epochs of "
        f"{len(records)} images), learning rate {rate:g}: {full_rate:g} for 16 "
        "images, in proportion."
    )
    cfg["SOLVER"] = {
        "IMS_PER_BATCH": batch,
        "BASE_LR": rate,
        "MAX_ITER": steps,
        "STEPS": [int(steps * 0.7), int(steps * 0.9)],
        "WARMUP_ITERS": min(1000, steps // 10),
        "CHECKPOINT_PERIOD": max(steps // 5, 1),
        "CLIP_GRADIENTS": {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 10.0},
    }
    cfg["INPUT"] = {
        "MIN_SIZE_TRAIN": _several_sizes(short) if pretrained and gpus else [short],
        "MAX_SIZE_TRAIN": long,
        "MIN_SIZE_TEST": short,
        "MAX_SIZE_TEST": long,
    }
    cfg["TEST"] = {"EVAL_PERIOD": max(steps // 5, 1)}
    if not gpus:
        model["DEVICE"] = "cpu"
        cfg["DATALOADER"] = {"NUM_WORKERS": 0}
    if pretrained:
        notes.append(
            "Pretrained: the first two stages stay frozen, and all BatchNorm (detectron2's usual)."
        )
        return cfg, notes
    norm = "SyncBN" if gpus > 1 else "BN"
    model.update(
        WEIGHTS="",
        PIXEL_STD=[57.375, 57.12, 58.395],
        BACKBONE={**model["BACKBONE"], "FREEZE_AT": 0},
    )
    model["RESNETS"].update(NORM=norm, STRIDE_IN_1X1=False)
    model["FPN"]["NORM"] = norm
    if detector == "retinanet":
        model["RETINANET"]["NORM"] = "GN"  # without one, towers hardly learn from scratch
    notes.append(f"From scratch: nothing is frozen, and {norm} in backbone and pyramid.")
    return cfg, notes


def _image_size(records: Sequence[dict], gpus: int) -> Tuple[int, int, str]:
    """The short and the longest side of images in training and test, and why."""
    sizes = np.array([(r["width"], r["height"]) for r in records])
    median = float(np.median(sizes.min(axis=1)))
    ratio = float(np.quantile(sizes.max(axis=1) / sizes.min(axis=1), 0.95))
    limit = _SHORTEST if gpus else _CPU_SHORTEST
    short = int(min(limit, max(64, 32 * round(median / 32))))
    long = int(min(32 * np.ceil(short * ratio / 32), max(2 * short, _LONGEST * short / _SHORTEST)))
    why = "" if short < limit else f", at most {limit}{'' if gpus else ' on a CPU'}"
    told = f"Images: short side {short} (theirs is {median:.0f} in the median{why}), long side up "
    return short, long, told + f"to {long}."


def _several_sizes(short: int) -> List[int]:
    """detectron2's scale augmentation: from four fifths of the size up."""
    return [int(round(short * k / 25)) for k in (20, 21, 22, 23, 24, 25)]


def _scaled_boxes(records: Sequence[dict], short: int, long: int) -> np.ndarray:
    """(N, 2) widths and heights of boxes in pixels of the resized images."""
    found = []
    for record in records:
        w, h = record["width"], record["height"]
        scale = min(short / min(w, h), long / max(w, h))
        for annotation in record["annotations"]:
            mode = annotation["bbox_mode"]
            x, y, w, h = BoxMode.convert(annotation["bbox"], mode, BoxMode.XYWH_ABS)
            found.append((scale * w, scale * h))
    return np.array(found, dtype=np.float64)


def _anchors(boxes: np.ndarray, three_to_a_level: bool) -> Tuple[Dict[str, Any], str]:
    """Anchors whose sizes are closest to those of the boxes, and the boxes' sizes in words.

    Each of five levels has twice the size of the one below; RetinaNet's have three sizes each.
    """
    sizes = np.sqrt(boxes.prod(axis=1))
    steps = [2 ** (i / 3) for i in range(3)] if three_to_a_level else [1]
    best = (np.inf, 0)
    for first in (32, 24, 16, 12, 8):  # of equally good ones detectron2's, which is the first
        all_sizes = np.array([first * 2**level * k for level in range(5) for k in steps])
        distance = np.abs(np.log2(sizes[:, None] / all_sizes)).min(axis=1).mean()
        best = min(best, (round(float(distance), 3), -first))
    first = -best[1]
    anchors = [[round(first * 2**level * k, 2) for k in steps] for level in range(5)]
    low, middle, high = np.quantile(sizes, (0.05, 0.5, 0.95))
    wide, tall = np.quantile(boxes[:, 1] / boxes[:, 0], (0.05, 0.95))
    ratios = [0.5, 1.0, 2.0]
    ratios = [0.25, *ratios] if wide < 0.35 else ratios
    ratios = [*ratios, 4.0] if tall > 1 / 0.35 else ratios
    told = (
        f"Anchors: sizes {', '.join(f'{level[0]:g}' for level in anchors)}"
        f"{' and two between each' if three_to_a_level else ''}, height/width "
        f"{', '.join(f'{r:g}' for r in ratios)}: boxes (root of the area, resized) are {low:.0f}, "
        f"{middle:.0f}, {high:.0f} at 5, 50, 95 %, height/width {wide:.2f} to {tall:.2f}."
    )
    return {"SIZES": anchors, "ASPECT_RATIOS": [ratios]}, told


def _backbone(name: str, pretrained: bool) -> Dict[str, Any]:
    depth = BACKBONES[name]
    resnets: Dict[str, Any] = {"DEPTH": depth}
    if depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64  # detectron2 builds R18 and R34 with 64 only
    if not pretrained:
        return {"MODEL": {"RESNETS": resnets}}
    if depth >= 50:
        weights = f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
        return {"MODEL": {"WEIGHTS": weights, "RESNETS": resnets}}
    # torchvision's input: RGB, with its own mean and std, here on the scale 0..255.
    resnets["STRIDE_IN_1X1"] = False
    model = {"WEIGHTS": f"weights/R-{depth}.pth", "RESNETS": resnets}
    model.update(PIXEL_MEAN=[123.675, 116.28, 103.53], PIXEL_STD=[58.395, 57.12, 57.375])
    return {"MODEL": model, "INPUT": {"FORMAT": "RGB"}}


_TORCHVISION = {
    "R18": ResNet18_Weights.IMAGENET1K_V1.url,
    "R34": ResNet34_Weights.IMAGENET1K_V1.url,
}


def _convert(backbone: str) -> str:
    """The command that makes ImageNet weights which detectron2 doesn't have; else ""."""
    if backbone not in _TORCHVISION:
        return ""
    out = f"weights/R-{BACKBONES[backbone]}.pth"
    return f"{tool_command('convert_weights')} {_TORCHVISION[backbone]} {out}"


def _distilling(detector: str, teacher: str, weights: str) -> Dict[str, Any]:
    """What makes a student distil from this teacher, with the default: docs/choosing.md."""
    architecture = DETECTORS[detector][1]
    heads = {"ROI_HEADS": {"NAME": "CrossKDROIHeads"}} if architecture == "CrossKDRCNN" else {}
    teaching = {"TEACHER": {"CONFIG_FILE": teacher, "WEIGHTS": weights}}
    return {"META_ARCHITECTURE": architecture, **heads, "CROSSKD": teaching}


def _method(detector: str) -> str:
    losses = "a loss for each of several layers" if "rcnn" in detector else "the mean of layers"
    return f"CrossKD-IFC, {losses}"


def _write(path: str, header: str, content: Dict[str, Any]) -> None:
    """A YAML file whose lists of numbers stand in one line, below a comment."""
    text = "".join(f"# {line}\n" for line in header.split("\n"))
    text += yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    with replacing(path) as f:
        f.write(text.encode())


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True)
)
