"""Images that an exported file and its student are compared on, and those it is calibrated on."""

from typing import List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..common.paths import resolve_path
from ..config import ConfigError
from ..data.cards import register_cards
from ..data.mapper import CheckedMapper
from .deployed import Info


def sample_images(cfg: CfgNode, info: Info, files: Sequence[str] = ()) -> List[torch.Tensor]:
    """Images to compare on, as a deployed model takes them, (3, h, w), of different sizes.

    Args:
        cfg: of the student.
        info: of the deployed model.
        files: the images; empty for the first eight of DATASETS.TEST.

    Raises:
        ConfigError: if there are neither files nor a data set.
        FileNotFoundError, ValueError: if a file is missing, or no image.
    """
    images = _read(cfg, info, files, "--images", "TEST", 8)
    first = images[0]
    # All may be of one size.
    return [*images, first[:, : first.shape[1] * 3 // 4]]


def calibration_images(cfg: CfgNode, info: Info, files: Sequence[str] = ()) -> List[torch.Tensor]:
    """Images to measure the range of activations on; as :func:`sample_images`, but the first 64 of
    DATASETS.TRAIN, and :meth:`Info.padded`."""
    return [info.padded(x) for x in _read(cfg, info, files, "--calibrate", "TRAIN", 64)]


def _read(
    cfg: CfgNode, info: Info, files: Sequence[str], option: str, split: str, count: int
) -> List[torch.Tensor]:
    records = [{"file_name": resolve_path(x, what="image", key=option)} for x in files]
    if not records:
        names = cfg.DATASETS[split]
        try:
            register_cards(cfg.DATASETS.CARDS)
            records = DatasetCatalog.get(names[0])[:count]
        except (IndexError, KeyError, OSError, ValueError) as error:
            reason = str(error.args[0]) if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"give images with objects by {option}; the data set of DATASETS.{split} {names} "
                f"is not at hand ({reason})"
            ) from error
    mapper = CheckedMapper(info.mapper(), check_image=True)
    return [mapper(record)["image"] for record in records]
