"""JSON as bytes, and writing results so that no reader ever sees half a file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file beside its place and rename it when the block ends without an error.

    Args:
        path: where the file will be; its folder must exist.
    """
    target = Path(path)
    # Opened by name rather than with tempfile, whose files only their owner may read.
    temporary = target.with_name(f".{target.name[:40]}-{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


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
