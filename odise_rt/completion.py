"""Scripts that complete the command line in a shell (extra ``completion``: shtab)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from odise_rt.errors import MissingPackageError

SHELLS = ("bash", "zsh", "fish")
_FILES_OR_FOLDERS = ("images", "vocab", "vocabulary")
"""Arguments without a type of their own that are completed with files."""


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of :data:`SHELLS`. It runs neither Python nor this package when a key is pressed.

    Raises:
        MissingPackageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as exc:
        raise MissingPackageError("completion needs the package shtab: pip install 'odise_rt[completion]'") from exc
    for action in _actions(parser):
        if action.type is Path or action.dest in _FILES_OR_FOLDERS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell=shell)
    return script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
