"""Wrong values of detectron2's own keys: one line, before the first step has changed anything."""

import re
import sys

import pytest
from test_train_net import files, train_net, write_config  # noqa: F401

STOCK = (
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.CROSSKD.TEACHER.CONFIG_FILE", "", "SOLVER.MAX_ITER", "2"),
)
# Key -> (its value on a command line, what the line says). None: the key itself.
WRONG = {
    "SOLVER.IMS_PER_BATCH": ("0", None),
    "SOLVER.CHECKPOINT_PERIOD": ("0", None),
    "SOLVER.MAX_ITER": ("0", None),
    "SOLVER.BASE_LR": ("None", "SOLVER.BASE_LR is null; its default is 0.001"),
    "SOLVER.LR_SCHEDULER_NAME": ("Sometimes", None),
    "SOLVER.WARMUP_METHOD": ("cold", None),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("gently", None),
    "DATASETS.TRAIN": ("()", None),
    "TEST.EXPECTED_RESULTS": ("[['bbox','AP',1.0]]", None),
    "TEST.AUG.ENABLED": ("True", "TEST.AUG.ENABLED is True, but .* without test-time augmentation"),
    "INPUT.MIN_SIZE_TRAIN": ("()", None),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("often", None),
    "DATALOADER.SAMPLER_TRAIN": ("NoSampler", None),
    "DATALOADER.NUM_WORKERS": ("-1", "the run can't start: ValueError: num_workers"),
    "MODEL.META_ARCHITECTURE": ("NoSuch", None),
    "MODEL.BACKBONE.NAME": ("no_such_backbone", None),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("NoRPN", None),
    "MODEL.ROI_HEADS.NAME": ("NoHeads", None),
    "MODEL.ANCHOR_GENERATOR.NAME": ("NoAnchors", None),
    "MODEL.RESNETS.DEPTH": ("19", None),
    "MODEL.RESNETS.NORM": ("XN", "the run can't start: .*XN"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROISomething", None),
    "MODEL.FPN.FUSE_TYPE": ("max", None),
    "MODEL.WEIGHTS": ("http://127.0.0.1:9/none.pth", "the run can't start: .*MODEL.WEIGHTS"),
    "MODEL.PIXEL_MEAN": ("[1.0]", "the run can't start"),
    "MODEL.DEVICE": ("quantum", None),
    "OUTPUT_DIR": ("", None),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_one_line(files, tmp_path, monkeypatch, key):  # noqa: F811
    value, message = WRONG[key]
    config, out = write_config(files, tmp_path)
    arguments = ["train_net", "--config-file", config, *STOCK, key, value]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        train_net.invoke_main()
    line = str(end.value)
    assert line.startswith("error: ") and "\n" not in line
    assert re.search(message or re.escape(key), line), line
    assert not list(out.glob("*.pth"))
    if "the run can't start" in line:
        assert f"The traceback is in {out}/log.txt" in line
        assert "Traceback" in (out / "log.txt").read_text()
