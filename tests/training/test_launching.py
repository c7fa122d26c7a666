"""How a training tool ends."""

import errno
import os
import sys

import pytest
from helpers import tiny_cfg
from torch.multiprocessing import ProcessRaisedException

from crosskd_ifc.training.errors import one_line_errors
from crosskd_ifc.training.launching import invoke


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
@pytest.mark.parametrize("launched", [False, True])
def test_a_disk_or_quota_that_is_full_is_one_line(number, launched, monkeypatch):
    def main(args):
        error = OSError(number, os.strerror(number), "metrics.json")
        if launched:
            raise ProcessRaisedException(f"Traceback\nOSError: {error}", 0, 1)
        with one_line_errors(tiny_cfg()):
            raise error

    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(SystemExit, match="^error: a disk or a quota is full .*'metrics.json'"):
        invoke(main, lambda args: None)
