"""What the command lines of all tools share."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from crosskd_ifc.common.command_line import as_started, recorded_command, run_tool

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize("tool", sorted(path.name for path in TOOLS.glob("[!_]*.py")))
def test_help_shows_every_default(tool, monkeypatch, capsys):
    parsers = []
    format_help = argparse.ArgumentParser.format_help

    def keep(self):
        parsers.append(self)
        return format_help(self)

    monkeypatch.setattr(argparse.ArgumentParser, "format_help", keep)
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    assert not end.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert parsers
    for action in parsers[0]._actions:
        if action.default not in (None, False, "", argparse.SUPPRESS) and action.default != []:
            assert f"(default: {action.default})" in shown, action.option_strings


def test_commands_are_those_that_work_where_they_are_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(TOOLS.parent)
    text = "    python tools/train_net.py X\n    torchrun --nproc-per-node 8 tools/train_net.py X"
    assert as_started(text) == text
    assert recorded_command("tune", "a b") == "python tools/tune.py 'a b'"
    monkeypatch.chdir(tmp_path)
    assert recorded_command("tune", "a b") == "python tools/tune.py 'a b'"
    assert as_started(text) == text.replace("tools/", f"{TOOLS}/")
    monkeypatch.setattr("crosskd_ifc.common.command_line.CHECKOUT", "")
    said = "    crosskd-train X\n    torchrun --nproc-per-node 8 -m crosskd_ifc.tools.train_net X"
    assert as_started(text) == said


def test_a_file_in_the_place_of_a_folder_is_one_line_and_the_other_way_round(tmp_path):
    (tmp_path / "file").write_text("mine")
    for write in (
        lambda: (tmp_path / "file" / "x").mkdir(),
        lambda: (tmp_path / "file").mkdir(),
        lambda: tmp_path.write_text(""),
    ):
        with pytest.raises(SystemExit, match="^error: .*" + str(tmp_path)):
            run_tool(write)
