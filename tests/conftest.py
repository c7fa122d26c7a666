"""Settings for all tests."""

import logging

import pytest
import torch

# The models are tiny: a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network_or_home(monkeypatch, tmp_path):
    """Nothing is cached in the user's home."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _quiet_logs():
    """Drop the log handlers that runs set up; their folders are deleted."""
    yield
    for name in ("detectron2", "fvcore", "crosskd_ifc"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            handler.close()
            logger.removeHandler(handler)
