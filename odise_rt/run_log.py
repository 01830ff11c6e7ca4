"""The log of a batch: one line of JSON for every finished file, written as it comes.

The log is what makes a batch resumable and flat in memory. A line is appended after all files of an image are in
place, so whatever stops a run, even ``kill -9``, leaves finished images with a line and others without; a line that
was cut short is dropped when the log is opened again. In memory are only the place of each line and its key.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from odise_rt.bundle import MANIFEST_NAME
from odise_rt.errors import OptionsError
from odise_rt.files import PARTIAL_SUFFIX, atomic_writer, json_bytes, locked_file

logger = logging.getLogger(__name__)

FILE_NAME = "run.jsonl"
_LOCK_NAME = ".run.lock"
_OTHERS = frozenset((_LOCK_NAME, MANIFEST_NAME))
"""Files that mark a folder as one that somebody else writes into."""
_TEMPORARY = re.compile(r"\..*-[0-9a-f]{12}\.tmp")
_WORTH_COMPACTING = 1 << 20  # bytes of lines that later ones replaced


class RunLog:
    """The log in one folder of results, locked while it is open: a context manager.

    A record is a dict with ``name`` (unique; a later record of a name replaces an earlier one) and ``key``, which says
    what the results depend on.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the log of a folder, which must exist.

        Raises:
            OptionsError: another run writes into the folder.
        """
        self.folder = folder
        self.path = folder / FILE_NAME
        self._lines: dict[str, tuple[int, str]] = {}
        try:
            self._lock = locked_file(folder / _LOCK_NAME)
        except BlockingIOError as exc:
            raise OptionsError(f"another run writes into {folder}: wait for it, or choose another --out") from exc
        try:
            self._remove_leftovers()
            replaced = self._read()
            if replaced > _WORTH_COMPACTING:
                self._compact()
            self._file: IO[bytes] = self.path.open("r+b") if self.path.exists() else self.path.open("x+b")
            self._file.seek(0, 2)
        except BaseException:
            self._lock.close()
            raise

    def is_done(self, name: str, key: str) -> bool:
        """Whether the latest record of a name has this key and no error, and its files are there in the same size."""
        return self.finished_record(name, key) is not None

    def finished_record(self, name: str, key: str) -> dict[str, Any] | None:
        """The latest record of a name if :meth:`is_done` holds for it."""
        record = self.find(name, key)
        if record is None or "error" in record:
            return None
        for file, size in record.get("files", {}).items():
            with contextlib.suppress(OSError):
                if (self.folder / file).stat().st_size == size:
                    continue
            return None
        return record

    def find(self, name: str, key: str) -> dict[str, Any] | None:
        """The latest record of a name if it has this key."""
        return self.read(name) if self._lines.get(name, (0, ""))[1] == key else None

    def __contains__(self, name: object) -> bool:
        """Whether a name has a record."""
        return name in self._lines

    def names(self, key: str | None = None) -> list[str]:
        """Every name that has a record, or whose latest record has this key."""
        return [name for name, (_, its_key) in self._lines.items() if key is None or its_key == key]

    def read(self, name: str) -> dict[str, Any]:
        """The latest record of a name that has one."""
        self._file.seek(self._lines[name][0])
        record: dict[str, Any] = json.loads(self._file.readline())
        return record

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; it is with the operating system when this returns."""
        place = self._file.seek(0, 2)
        self._file.write(json_bytes(record) + b"\n")
        self._file.flush()
        self._lines[record["name"]] = (place, record["key"])

    def close(self) -> None:
        """Release the folder. Safe to call twice."""
        self._file.close()
        self._lock.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> int:
        """Find the latest line of each name; returns how many bytes the other lines take."""
        lengths: dict[str, int] = {}
        place = 0
        if not self.path.exists():
            return 0
        with self.path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):  # cut short by the end of the process that wrote it
                    file.truncate(place)
                    break
                try:
                    record = json.loads(line)
                    self._lines[record["name"]] = (place, record["key"])
                    lengths[record["name"]] = len(line)
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s: a damaged line at byte %d was passed over", self.path, place)
                place += len(line)
        return place - sum(lengths.values())

    def _compact(self) -> None:
        places: dict[str, tuple[int, str]] = {}
        # The old one is closed before the new one takes its place: Windows replaces no open file.
        with atomic_writer(self.path) as new, self.path.open("rb") as old:
            for name, (place, key) in self._lines.items():
                old.seek(place)
                places[name] = (new.tell(), key)
                new.write(old.readline())
        self._lines = places

    def _remove_leftovers(self) -> None:
        """Remove files that a killed run was writing; nobody else writes here while the folder is locked.

        Folders that others write into are not entered: results of another run, bundles, and folders in the making.
        """
        for parent, folders, files in os.walk(self.folder):
            if Path(parent) != self.folder and _OTHERS.intersection(files):
                folders.clear()
                continue
            folders[:] = [name for name in folders if not name.endswith(PARTIAL_SUFFIX)]
            for name in filter(_TEMPORARY.fullmatch, files):
                with contextlib.suppress(OSError):
                    Path(parent, name).unlink()
