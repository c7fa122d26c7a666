"""A data set's class balance and box sizes as a picture: they decide anchors and image sizes."""

import math
import os

from PIL import Image

from ..common.plotting import literal, pyplot, save_figure
from .findings import Findings

_MOST_CLASSES = 40


def refuse_other_files(path: str) -> None:
    """Refuses a file that isn't a picture of :func:`draw_histograms`, and would be replaced.

    Raises:
        ValueError: the name doesn't end in .png.
        FileExistsError: it is another file.
    """
    if not path.endswith(".png"):
        raise ValueError(f"--picture {path}: expected a name that ends in .png")
    if os.path.lexists(path) and "Matplotlib" not in _software(path):
        raise FileExistsError(f"--picture {path}: this is a file that check didn't draw")


def _software(path: str) -> str:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return str(image.info.get("Software", ""))
    except Exception:  # no image, or one that is broken
        return ""


def draw_histograms(report: Findings, path: str) -> None:
    """Draws boxes of each class, and sizes of boxes, for each split.

    Args:
        report: of a check.
        path: PNG file.
    """
    plt = pyplot()
    splits = list(report.counts)
    total = {i: sum(report.counts[s][i] for s in splits) for i in range(len(report.classes))}
    shown = sorted(total, key=lambda i: -total[i])[:_MOST_CLASSES]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, max(3.5, 1.5 + 0.24 * len(shown))), layout="constrained"
    )
    starts = [0] * len(shown)
    for split in splits:
        counts = [report.counts[split][i] for i in shown]
        left.barh(range(len(shown)), counts, left=starts, label=split)
        starts = [a + b for a, b in zip(starts, counts)]
    names = [literal(report.classes[i][:30]) for i in shown]
    left.set_yticks(range(len(shown)), names)
    left.invert_yaxis()
    left.set_xlabel("boxes")
    more = len(total) - len(shown)
    left.set_title(f"classes{f' (the {len(shown)} most frequent of {len(total)})' if more else ''}")
    left.legend()
    sizes = {s: [math.sqrt(w * h) for w, h in report.sizes[s] if w > 0 and h > 0] for s in splits}
    everything = [size for found in sizes.values() for size in found]
    if everything:
        low, high = math.log2(min(everything)), math.log2(max(everything))
        bins = [2 ** (low + (high - low) * i / 30) for i in range(31)] if high > low else 10
        shown_sizes = [sizes[s] for s in splits]
        right.hist(shown_sizes, bins=bins, stacked=True, label=splits)
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter("{x:g}")
        right.legend()
    right.set_xlabel("root of a box's area, pixels")
    right.set_title("box sizes")
    save_figure(figure, path)
