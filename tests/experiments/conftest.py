"""What tests of whole comparisons share."""

import json

import pytest
import yaml
from helpers import tiny_cfg

from crosskd_ifc.data.shapes import CLASSES, generate


@pytest.fixture
def tiny_protocol(tmp_path, monkeypatch):
    """Writes a protocol of tiny detectors, two steps on a few pictures, with a dataset card."""
    monkeypatch.chdir(tmp_path)
    splits = ("train", "val", "test")
    generate("data", num_images=dict.fromkeys(splits, 2), image_size=64)
    files = {s: {"json": f"annotations/{s}.json", "images": s} for s in splits}
    card = {"name": "few", "format": "coco", "root": "data", "splits": files}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({**card, "classes": list(CLASSES)}))
    small = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ())
    teacher = tiny_cfg(*small, architecture="GeneralizedRCNN")
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    named = ("MODEL.CROSSKD.TEACHER.CONFIG_FILE", "teacher.yaml")
    (tmp_path / "student.yaml").write_text(tiny_cfg(*small, *named).dump())

    def write(**content):
        protocol = {
            "validation": "few_val",
            "test": "few_test",
            "opts": {"DATASETS.CARDS": ["card.yaml"], "DATASETS.TRAIN": ["few_train"]},
            "teacher": {"config": "teacher.yaml"},
            **content,
        }
        protocol = {key: value for key, value in protocol.items() if value is not None}
        path = tmp_path / f"{content['name']}.yaml"
        path.write_text(json.dumps(protocol))  # YAML, without aliases
        return str(path)

    return write
