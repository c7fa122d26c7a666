"""What the command lines of all tools share."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each option's default, unless that is nothing, and descriptions as written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default is None or action.default is False
        if nothing or action.default in ("", [], ()):
            return action.help or ""
        return super()._get_help_string(action) or ""
