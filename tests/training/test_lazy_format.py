"""The channel order of a LazyConfig's pictures, which its model may leave unsaid."""

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import DatasetEvaluator
from omegaconf import OmegaConf
from PIL import Image

from crosskd_ifc import ConfigError
from crosskd_ifc.training.lazy_config import run_config
from crosskd_ifc.training.lazy_trainer import test_lazy as evaluate

RED = {"RGB": [255, 0, 0], "BGR": [0, 0, 255]}


class Seeing(torch.nn.Module):
    """Keeps the first pixel of each picture."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        self.seen += [x["image"][:, 0, 0].tolist() for x in batch]
        return batch


class Nothing(DatasetEvaluator):
    def evaluate(self):
        return {}


@pytest.fixture
def red(tmp_path):
    """A data set of one red picture."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[..., 0] = 255
    path = str(tmp_path / "red.png")
    Image.fromarray(picture).save(path)
    record = {"file_name": path, "height": 8, "width": 8, "image_id": 0}
    DatasetCatalog.register("red_for_test", lambda: [record])
    yield "red_for_test"
    DatasetCatalog.remove("red_for_test")
    MetadataCatalog.pop("red_for_test", None)


def lazy(data, *, test, model=None, train=None, **more):
    """A LazyConfig of a FCOS that is evaluated on ``data``, with these channel orders."""
    detector = model_zoo.get_config("common/models/fcos.py").model
    if model:
        detector.input_format = model
    mapper = {"mapper": {"image_format": train}} if train else {}
    loader = L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names=data, filter_empty=False),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format=test),
        num_workers=0,
    )
    return OmegaConf.create(
        {
            "model": detector,
            "dataloader": {"train": mapper, "test": loader, "evaluator": L(Nothing)()},
            **{"optimizer": {}, "lr_multiplier": {}, "train": {"device": "cpu"}},
            **more,
        },
        flags={"allow_objects": True},
    )


@pytest.mark.parametrize("order", RED)
@pytest.mark.parametrize("said", [(), ("model",), ("train",)], ids=str)
def test_a_model_is_evaluated_in_the_channel_order_of_its_test_data(said, order, red):
    config, model = lazy(red, test=order, **dict.fromkeys(said, order)), Seeing()
    run_config(config, "config.py")
    evaluate(config, model)
    assert model.seen == [RED[order]]


@pytest.mark.parametrize(
    "said, key",
    [
        ({"model": "BGR"}, "model.input_format"),
        ({"train": "BGR"}, "dataloader.train.mapper.image_format"),
    ],
)
def test_test_data_of_another_channel_order_are_refused(said, key, red):
    message = f"config.py: dataloader.test.mapper.image_format is 'RGB', but {key} is 'BGR'"
    with pytest.raises(ConfigError, match=message):
        run_config(lazy(red, test="RGB", **said), "config.py")


def test_a_teacher_needs_to_be_told_the_channel_order_of_the_students_images(red):
    crosskd = {"TEACHER": {"CONFIG_FILE": "teacher.py"}}
    config = lazy(red, test="RGB", crosskd=crosskd)
    config.model._target_ = "crosskd_ifc.CrossKDFCOS"
    message = "config.py: neither model.input_format nor .*train.* says the channel order"
    with pytest.raises(ConfigError, match=message):
        run_config(config, "config.py")
