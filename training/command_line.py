"""What all commands share: options that are checked when they are read, and errors that are one line."""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch

from odise_rt.backends.select import MAX_THREADS
from odise_rt.errors import OdiseError, first_line, is_out_of_memory

P = ParamSpec("P")


def command(stopped: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates a command's ``main``: what goes wrong is one line on standard error and the exit status.

    Args:
        stopped: what Ctrl-C leaves, and how to go on.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def guarded(*arguments: P.args, **options: P.kwargs) -> int:
            try:
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
            return 1

        return guarded

    return decorate


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """Type of an option: a whole number in a range, both ends included."""
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
    """Type of an option: a finite number in a range, both ends included, or ``above`` its lower end."""
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


def _device(text: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N`` where it is there; ``auto`` is cuda where there is a GPU."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if gpus else "cpu"
    if text != "cpu" and gpus <= int(text.partition(":")[2] or 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not there: PyTorch can use {gpus} GPUs of this machine")
    return text


def add_device_argument(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add ``--device``; what is parsed is there."""
    parser.add_argument("--device", type=_device, default=default, help="auto, cpu, cuda or cuda:N.")


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, device: str = "auto"
) -> argparse.Namespace:
    """Parse with the options of all commands that compute, ``--device`` and ``--threads``, and set the threads.

    Args:
        parser: of the command's own options.
        arguments: of the command line; None: those of the process.
        device: the default.
    """
    add_device_argument(parser, device)
    parser.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), help="CPU threads of this process. Default: PyTorch's choice."
    )
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    return parsed
