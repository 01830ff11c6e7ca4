"""How commands that run a bundle let a user name it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

BUNDLE_VARIABLE = "ODISE_RT_BUNDLE"
"""Environment variable with the folder of the bundle that is used when none is named."""


def default_bundle() -> Path | None:
    """The folder that :data:`BUNDLE_VARIABLE` names, or None."""
    bundle = os.environ.get(BUNDLE_VARIABLE)
    return Path(bundle) if bundle else None


def add_bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--bundle``."""
    parser.add_argument(
        "--bundle",
        type=Path,
        default=default_bundle(),
        help=f"The bundle's folder. Default: the environment variable {BUNDLE_VARIABLE}.",
    )
