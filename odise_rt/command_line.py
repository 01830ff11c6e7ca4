"""What all commands share, those of odise-rt and of the packages export, training and benchmarks: their parser, options
that are checked when they are read, and, but for odise-rt, errors that are one line."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from odise_rt.errors import OdiseError, first_line, is_out_of_memory

P = ParamSpec("P")
MAX_SEED = 2**63 - 1


class _Help(argparse.RawDescriptionHelpFormatter):
    """A formatter that leaves descriptions as they are written, and ends the help of each option with its default.

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
    """A parser that refuses empty values, as an unset variable of a shell gives: an empty path is the current folder.

    Its help names every default.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **options})

    def _get_values(self, action: argparse.Action, arg_strings: Sequence[str]) -> Any:
        if "" in arg_strings and action.nargs != argparse.PARSER:  # those of a command are its parser's to refuse
            raise argparse.ArgumentError(action, "its value is empty: give one, or leave it out")
        return super()._get_values(action, list(arg_strings))


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """The ``type`` of an option that is a whole number in a range, both ends included."""
    expected = f"a whole number of at least {lowest}" if highest is None else f"a whole number, {lowest} to {highest}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return read


def real_number(lowest: float, highest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The ``type`` of an option that is a finite number in a range: both ends included, or ``above`` its lower end."""
    upwards = f"above {lowest}" if above else f"of at least {lowest}"
    expected = f"a number {upwards}" + ("" if math.isinf(highest) else f" and at most {highest}")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (lowest < value if above else lowest <= value) or not value <= highest or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return read


def check_system() -> None:
    """Check that the system has what commands need that make bundles, engines and checkpoints.

    Raises:
        OdiseError: it is Windows.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise OdiseError(
            "export, training and benchmarks run on Linux and macOS, whose file locks they need: on Windows use WSL; "
            "odise-rt itself runs here"
        ) from None


def command(stopped: str, failed: int = 1) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """A decorator for a command's ``main`` that turns errors into one line on standard error and an exit status.

    Windows is such an error; see :func:`check_system`.

    Args:
        stopped: said after Ctrl-C: what was finished, and how to go on.
        failed: exit status of errors.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def guarded(*arguments: P.args, **options: P.kwargs) -> int:
            try:
                check_system()
                return main(*arguments, **options)
            except KeyboardInterrupt:
                print(f"stopped: {stopped}", file=sys.stderr)
                return 130
            except OdiseError as exc:
                message = str(exc)
            except OSError as exc:
                where = f" {exc.filename}" if exc.filename else ""
                message = f"the system refused{where} ({exc.strerror or exc}): check its permissions and free space"
            except (RuntimeError, MemoryError) as exc:
                if not is_out_of_memory(exc):
                    raise
                message = f"memory ran out ({first_line(exc)}): take smaller batches, or a device with more"
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
            return failed

        return guarded

    return decorate
