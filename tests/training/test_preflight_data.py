"""Training data that must be the same on all machines."""

import re

import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import tiny_cfg
from torch.multiprocessing import start_processes

from crosskd_ifc import ConfigError
from crosskd_ifc.training.preflight_data import check_same_everywhere


def check(rank, store, classes, numbers, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    DatasetCatalog.register("theirs", list)
    MetadataCatalog.get("theirs").set(thing_classes=list(classes[rank]))
    try:
        check_same_everywhere(tiny_cfg("DATASETS.TRAIN", ("theirs",)), numbers[rank])
        answers.put("")
    except ConfigError as error:
        answers.put(str(error))


@pytest.mark.parametrize(
    "classes, numbers, message",
    [
        (("abc", "abc"), (5, 5), ""),
        (("abc", "acb"), (5, 5), "'theirs' has other classes .*process 1 .*class 1 is 'c' and 'b'"),
        (("abc", "ab"), (5, 5), "class 2 is None and 'c'"),
        (("abc", "abc"), (5, 4), "DATASETS.TRAIN: 4 images in process 1 and 5 in the main process"),
    ],
    ids=["same", "order", "fewer", "images"],
)
def test_machines_with_other_data_dont_train_together(tmp_path, classes, numbers, message):
    answers = torch.multiprocessing.get_context("fork").SimpleQueue()
    arguments = (str(tmp_path / "store"), classes, numbers, answers)
    start_processes(check, arguments, nprocs=2, start_method="fork")
    for answer in (answers.get(), answers.get()):
        assert re.search(message, answer) if message else answer == ""
