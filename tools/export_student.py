#!/usr/bin/env python
"""Writes a trained student alone: for stock detectron2, or as one TorchScript or ONNX file.

    python tools/export_student.py output/model_final.pth student
    python tools/export_student.py output/model_final.pth student-onnx --format onnx

Takes seconds. OUT is a folder to make. IN's config is the one in it, the
config.yaml beside it, or --config-file. A LazyConfig is code: name its .py file.
Before OUT appears, what is in it has found what the student finds: exactly, in stock detectron2; up
to rounding, as one file in its own runtime. Nothing is overwritten without --force. See
docs/deploy.md.
"""

import os
import shlex
import sys
from typing import List, Optional

from crosskd_ifc.common.command_line import tool_command, tool_parser
from crosskd_ifc.common.lazy_config import is_lazy
from crosskd_ifc.weights.export import FORMATS, export_student

YACS = """\
Use it wherever detectron2 is installed{own}:

    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    cfg = get_cfg()
    cfg.merge_from_file({config!r})
    cfg.MODEL.WEIGHTS = {weights!r}
    cfg.MODEL.DEVICE = "cpu"  # or "cuda"; else the training's
    detections = DefaultPredictor(cfg)(image)["instances"]  # image as from cv2.imread

Or look at what it finds: {predict}
"""
LAZY = """\
Use it wherever detectron2 is installed{own}:

    import torch
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate
    from detectron2.data.detection_utils import read_image
    from detectron2.data.transforms import ResizeShortestEdge

    cfg = LazyConfig.load({config!r})
    model = instantiate(cfg.model).eval()
    DetectionCheckpointer(model).load({weights!r})
    image = read_image("photo.jpg", format=cfg.input.format)
    resize = ResizeShortestEdge([cfg.input.min_size] * 2, cfg.input.max_size)
    small = resize.get_transform(image).apply_image(image).transpose(2, 0, 1)
    inputs = {{"image": torch.as_tensor(small.astype("float32").copy())}}
    inputs.update(height=image.shape[0], width=image.shape[1])  # boxes in pixels of the photo
    with torch.no_grad():
        detections = model([inputs])[0]["instances"]

Or look at what it finds: {predict}
"""
FILE = "docs/deploy.md has a program that runs it without detectron2 and torch.\n"


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("IN", help="a checkpoint written by train_net.py")
    parser.add_argument("OUT", help="a folder to make")
    parser.add_argument("--config-file", default="", help="the config IN was trained with")
    overrides = "of a LazyConfig (.py), in its syntax: those of its training"
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help=overrides)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="what to write")
    parser.add_argument("--images", nargs="+", default=[], help="compare on [DATASETS.TEST's]")
    size = dict(nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="fixed input [any]")
    parser.add_argument("--size", **size)
    parser.add_argument("--int8", action="store_true", help="quantize the ONNX file")
    parser.add_argument("--calibrate", nargs="+", default=[], help="with [DATASETS.TRAIN's]")
    parser.add_argument("--force", action="store_true", help="replace what was exported before")
    parser.add_argument("--safetensors", action="store_true", help="write these weights too")
    options = vars(parser.parse_args(argv))
    checkpoint, out = options.pop("IN"), options.pop("OUT")
    try:
        done = export_student(checkpoint, out, **options)
    except (ImportError, OSError, ValueError) as error:
        print(f"export_student: {error}", file=sys.stderr)
        return 1
    size = os.path.getsize(done.weights) / 1e6
    same = "exactly" if options["format"] == "detectron2" else "up to rounding"
    print(f"Verified: {done.detections} detections are {same} the student's")
    print(f"Wrote {done.weights}: {done.parameters / 1e6:.2f} M parameters, {size:.1f} MB")
    print(f"Wrote {done.config}: {' -> '.join(dict.fromkeys(done.architecture))}")
    print(f"Left out: {', '.join(done.dropped) or 'nothing'}\n")
    if options["int8"]:
        print("In int8 it finds something else: measure its AP by tools/evaluate_export.py\n")
    usage = FILE if same != "exactly" else LAZY if done.is_lazy else YACS
    own = f", with code of your own: {', '.join(done.own_code)}" if done.own_code else ""
    files = dict(config=done.config, weights=done.weights)
    print(usage.format(**files, own=own, predict=_predict(out, **options)))
    return 0


def _predict(out: str, config_file: str, overrides: List[str], **_) -> str:
    """How to look at what it finds. A LazyConfig student's config is code: its file is named."""
    more = ["--config-file", config_file] if is_lazy(config_file) else []
    more += ["--opts", *overrides] if overrides else []
    return f"{tool_command('predict')} {shlex.join([out, 'PHOTOS', *more])}"


if __name__ == "__main__":
    sys.exit(main())
