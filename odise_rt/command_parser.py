"""The parser of all commands: those of odise-rt, and of the packages export, training and benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class _Help(argparse.RawDescriptionHelpFormatter):
    """Leaves descriptions as they are written, and ends what is said of an option with its default.

    Where the default is worked out later, the option's own text says how, after "Default:".
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default == [] or default == argparse.SUPPRESS or "Default:" in text:
            return text
        return f"{text} Default: {_shown(default)}."


def _shown(default: object) -> str:
    if isinstance(default, list | tuple):
        return " ".join(map(_shown, default))
    if isinstance(default, int | float):
        return f"{default:,}" if default == int(default) >= 10_000 else f"{default:g}"
    return str(default).replace("%", "%%")


class CommandParser(argparse.ArgumentParser):
    """Refuses empty values, say of a shell's variable: a path would be the current folder, an address would be none.

    Its help names every default.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **options})

    def _get_values(self, action: argparse.Action, arg_strings: Sequence[str]) -> Any:
        if "" in arg_strings and action.nargs != argparse.PARSER:  # those of a command are its parser's to refuse
            raise argparse.ArgumentError(action, "its value is empty: give one, or leave it out")
        return super()._get_values(action, list(arg_strings))
