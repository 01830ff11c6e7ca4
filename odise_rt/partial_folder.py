"""Folders that are written beside their place, under a lock that tells what somebody writes from what a killed process
left.

For the commands that make bundles, engines and checkpoints; the runtime writes no folders.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from odise_rt.files import PARTIAL_SUFFIX, REPLACED

_ABANDONED_SECONDS = 60.0
"""A partial folder that nobody has locked for this long belongs to nobody."""


@contextlib.contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A new folder beside a place, under a lock that tells others that it is somebody's; removed in the end, unless it
    was renamed.

    What killed processes left of the same place is removed first; what one was about to replace returns.

    Args:
        place: of the finished folder; the folder above it must exist.
    """
    _remove_abandoned(place)
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=PARTIAL_SUFFIX, dir=place.parent))
    try:
        folder.chmod(0o755)
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
    # The middle is mkdtemp's and has no dot: what only begins alike is of another place, `odise.fp16` beside `odise`.
    named = re.compile(rf"\.{re.escape(place.name)}\.[^.]+{re.escape(PARTIAL_SUFFIX)}")
    for folder in list(place.parent.iterdir()):
        if named.fullmatch(folder.name) and folder.is_dir():
            with contextlib.suppress(OSError):  # it is locked or another user's, or its file system has no locks
                _remove_if_abandoned(folder, place)


def _remove_if_abandoned(folder: Path, place: Path) -> None:
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
