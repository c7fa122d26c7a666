"""Where the feature pyramids of a student and its teacher respond differently.

Shape shorthand: C channels, (H, W) an image in the network's pixels, (Hl, Wl) a level's map, S its
stride.
"""

from typing import Dict, Mapping, Sequence, Tuple

import numpy as np
import torch
from detectron2.data.detection_utils import read_image

from ..common.plotting import pyplot, save_figure
from ..config import ConfigError
from ..modeling.rcnn import CrossKDRCNN


def attention_difference(
    student: torch.Tensor, teacher: torch.Tensor, size: Tuple[int, int], stride: int
) -> torch.Tensor:
    """Where one level of the student responds more, or less, than the teacher's.

    ``D = A(student) / mean(A(student)) - A(teacher) / mean(A(teacher))`` with the spatial attention
    ``A(x) = mean over channels of |x|`` of FGD (Yang et al., 2022, "Focal and Global Knowledge
    Distillation for Detectors"), which puts it through a softmax instead of dividing by its mean.
    Neither channels nor scales need to agree. The means over positions leave out the padding,
    of which the networks may have different amounts.

    Args:
        student: (Cs, Hl, Wl) features of one image, padding included.
        teacher: (Ct, Hl', Wl'), likewise.
        size: (H, W) of the image without padding.
        stride: S of the level.

    Returns:
        (ceil(H / S), ceil(W / S)) float32 of mean 0, in units of each network's mean response. A
        level that is all zeros counts as a response of 0.
    """
    rows, columns = (-(-length // stride) for length in size)
    ours, theirs = (
        x[:, :rows, :columns].float().abs().mean(dim=0) for x in (student, teacher)  # Hl x Wl
    )
    tiny = torch.finfo(torch.float32).tiny
    return ours / ours.mean().clamp(min=tiny) - theirs / theirs.mean().clamp(min=tiny)


def shared_levels(student: CrossKDRCNN) -> Dict[str, int]:
    """The strides of the levels that student and teacher have under the same name and with the same
    stride."""
    theirs = student.teacher.model.backbone.output_shape()
    return {
        name: shape.stride
        for name, shape in student.backbone.output_shape().items()
        if name in theirs and theirs[name].stride == shape.stride
    }


@torch.no_grad()
def feature_differences(student: CrossKDRCNN, image: Dict) -> Dict[str, np.ndarray]:
    """:func:`attention_difference` of one image on all :func:`shared_levels`.

    Args:
        student: in evaluation mode, with a teacher attached.
        image: raw, as one of a test loader's batch.
    """
    ours = student.backbone(student.preprocess_image([image]).tensor)
    theirs = student.teacher.features([image])
    size = tuple(image["image"].shape[-2:])
    return {
        level: attention_difference(ours[level][0], theirs[level][0], size, stride).cpu().numpy()
        for level, stride in shared_levels(student).items()
    }


def compare_features(student: CrossKDRCNN, inputs: Sequence[dict], path: str) -> None:
    """Write a grid with an image per row and a level per column: the maps of
    :func:`attention_difference` over the grey images, all in the same colours, which end at the
    99th percentile of all absolute differences.

    Args:
        student: with a teacher attached; it is put into evaluation mode.
        inputs: the images, as detectron2's test mapper gives them, "file_name" included.
        path: PNG to write.

    Raises:
        ConfigError: if the networks share no level.
    """
    levels = shared_levels(student)
    if not levels:
        raise ConfigError(
            f"the student and its teacher ({student.teacher.description}) have no feature level of "
            "the same name and stride, so there is no map to draw"
        )
    student.eval()
    pictures = [read_image(one["file_name"], "RGB") for one in inputs]
    maps = [feature_differences(student, one) for one in inputs]
    values = np.concatenate([m.ravel() for row in maps for m in row.values()])
    limit = float(np.percentile(np.abs(values), 99)) or 1.0
    sizes = [tuple(one["image"].shape[-2:]) for one in inputs]
    _draw_maps(list(zip(pictures, sizes, maps)), levels, limit, path)


def _draw_maps(
    rows: Sequence[Tuple[np.ndarray, Tuple[int, int], Mapping[str, np.ndarray]]],
    levels: Mapping[str, int],
    limit: float,
    path: str,
) -> None:
    """Rows are an (., ., 3) RGB picture, the (H, W) that the maps belong to, and level -> map."""
    plt = pyplot()
    ratios = [height / width for _, (height, width), _ in rows]
    figure, axes = plt.subplots(
        len(rows),
        1 + len(levels),
        figsize=(max(2.4 * (1 + len(levels)), 6.5), 2.3 * sum(ratios) + 0.2 * len(rows) + 1.7),
        height_ratios=ratios,
        squeeze=False,
        layout="constrained",
    )
    for line, (picture, (height, width), maps) in zip(axes, rows):
        line[0].imshow(picture)
        line[0].set_axis_off()
        for axis, (level, stride) in zip(line[1:], levels.items()):
            extent = (0, width, height, 0)
            axis.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=extent)
            map_height, map_width = (stride * n for n in maps[level].shape)
            colored = axis.imshow(
                maps[level],
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                alpha=0.6,
                interpolation="bilinear",
                extent=(0, map_width, map_height, 0),
            )
            # The last cells may reach over the border. Hide the frame, but not the label below.
            axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], frame_on=False)
            axis.set_xlabel(f"mean |difference| {np.abs(maps[level]).mean():.2f}", fontsize=8)
    titles = ("image", *(f"{name}, stride {stride}" for name, stride in levels.items()))
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=12)
    # Below: as wide as the levels, where a height would depend on the photos.
    bar = figure.colorbar(
        colored, ax=axes, location="bottom", extend="both", aspect=60, shrink=0.8, pad=0.02
    )
    bar.set_label("teacher responds more  ←   difference   →  student responds more")
    figure.suptitle("Spatial attention relative to its mean, student minus teacher", fontsize=13)
    save_figure(figure, path)
