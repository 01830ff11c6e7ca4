"""Folders that are written beside their place, and locked: so others know whether somebody writes one, or a killed
process has left it.

For the commands that make bundles, engines and checkpoints; the runtime writes no folders.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from odise_rt.files import PARTIAL_SUFFIX, REPLACED, make_partial_folder

_ABANDONED_SECONDS = 60.0
"""Age at which a partial folder that nobody has locked counts as left by a killed process."""


@contextlib.contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A new and locked folder beside a place, removed when the block ends unless it was renamed to that place.

    Folders that killed processes left for the same place are removed first. If one of them was killed while it replaced
    a finished folder, that folder returns to its place.

    Args:
        place: where the finished folder will be; the folder above it must exist.
    """
    import fcntl  # not on Windows, where commands that need this module say so when they start

    _remove_abandoned(place)
    folder = make_partial_folder(place)
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is removed either
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(place: Path) -> None:
    # The middle is random and has no dot: what only begins alike is of another place, `odise.fp16` beside `odise`.
    named = re.compile(rf"\.{re.escape(place.name)}\.[^.]+{re.escape(PARTIAL_SUFFIX)}")
    for folder in list(place.parent.iterdir()):
        if named.fullmatch(folder.name) and folder.is_dir():
            with contextlib.suppress(OSError):  # it is locked or another user's, or its file system has no locks
                _remove_if_abandoned(folder, place)


def _remove_if_abandoned(folder: Path, place: Path) -> None:
    import fcntl

    if time.time() - folder.stat().st_mtime < _ABANDONED_SECONDS:
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / REPLACED).is_dir() and not place.exists():
            (folder / REPLACED).rename(place)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
