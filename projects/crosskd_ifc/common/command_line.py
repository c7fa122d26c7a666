"""What the command lines of all tools share."""

import argparse
import logging
import signal
import sys
from typing import Any, Callable

from ..config import ConfigError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each option's default, unless that is nothing, and descriptions as written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default is None or action.default is False
        if nothing or action.default in ("", [], ()):
            return action.help or ""
        return super()._get_help_string(action) or ""


def run_tool(main: Callable[[], Any], *, resumes: bool = False, tells_more: bool = False) -> Any:
    """Run a tool; a user's mistake ends it with one line.

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
    except KeyboardInterrupt:
        if not resumes:
            raise
        sys.exit("\nStopped; run it again to go on.")
