"""Images that an exported file and its student are compared on."""

from typing import List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..common.paths import resolve_path
from ..config import ConfigError
from ..data.cards import register_cards
from ..data.mapper import CheckedMapper
from .deployed import Info

_COUNT = 8


def sample_images(cfg: CfgNode, info: Info, files: Sequence[str] = ()) -> List[torch.Tensor]:
    """Images as a deployed model takes them, (3, h, w), of different sizes.

    Args:
        cfg: of the student.
        info: of the deployed model.
        files: the images; empty for the first ones of DATASETS.TEST.

    Raises:
        ConfigError: if there are neither files nor a data set.
        FileNotFoundError, ValueError: if a file is missing, or no image.
    """
    records = [{"file_name": resolve_path(x, what="image", key="--images")} for x in files]
    records = records or _first_records(cfg)
    mapper = CheckedMapper(info.mapper(), check_image=True)
    images = [mapper(record)["image"] for record in records]
    first = images[0]
    # All may be of one size.
    return [*images, first[:, : first.shape[1] * 3 // 4]]


def _first_records(cfg: CfgNode) -> List[dict]:
    try:
        register_cards(cfg.DATASETS.CARDS)
        return DatasetCatalog.get(cfg.DATASETS.TEST[0])[:_COUNT]
    except (IndexError, KeyError, OSError, ValueError) as error:
        reason = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            "give images with objects by --images; the exported file is compared with the student "
            f"on them, since the data set of DATASETS.TEST {cfg.DATASETS.TEST} is not at hand "
            f"({reason})"
        ) from error
