"""What an evaluation has measured of each picture, on disk, so that one which is killed can go on.

::

    OUT/measured/0/run.jsonl    of the first process, one line a picture (:mod:`odise_rt.run_log`)
    OUT/measured/1/run.jsonl    of the second
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odise_rt.errors import DatasetError
from odise_rt.run_log import RunLog
from training.feature_cache import cache_key

FOLDER = "measured"


@dataclass(frozen=True)
class Measured:
    """What is known of one picture."""

    quality: float
    """Its own, in [0, 1]; NaN if it has none."""
    counts: dict[str, Any]
    """As a scorer gives them, in plain JSON types."""
    seconds: float
    """That segmenting it took."""
    engine: str
    """That segmented it."""


class EvaluationLog:
    """The log of one process; see :func:`open_log`."""

    def __init__(self, log: RunLog, key: str) -> None:
        self._log, self._key = log, key

    def __len__(self) -> int:
        """Pictures that are known."""
        return len(self._log.names(self._key))

    def find(self, index: int) -> Measured | None:
        """What is known of the picture of an index, if anything is."""
        record = self._log.find(str(index), self._key)
        if record is None:
            return None
        quality = math.nan if record["quality"] is None else record["quality"]
        return Measured(quality, record["counts"], record["seconds"], record["engine"])

    def append(self, index: int, measured: Measured) -> None:
        """Note what was measured of a picture.

        Raises:
            DatasetError: the disk is full or not writable.
        """
        record = {
            "name": str(index),
            "key": self._key,
            "quality": None if math.isnan(measured.quality) else measured.quality,
            "counts": measured.counts,
            "seconds": measured.seconds,
            "engine": measured.engine,
        }
        try:
            self._log.append(record)
        except OSError as exc:
            raise DatasetError(
                f"cannot write {self._log.path}: {exc}; free some space and run the command again"
            ) from exc


@contextlib.contextmanager
def open_log(out: Path, rank: int, facts: Mapping[str, Any]) -> Iterator[EvaluationLog]:
    """The log of a process in a folder of results, for the time of a ``with`` block.

    Args:
        out: folder of the results.
        rank: of the process.
        facts: plain JSON types: all that the numbers depend on. What was measured with others is measured again.

    Raises:
        DatasetError: the folder cannot be made.
        OptionsError: another evaluation writes into it.
    """
    folder = out / FOLDER / str(rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DatasetError(f"cannot make {folder}: {exc}") from exc
    with RunLog(folder) as log:
        try:
            yield EvaluationLog(log, cache_key(dict(facts)))
        finally:
            if not log.names():  # what failed before its first picture leaves nothing, but what others have measured
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()


def remove_log(out: Path) -> None:
    """Remove the logs of all processes: the results are written, and another evaluation measures anew."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
