"""Paths as they are given, JSON as bytes, and writing so that no reader ever sees half a file or half a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from odise_rt.errors import OdiseError, OptionsError

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
"""Suffix of folders that are being written or replaced."""
REPLACED = "replaced"
"""Name of a folder that is being replaced, inside a partial one."""


def given_path(path: object, what: str, error: type[OdiseError]) -> Path:
    """A caller's argument as a Path; raises ``error`` if it is no path.

    Args:
        path: text or a path object; whether anything lies there is not looked at.
        what: name of the argument, for the message.
        error: type of the error.

    Raises:
        OdiseError: of that type: the argument is no path at all.
    """
    try:
        text = os.fspath(path) if isinstance(path, os.PathLike) else path
    except TypeError:  # it says that it is a path, and gives none
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise error(f"{what} came as {path!r:.60}: expected a path")
    return Path(text)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file beside its place and rename it when the block ends without an error.

    After a power cut, too, there is the file as it was or the whole of the new one: its content is on the disk before
    it gets its name.

    Args:
        path: where the file will be; its folder must exist.
    """
    target = Path(path)
    # Opened by name rather than with tempfile, whose files only their owner may read.
    temporary = target.with_name(f".{target.name[:40]}-{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_writable(path: Path) -> None:
    """Create the folder of a file that will be written after hours of work, and check that it can be written.

    Raises:
        OptionsError: it cannot be made or written to, or a folder has the file's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(f"{path.name} is a folder there")
    except OSError as exc:
        raise OptionsError(f"cannot write {path} ({exc}): name another --out") from exc


def locked_file(path: Path, wait: bool = False) -> IO[bytes]:
    """Open a file, which is made where it is missing, and lock it until it is closed.

    The lock ends with the process, however that ends. Where the system or the file system has no locks, a line of the
    log says so, and the file is open without one.

    Args:
        path: the file; it is opened for writing, without which network file systems lock nothing.
        wait: for another process that holds the lock.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is not set.
        OSError: the file cannot be opened.
    """
    file = path.open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        logger.info("this system has no file locks: take care that one run at a time writes into %s", path.parent)
    except BlockingIOError:
        file.close()
        raise
    except OSError as exc:  # some network file systems
        logger.warning("cannot lock %s (%s): take care that one run at a time writes into it", path.parent, exc)
    return file


def make_partial_folder(place: Path) -> Path:
    """Make an empty folder beside a place, hidden and with a suffix of its own, in which what belongs there is written.

    Who may read it is for the user's umask to say, as for any new folder.

    Args:
        place: where the finished folder will be; the folder above it must exist.
    """
    # Made by name rather than with tempfile, whose folders only their owner may read.
    folder = place.with_name(f".{place.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    folder.mkdir()
    return folder


def flush_folder(folder: Path) -> None:
    """Wait until every file of a folder is on the disk: what is renamed after this survives a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _flush_file(path)


def _flush_file(path: Path) -> None:
    # Windows flushes only what is open for writing, other systems a read-only file, too.
    writable = os.access(path, os.W_OK)
    with path.open("r+b" if writable else "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as exc:
            if writable or exc.errno != errno.EBADF:
                raise


def replace_folder(finished: Path, place: Path, *, aside: str | None = None, old_name: str = REPLACED) -> None:
    """Rename a finished folder to its place.

    A folder that is there already moves into a hidden one beside it, and is removed once the new one is in place, or
    comes back where that fails. Readers see the old one, for a moment none, or the new one.

    Args:
        finished: the new folder, in the same file system.
        place: where it belongs; there may be a folder, or nothing yet.
        aside: prefix of the hidden folder's name; ``None``: made of the place's name.
        old_name: name of the old folder inside the hidden one.

    Raises:
        OSError: the file system refused.
    """
    if not os.path.lexists(place):  # a link that leads nowhere is in the way, too
        finished.rename(place)
        return
    hidden = Path(tempfile.mkdtemp(prefix=aside or f".{place.name}.", suffix=PARTIAL_SUFFIX, dir=place.parent))
    try:
        with contextlib.suppress(FileNotFoundError):  # another process was about to replace it, too
            place.rename(hidden / old_name)
        try:
            finished.rename(place)
        except OSError:
            if not place.exists() and (hidden / old_name).exists():
                (hidden / old_name).rename(place)
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def decode_json(text: str | bytes, source: str, error: type[OdiseError]) -> Any:
    """Decode JSON that somebody else wrote.

    Args:
        text: the JSON.
        source: where it comes from, for the message.
        error: type of the error.

    Raises:
        OdiseError: of that type: it is no JSON, or an object in it has a key twice, of which only one would count.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as exc:
        raise error(f"{source} is not valid JSON ({exc}): correct it") from exc


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} occurs twice in one object")
        found[key] = value
    return found


def json_bytes(data: Any, indent: int | None = None) -> bytes:
    """JSON as UTF-8; file names that are no text (bytes outside their encoding) are escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent).encode()


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON with indentation, atomically."""
    with atomic_writer(path) as file:
        file.write(json_bytes(data, indent=1) + b"\n")
