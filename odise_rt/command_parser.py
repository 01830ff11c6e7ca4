"""The parser of all commands: those of odise-rt, and of the packages export, training and benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Refuses empty values, say of a shell's variable: a path would be the current folder, an address would be none."""

    def _get_values(self, action: argparse.Action, arg_strings: Sequence[str]) -> Any:
        if "" in arg_strings and action.nargs != argparse.PARSER:  # those of a command are its parser's to refuse
            raise argparse.ArgumentError(action, "its value is empty: give one, or leave it out")
        return super()._get_values(action, list(arg_strings))
