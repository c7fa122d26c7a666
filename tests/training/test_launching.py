"""How a training tool ends."""

import errno
import os
import re
import subprocess
import sys
import textwrap

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


def test_a_process_of_several_ends_with_its_status_and_is_not_taken_apart():
    """The last is where a thread of gloo may abort it."""
    script = """
        import atexit, os, sys, threading, time
        from crosskd_ifc.training.launching import run_and_end

        class Thread:
            def __del__(self):
                os.write(1, b"taken apart ")

        def late():
            time.sleep(0.1)
            print("thread", end=" ")

        def main(name, *, ended):
            global held
            held = Thread()
            atexit.register(print, "atexit", end=" ")
            threading.Thread(target=late).start()
            print(name, end=" ")
            ended()

        for ended in (lambda: None, lambda: sys.exit(143), lambda: sys.exit("told"), lambda: 1 / 0):
            child = os.fork()
            if not child:
                sys.stderr = sys.stdout
                run_and_end(main, "main", ended=ended)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    ends = re.findall(r"^main (.*?)(\d+)$", done.stdout, flags=re.DOTALL | re.MULTILINE)
    (returned, status), (exited, its_status), (told, one), (failed, same) = ends
    assert (returned, status) == ("thread atexit ", "0")
    assert (exited, its_status) == ("thread atexit ", "143")
    assert told.startswith("told\n") and "taken apart" in told and one == "1"
    assert "ZeroDivisionError" in failed and "taken apart" in failed and same == "1"
