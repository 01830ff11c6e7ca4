"""Options of all commands that compute with PyTorch, checked when they are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from odise_rt.backends.select import CPU_ENGINES, MAX_THREADS
from odise_rt.bundle import MANIFEST_NAME
from odise_rt.command_line import whole_number


def _spelled_device(text: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def _torch_device(text: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N`` where PyTorch has it; ``auto`` is cuda where it has a GPU."""
    _spelled_device(text)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if gpus else "cpu"
    if text != "cpu" and gpus <= int(text.partition(":")[2] or 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not there: PyTorch can use {gpus} GPUs of this machine")
    return text


def add_device_argument(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add ``--device``; a device that PyTorch does not have is refused."""
    parser.add_argument("--device", type=_torch_device, default=default, help="auto, cpu, cuda or cuda:N.")


def add_classes_argument(parser: argparse.ArgumentParser, which: str) -> None:
    """Add ``--classes``, a file for :meth:`odise_rt.vocabulary.Vocabulary.load`.

    Args:
        parser: of a command that reads a data set.
        which: what words are meant, for the help.
    """
    parser.add_argument(
        "--classes",
        type=Path,
        help=f"Other words for the data set's classes, in its order, {which}: a file of OpenSeg's lines "
        "(id:synonym,synonym) or JSON. Default: its own.",
    )


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
    return _with_threads(parser, arguments)


def parse_model_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse for a command that computes with a checkpoint, in PyTorch, or with a bundle, in the runtime.

    The parsed ``device`` is one for PyTorch, or one for the runtime where the model is a bundle: whether a GPU works
    for the runtime does not follow from PyTorch's view of it.

    Args:
        parser: of the command's own options; ``model``, ``--device``, ``--cpu-engine`` and ``--threads`` are added.
        arguments: of the command line.
    """
    parser.add_argument("model", type=Path, help="A checkpoint folder, or a bundle folder made by export.")
    parser.add_argument(
        "--device", type=_spelled_device, default="auto", help="auto, cpu or cuda; for a checkpoint also cuda:N."
    )
    parser.add_argument(
        "--cpu-engine", choices=CPU_ENGINES, help="For a bundle, run on the CPU by this. Default: onnxruntime."
    )
    parsed = _with_threads(parser, arguments)
    try:
        if is_bundle(parsed.model):
            parsed.device = _runtime_device(parsed.device, parsed.cpu_engine)
        elif parsed.cpu_engine is not None:
            parser.error(f"argument --cpu-engine: {parsed.model} is no bundle: expected one, or no engine")
        else:
            parsed.device = _torch_device(parsed.device)
    except argparse.ArgumentTypeError as exc:
        parser.error(f"argument --device: {exc}")
    return parsed


def is_bundle(folder: Path) -> bool:
    """Whether a folder is to be opened as a bundle."""
    return (folder / MANIFEST_NAME).exists()


def _runtime_device(text: str, cpu_engine: str | None) -> str:
    if ":" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is for checkpoints, a bundle runs on the first GPU: set CUDA_VISIBLE_DEVICES and take cuda"
        )
    if cpu_engine is None:
        return text
    if text == "cuda":
        raise argparse.ArgumentTypeError(f"'cuda' does not go with --cpu-engine {cpu_engine}: leave out one of them")
    return "cpu"


def _with_threads(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), help="CPU threads of this process. Default: PyTorch's choice."
    )
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    return parsed
