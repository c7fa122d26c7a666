"""Texts in figures."""

import matplotlib.pyplot as plt
import pytest

from crosskd_ifc.analysis.curves import plot_curves
from crosskd_ifc.common.plotting import literal, set_title


@pytest.mark.parametrize("text", ["$1 to $2", "a$b", r"$\frac$", "100 %", ""])
def test_a_text_is_shown_as_it_is(text):
    shown = plt.figure().text(0, 0, literal(text))
    assert shown._preprocess_math(shown.get_text()) == (text, False)


def test_titles_and_names_of_runs_may_hold_dollar_signs(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "loss_cls": 1.0}\n')
    runs = {r"$\frac$": str(tmp_path / "metrics.json")}
    plot_curves(runs, str(tmp_path / "x.png"), title=r"for $\frac$ and $x")  # formulas would raise


@pytest.mark.parametrize("width", [4, 6, 12])
def test_a_long_title_stays_inside_of_its_figure(width):
    figure = plt.figure(figsize=(width, 3), layout="constrained")
    set_title(figure, "Weights that make up for another divisor, " * 4 + "\nAP: mean of the seeds")
    figure.canvas.draw()
    shown = figure._suptitle.get_window_extent()
    assert 8 < shown.x0 and shown.x1 < figure.bbox.width - 8
    assert figure._suptitle.get_text().endswith("\nAP: mean of the seeds")
    plt.close(figure)
