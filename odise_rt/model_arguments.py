"""How commands that run a bundle let a user name it, and what runs it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from odise_rt.errors import OptionsError

BUNDLE_VARIABLE = "ODISE_RT_BUNDLE"
"""Environment variable with the folder of the bundle that is used when none is named."""


def default_bundle() -> Path | None:
    """The folder that :data:`BUNDLE_VARIABLE` names, or None."""
    bundle = os.environ.get(BUNDLE_VARIABLE)
    return Path(bundle) if bundle else None


def add_bundle_argument(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """Add ``--bundle FOLDER``, or where there is no other argument of that kind just ``BUNDLE``."""
    options: dict[str, Any] = {
        "type": Path,
        "default": default_bundle(),
        "help": f"The bundle's folder. Default: the environment variable {BUNDLE_VARIABLE}.",
    }
    if positional:
        parser.add_argument("bundle", nargs="?", metavar="BUNDLE", **options)
    else:
        parser.add_argument("--bundle", **options)


def named_bundle(args: argparse.Namespace, how: str = "--bundle FOLDER") -> Path:
    """The folder of the bundle that parsed arguments, or the environment, name.

    Args:
        args: parsed with the argument of :func:`add_bundle_argument`.
        how: how a bundle is named, for the message.

    Raises:
        OptionsError: none was named.
    """
    bundle: Path | None = args.bundle
    if bundle is None:
        raise OptionsError(
            f"no bundle was named: pass {how} or set {BUNDLE_VARIABLE}. Make one in a clone: "
            "python -m export.build_engines --checkpoint training/pretrained/odise-tiny --out out/odise-tiny"
        )
    return bundle


def add_engine_arguments(parser: argparse._ActionsContainer, threads: str = "all usable cores") -> None:
    """Add ``--device``, ``--cpu-engine`` and ``--threads``, whose values are checked where a bundle is loaded.

    Args:
        parser: a parser, or a group of one.
        threads: the default of ``--threads`` in words, for its help.
    """
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda. auto takes a GPU if one really works.")
    parser.add_argument(
        "--cpu-engine",
        default="onnxruntime",
        metavar="ENGINE",
        help="What runs the graphs on a CPU: onnxruntime, openvino or openvino-bf16.",
    )
    parser.add_argument("--threads", type=int, help=f"CPU threads inside an operator. Default: {threads}.")
