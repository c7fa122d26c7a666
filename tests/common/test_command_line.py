"""What the command lines of all tools share."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

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
