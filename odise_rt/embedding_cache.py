"""Text embeddings on disk: one file for each list of prompts, found by content hash, bounded in size.

A file is an uncompressed ``.npz`` (its CRCs reveal damage) under ``<cache>/text/<model>/<key>.npz``, where the model
part is a hash of the text encoder's graph and the tokenizer. Files are written beside and renamed. The least recently
used ones go first when the bound is exceeded. Nothing here raises for a cache that cannot be read or written: it is
logged, and the words are encoded again.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import os
import threading
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from odise_rt.files import atomic_writer

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ODISE_RT_CACHE"
"""Environment variable for the folder; an empty value turns the cache off."""
DEFAULT_MAX_BYTES = 1 << 30
"""Room for a lexicon of 200,000 words at full size (4 KB a word) beside others."""
MAX_FILES_SEARCHED = 512
"""How many lists of a model are searched for single words: those of five lexicons of 100,000 words."""

_FILES_PER_FIND = 64
"""Files that a search may list, on average."""
_SHARE_MADE_FREE = 16
"""One part in so many of the bound is made free at a time, so that not every list that comes measures all others."""

# RuntimeError covers what zipfile does not implement, and encryption.
_READ_ERRORS = (
    *(OSError, ValueError, KeyError, EOFError, SyntaxError, MemoryError, RuntimeError, TypeError),
    *(zipfile.BadZipFile, zlib.error),
)


def default_cache_dir() -> Path | None:
    """``$ODISE_RT_CACHE``, else ``odise_rt`` in the XDG cache folder; ``None`` if turned off or without a home."""
    configured = os.environ.get(CACHE_VARIABLE)
    if configured is not None:
        try:
            return Path(configured).expanduser() if configured.strip() else None
        except RuntimeError as exc:
            logger.warning("text cache: off, since %s=%s names no folder (%s)", CACHE_VARIABLE, configured, exc)
            return None
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "odise_rt"
    try:
        return Path.home() / ".cache" / "odise_rt"
    except RuntimeError:  # no home folder, as in some containers
        return None


@dataclass(frozen=True)
class _FileIndex:
    """The arrays and prompts of one file, in eight bytes a prompt."""

    columns: frozenset[str]
    hashes: np.ndarray
    """int64: :func:`_hashes` of its prompts."""

    def may_hold(self, wanted: np.ndarray) -> bool:
        """Whether any of these hashes is among those of the file."""
        if not self.hashes.size:
            return False
        nearest = np.minimum(np.searchsorted(self.hashes, wanted), self.hashes.size - 1)
        return bool((self.hashes[nearest] == wanted).any())


def _hashes(prompts: Collection[str]) -> np.ndarray:
    """Sorted int64 hashes, valid in this process only. A collision costs one needless file read."""
    return np.sort(np.fromiter(map(hash, prompts), np.int64, count=len(prompts)))


class EmbeddingCache:
    """Embeddings of word lists of one model. Safe for threads and processes: files are replaced whole."""

    def __init__(self, root: Path, model_key: str, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Use ``root/text/model_key``; ``max_bytes`` bounds all models together."""
        self._root = root / "text"
        self._folder = self._root / model_key
        self._max_bytes = max_bytes
        self._indices: dict[str, _FileIndex] = {}
        self._listed: list[str] = []
        self._finds_left = 0
        """Searches until the folder is listed again."""
        self._room = 0
        """Bytes that may be written until all folders are measured again."""
        self._warned = False
        self._lock = threading.Lock()

    def holds(self, size: int) -> bool:
        """Whether so many bytes of embeddings fit. Of more, the last files would push out the first ones."""
        if size <= self._max_bytes:
            return True
        logger.warning(
            "text cache: %d MB of embeddings exceed its bound of %d MB; they are encoded anew by every process",
            size >> 20,
            self._max_bytes >> 20,
        )
        return False

    def load(self, key: str, columns: Mapping[str, int], count: int) -> dict[str, np.ndarray] | None:
        """The embeddings of one word list.

        Args:
            key: hash of the list.
            columns: array name to channels.
            count: rows expected.

        Returns:
            Array name to float32 (count, channels), or ``None`` if absent or damaged.
        """
        path = self._path(key)
        stored = self._read(path, columns)
        if stored is None or len(stored[0]) != count:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # marks it as recently used
        return stored[1]

    def find(self, prompts: Sequence[str], columns: Mapping[str, int]) -> dict[str, dict[str, np.ndarray]]:
        """Single prompts among the most recent lists of this model: prompt to array name to row."""
        found: dict[str, dict[str, np.ndarray]] = {}
        missing = set(prompts)
        wanted = _hashes(missing)
        for path, index in self._indexed(self._recent()):
            if not missing:
                break
            if not (set(columns) <= index.columns and index.may_hold(wanted)):
                continue
            stored = self._read(Path(path), columns)
            if stored is None:
                continue
            for row, prompt in enumerate(stored[0]):
                if prompt in missing:
                    found[prompt] = {name: array[row] for name, array in stored[1].items()}
                    missing.discard(prompt)
        return found

    def store(self, key: str, prompts: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Write one word list and drop old ones beyond the bound."""
        size = sum(a.nbytes for a in arrays.values()) + sum(len(p) for p in prompts)
        if size > self._max_bytes:
            logger.info("text cache: a list of %d prompts (%d MB) exceeds the bound", len(prompts), size >> 20)
            return
        text = np.frombuffer(json.dumps(list(prompts)).encode(), dtype=np.uint8)
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_writer(path) as file:
                np.savez(file, prompts=text, **{name: np.asarray(a) for name, a in arrays.items()})  # type: ignore[arg-type]
        except OSError as exc:
            level = logging.DEBUG if self._warned else logging.WARNING  # else twice for every new vocabulary
            self._warned = True
            logger.log(level, "text cache: cannot write to %s (%s); words will be encoded again", self._folder, exc)
            return
        with self._lock:
            self._listed = [str(path), *(p for p in self._listed if p != str(path))][:MAX_FILES_SEARCHED]
            with contextlib.suppress(OSError):
                self._room -= _size_on_disk(path.stat())
            full = self._room <= 0
        if full:
            self._shrink()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.npz"

    def _indexed(self, paths: Sequence[str]) -> Iterator[tuple[str, _FileIndex]]:
        """The index of each file. A file is read once: its name is a hash of its prompts, so it never holds others."""
        with self._lock:
            known, self._indices = self._indices, {}
            self._indices.update((path, known[path]) for path in paths if path in known)
        for path in paths:
            index = known.get(path)
            if index is None:
                index = self._read_index(Path(path))
                with self._lock:
                    self._indices[path] = index
            yield path, index

    def _read_index(self, path: Path) -> _FileIndex:
        """Columns and prompts of a file; none if it cannot be read."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return _FileIndex(frozenset(stored.files), _hashes(json.loads(stored["prompts"].tobytes())))
        except _READ_ERRORS:
            # A file that is asked for by its name is examined, and discarded if it is damaged.
            return _FileIndex(frozenset(), _hashes(()))

    def _read(self, path: Path, columns: Mapping[str, int]) -> tuple[list[str], dict[str, np.ndarray]] | None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if not set(columns) <= set(stored.files):
                    return None
                prompts = json.loads(stored["prompts"].tobytes())
                arrays = {name: stored[name] for name in columns}
            for name, channels in columns.items():
                array = arrays[name]
                fits = array.dtype == np.float32 and array.shape == (len(prompts), channels)
                if not fits or not np.isfinite(array).all():
                    raise ValueError(f"{name} is {array.dtype} {array.shape}")
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as exc:  # the file may be good
            logger.warning("text cache: %s cannot be read (%s)", path, exc)
            return None
        except _READ_ERRORS as exc:
            logger.warning("text cache: %s is damaged (%s) and was discarded", path, exc)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return prompts, arrays

    def _recent(self) -> list[str]:
        """This model's files, at most ``MAX_FILES_SEARCHED``, most recently used first.

        A listing costs as much as there are files, so the more there are, the longer it is kept; what this process
        stores meanwhile is added.
        """
        with self._lock:
            if self._finds_left > 0:
                self._finds_left -= 1
                return self._listed
            entries = [(stat.st_mtime, path) for path, stat in _files(self._folder) if path.endswith(".npz")]
            self._listed = [path for _, path in heapq.nlargest(MAX_FILES_SEARCHED, entries)]
            self._finds_left = len(entries) // _FILES_PER_FIND
            return self._listed

    def _shrink(self) -> None:
        """Remove the least recently used files beyond the bound, and temporary files that killed processes left."""
        entries = []
        for folder in _folders(self._root):
            for path, stat in _files(folder):
                if path.endswith(".npz"):
                    entries.append((stat.st_mtime, _size_on_disk(stat), path))
                elif path.endswith(".tmp") and time.time() - stat.st_mtime > 3600:
                    _remove(path)
        total = sum(size for _, size, _ in entries)
        spare = self._max_bytes // _SHARE_MADE_FREE
        if total > self._max_bytes:
            for _, size, path in sorted(entries):
                if total <= self._max_bytes - spare:
                    break
                _remove(path)
                total -= size
        with self._lock:
            self._room = min(self._max_bytes - total, spare)  # others may write, too


def _size_on_disk(stat: os.stat_result) -> int:
    """Bytes that a file takes up: small ones whole blocks, where the system tells."""
    return max(stat.st_size, getattr(stat, "st_blocks", 0) * 512)


def _files(folder: str | Path) -> Iterator[tuple[str, os.stat_result]]:
    """Paths and facts of a folder's files. Another process may remove them, and the folder, at any time."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                yield entry.path, entry.stat()


def _folders(root: Path) -> list[str]:
    """The cache folders of all models."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        return [entry.path for entry in entries if entry.is_dir()]
    return []


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()
