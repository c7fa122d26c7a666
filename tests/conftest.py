"""Settings for all tests."""

import logging
import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

import crosskd_ifc  # noqa: F401  its own data sets stay

# The models are tiny: a second thread costs more than it saves.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def _no_network_or_home(monkeypatch, tmp_path):
    """Nothing is cached in the user's home."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


def _forget_new_data_sets():
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for name in set(DatasetCatalog) - before[0]:
        DatasetCatalog.remove(name)
    for name in set(MetadataCatalog) - before[1]:
        MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def _clean_catalogs():
    """Forget the data sets that a test registers: the next one may use their names."""
    yield from _forget_new_data_sets()


@pytest.fixture(autouse=True, scope="module")
def _clean_catalogs_of_module():
    """The same for those that a fixture of a module registers."""
    yield from _forget_new_data_sets()


@pytest.fixture(autouse=True)
def _quiet_logs():
    """Drop the log handlers that runs set up; their folders are deleted."""
    yield
    for name in ("detectron2", "fvcore", "crosskd_ifc"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            handler.close()
            logger.removeHandler(handler)
