"""matplotlib without a screen. Imported when it is used: training needs none."""

import textwrap

from detectron2.utils.file_io import PathManager


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def literal(text: str) -> str:
    """A text that matplotlib shows as it is: it would read what stands between two ``$`` as a
    formula. For names that users choose, such as those of classes and runs."""
    return text.replace("$", r"\$")


def set_title(figure, text: str) -> None:
    """A title above a figure, in lines that its width has room for."""
    room = int(11.5 * figure.get_figwidth())  # characters of this size
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, room)]
    figure.suptitle("\n".join(lines), fontsize=11)


def save_figure(figure, path: str) -> None:
    with PathManager.open(path, "wb") as f:
        figure.savefig(f, format="png", dpi=100)
    pyplot().close(figure)
