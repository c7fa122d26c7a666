"""matplotlib without a screen. Imported when it is used: training needs none."""

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


def save_figure(figure, path: str) -> None:
    with PathManager.open(path, "wb") as f:
        figure.savefig(f, format="png", dpi=100)
    pyplot().close(figure)
