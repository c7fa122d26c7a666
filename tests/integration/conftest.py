"""Fixtures for whole runs."""

import logging
import runpy
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from crosskd_ifc.data.shapes import register_shapes

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs a script of tools/ as its command line does; returns what it prints."""
    setup_logger.cache_clear()  # the handlers that it remembers are gone

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            runpy.run_path(str(REPO / "tools" / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{words}: {end.code}, {capsys.readouterr()}"
        finally:
            logging.raiseExceptions = True  # which train_net.py switches off for its process
        return capsys.readouterr().out

    return run


@pytest.fixture
def built_in_at():
    """Registers the built-in data sets anew, as (root, images of each split) says, for one test."""
    kept = {}

    def register(root, num_images):
        for name in [n for n in DatasetCatalog if n.startswith("crosskd_shapes")]:
            kept[name] = DatasetCatalog.pop(name), MetadataCatalog.pop(name)
        register_shapes(root=str(root), num_images=num_images)

    yield register
    for name, (load, metadata) in kept.items():
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        DatasetCatalog.register(name, load)
        MetadataCatalog[name] = metadata
