#!/usr/bin/env python
"""AP and speed of exported students: trains a student of each detector, exports it, measures.

    python benchmarks/deployment/measure.py ap       # 10 minutes of two CPU cores
    python benchmarks/deployment/measure.py speed    # 3 minutes more; only on a quiet machine

What is trained already is kept. Writes a JSON of each detector beside this file, by
tools/evaluate_export.py, and the tables of docs/deploy.md from all that are there.
"""

import argparse
import glob
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PAGE = os.path.join(ROOT, "docs", "deploy.md")
SHORTER = "SOLVER.MAX_ITER", "220", "SOLVER.STEPS", "(154, 198)"
# Name -> title, config below configs/quick, further settings.
STUDENTS = {
    "faster_rcnn": ("Faster R-CNN", "faster_rcnn_R_18_shapes", ()),
    "mask_rcnn": ("Mask R-CNN", "mask_rcnn_R_18_shapes", ()),
    "cascade_rcnn": ("Cascade R-CNN", "cascade_rcnn_R_18_shapes", ()),
    "retinanet": ("RetinaNet", "retinanet_R_18_shapes", SHORTER),
    "fcos": ("FCOS", "fcos_R_18_shapes", ()),
    "mobilenet": ("Faster R-CNN, MobileNetV3", "faster_rcnn_mobilenetv3_large_shapes", ()),
    "efficientnet": ("Faster R-CNN, EfficientNet-B0", "faster_rcnn_efficientnet_b0_shapes", ()),
}
TEACHER = "teacher", "faster_rcnn_R_34_shapes", ()
FORMATS = {"torchscript": (), "onnx": (), "int8": ("--int8",)}


def run(*words):
    """One of the tools, from the repository's root."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        sys.exit(f"failed: {' '.join(words)}")


def trained(folder, config, opts):
    """The checkpoint of a run, which is trained if it isn't there."""
    checkpoint = os.path.join(folder, "model_final.pth")
    if not os.path.exists(os.path.join(ROOT, checkpoint)):
        words = ["tools/train_net.py", "--resume", "--config-file", f"quick/{config}.yaml"]
        run(*words, *opts, "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", folder)
    return checkpoint


def exported(folder, checkpoint):
    """The folders of all formats."""
    folders = {kind: f"{folder}_{kind}" for kind in FORMATS}
    for kind, options in FORMATS.items():
        if not os.path.exists(os.path.join(ROOT, folders[kind])):
            format = "torchscript" if kind == "torchscript" else "onnx"
            words = ["tools/export_student.py", checkpoint, folders[kind], "--format", format]
            run(*words, *options)
    return [*folders.values()]


def measure(args):
    common = ["--dataset", "crosskd_shapes_test"]
    for name in args.only or STUDENTS:
        title, config, opts = STUDENTS[name]
        folder = os.path.join(args.output, name)
        checkpoint = trained(folder, config, opts)
        folders = exported(folder, checkpoint)
        words = ["tools/evaluate_export.py", *folders, *common, "--checkpoint", checkpoint]
        words += ["--json", f"benchmarks/deployment/{name}_{args.what}.json"]
        if args.what == "speed":
            words += ["--speed", str(args.rounds), "--threads", str(args.threads)]
        else:  # what int8 costs is the question; the test of docs/deploy.md looks at the others
            words += ["--tolerance", "5"]
        if args.what == "speed" and name == "faster_rcnn":
            _, config, opts = TEACHER
            words += ["--teacher", args.teacher or trained(f"{args.output}/teacher", config, opts)]
        run(*words)


def recorded(what):
    """Title of a detector -> what was measured, of those that are there."""
    found = {}
    for name, (title, _, _) in STUDENTS.items():
        for path in glob.glob(os.path.join(HERE, f"{name}_{what}.json")):
            with open(path) as f:
                found[title] = json.load(f)
    return found


def ap_table():
    lines = ["| student | | checkpoint | TorchScript | ONNX | int8 | MB, ONNX / int8 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for title, found in recorded("ap").items():
        results, size = found["results"], found["bytes"]
        for task, what in (("bbox", "boxes"), ("segm", "masks")):
            if task in results["checkpoint"]:
                aps = " | ".join(f"{results[x][task]['AP']:.2f}" for x in ("checkpoint", *FORMATS))
                sizes = " / ".join(f"{size[x] / 1e6:.1f}" for x in ("onnx", "int8"))
                lines.append(f"| {title} | {what} | {aps} | {sizes} |")
    return lines


def speed_table():
    kinds = ("teacher", "checkpoint", *FORMATS)
    lines = [
        "| student | teacher | student | TorchScript | ONNX | int8 |",
        "|---|---|---|---|---|---|",
    ]
    for title, found in recorded("speed").items():
        speeds = found["images_per_second"]
        cells = (f"{speeds[kind]['median']:.1f}" if kind in speeds else "" for kind in kinds)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def write_tables():
    """Put the tables in their places in docs/deploy.md."""
    with open(PAGE) as f:
        text = f.read()
    for what, table in (("ap", ap_table()), ("speed", speed_table())):
        begin, end = (
            f"<!-- {what}: benchmarks/deployment/measure.py -->\n",
            f"<!-- end of {what} -->",
        )
        rows = "\n".join(table) if len(table) > 2 else "Not measured yet."
        text, count = re.subn(
            f"{begin}.*?{end}", f"{begin}\n{rows}\n\n{end}", text, flags=re.DOTALL
        )
        assert count == 1, f"{PAGE} has no place for the table {what}"
    with open(PAGE, "w") as f:
        f.write(text)
    print(f"Wrote the tables of {os.path.relpath(PAGE)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ap", "speed", "tables"), help="tables: measure nothing")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, help="these students")
    parser.add_argument("--output", default="output/deployment", help="folder for runs and exports")
    parser.add_argument("--teacher", default="", help="a checkpoint; else it is trained, too")
    parser.add_argument("--rounds", type=int, default=20, help="of speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of speed")
    args = parser.parse_args()
    if args.what != "tables":
        measure(args)
    write_tables()


if __name__ == "__main__":
    main()
