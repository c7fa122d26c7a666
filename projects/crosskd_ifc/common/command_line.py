"""What the command lines of all tools share."""

import argparse
import errno
import io
import logging
import os
import re
import shlex
import signal
import sys
from typing import Any, Callable

from ..config import ConfigError
from .files import DISK_FULL
from .paths import CHECKOUT

# Tools whose installed command isn't crosskd-NAME.
_COMMANDS = {
    "convert_weights": "crosskd-convert",
    "export_student": "crosskd-export",
    "lazyconfig_train_net": "crosskd-train-lazyconfig",
    "train_net": "crosskd-train",
}
_TOOLS = "crosskd_ifc.tools"  # where an installed package has them
# It is full, or may not be written to; or a file lies where a folder is needed, or a folder where a
# file is.
_OF_THE_DISK = (*DISK_FULL, errno.EROFS, errno.EACCES)
_OF_THE_DISK += (errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each option's default, unless that is nothing, and descriptions as written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default is None or action.default is False
        if nothing or action.default in ("", [], ()):
            return action.help or ""
        return super()._get_help_string(action) or ""


def tool_command(name: str) -> str:
    """How a tool is started from here: ``python tools/NAME.py`` in a checkout, with the path of
    ``tools/`` elsewhere, or, installed without the repository, its command.

    Args:
        name: of its file in ``tools/``, without ``.py``.
    """
    if CHECKOUT:
        return f"python {_tool_file(name)}"
    return _COMMANDS.get(name, f"crosskd-{name.replace('_', '-')}")


def recorded_command(name: str, *words: str) -> str:
    """A command for a record: as it is given in the repository, wherever it was started.

    Args:
        name: of a tool.
        words: behind it.
    """
    return shlex.join(
        [*(["python", f"tools/{name}.py"] if CHECKOUT else [tool_command(name)]), *words]
    )


def tool_parser(file: str, description: str) -> argparse.ArgumentParser:
    """The parser of a tool, whose description names tools as they are started in a checkout.

    From here on standard output shows what it can't encode, such as a file's odd name, by escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    name = os.path.splitext(os.path.basename(file))[0]
    return argparse.ArgumentParser(
        prog=tool_command(name), description=as_started(description), formatter_class=HelpFormatter
    )


def as_started(text: str) -> str:
    """A text with its tools named as they are started here: in a checkout, or as commands."""
    text = re.sub(r"python tools/(\w+)\.py", lambda match: tool_command(match[1]), text)
    return re.sub(
        r"(torchrun .*)\btools/(\w+)\.py",
        lambda match: match[1] + (_tool_file(match[2]) if CHECKOUT else f"-m {_TOOLS}.{match[2]}"),
        text,
    )


def _tool_file(name: str) -> str:
    here = os.path.realpath(os.getcwd()) == CHECKOUT
    return f"tools/{name}.py" if here else shlex.quote(os.path.join(CHECKOUT, f"tools/{name}.py"))


def run_tool(main: Callable[[], Any], *, resumes: bool = False, tells_more: bool = False) -> Any:
    """Run a tool; a user's mistake and a full disk end it with one line.

    Args:
        main: what it does.
        resumes: what was done so far is kept, so that Ctrl-C, SIGTERM and SIGHUP end it well.
        tells_more: show this package's progress, not only its warnings.

    Returns:
        What ``main`` returns.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # advice to torch's own developers
    if tells_more:
        logging.getLogger("crosskd_ifc").setLevel(logging.INFO)
    if resumes:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
    try:
        return main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if not resumes:
            raise
        sys.exit("\nStopped; run it again to go on.")
