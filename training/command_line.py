"""Options of all commands that compute with PyTorch, checked when they are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch

from odise_rt.backends.select import MAX_THREADS
from odise_rt.command_line import whole_number


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
