"""How the cost of a distillation step grows with the size of the work."""

import dataclasses
import logging
from typing import Any, Callable, Dict, List, Sequence

from ...common.plotting import pyplot, save_figure
from .step import Case, StepBenchmark, summarize_times

logger = logging.getLogger(__name__)
_FUSION = "MODEL.CROSSKD.FUSION."
_TAPS = ("pool", "fc1", "fc2"), ("conv1", "conv2", "conv3")


def sweep(build: Callable[..., StepBenchmark], case: Case, rounds: int) -> List[Dict[str, Any]]:
    """Vary image size, batch, RoIs (two-stage) and the number of taps, one at a time.

    Args:
        build: ``build(case, *opts)`` gives a bench.
        case: what the others stay at.
        rounds: of each measurement.

    Returns:
        "what" was varied, its "value", and what :func:`summarize_times` gives.
    """
    results = []

    def add(what: str, value: Any, bench: StepBenchmark) -> None:
        logger.warning(f"{what} {value}")
        results.append({"what": what, "value": value, **summarize_times(bench.measure(rounds, 1))})

    for scale in (0.5, 1.0, 1.5):
        size = {k: int(getattr(case, k) * scale) for k in ("height", "width")}
        add("image height", size["height"], build(dataclasses.replace(case, **size)))
    for images in (1, 2, 4):
        add("images", images, build(dataclasses.replace(case, images=images)))
    bench = build(case)
    two_stage = hasattr(bench.student, "roi_heads")
    if two_stage:
        for rois in (128, 256, 512):
            key = "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"
            add("RoIs per image", rois, build(case, key, str(rois)))
    for count in (1, 2, 3):
        taps = _TAPS[0][-count:] if two_stage else _TAPS[1][:count]
        opts = (_FUSION + "NAME", "sum", _FUSION + "IN_FEATURES", repr(tuple(taps)))
        add("taps", count, build(case, *opts, _FUSION + "ENTRY", "fc2" if two_stage else "conv3"))
    return results


def draw_sweep(results: Sequence[Dict[str, Any]], stem: str) -> str:
    """Plot the results of :func:`sweep` to ``stem.png``; returns its path."""
    plt = pyplot()
    kinds = list(dict.fromkeys(r["what"] for r in results))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.2), squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        rows = [r for r in results if r["what"] == kind]
        x = [r["value"] for r in rows]
        for ratio, label in (
            ("c/a", "distillation / plain"),
            ("(a+b)/a", "(plain + teacher) / plain"),
        ):
            y = [r["ratios"][ratio]["median"] for r in rows]
            low, high = zip(*(r["ratios"][ratio]["quartiles"] for r in rows))
            axis.fill_between(x, low, high, alpha=0.2)
            axis.plot(x, y, marker="o", label=label)
        axis.set(xlabel=kind, xticks=x)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time of a step / plain student's")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, f"{stem}.png")
    return f"{stem}.png"
