"""Which sources compiled kernels are of. Only the standard library: the build of the wheel reads it, too."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

STAMP = "sources.sha256"
"""File beside the fatbins: the :func:`sources_digest` that they were compiled from."""
HERE = Path(__file__).resolve().parent


@functools.cache
def sources_digest() -> str:
    """SHA-256 over the names and SHA-256 of all sources of the kernels, a line for each, as CMakeLists.txt makes it."""
    sources = {source.name: source for ending in ("cu", "cuh", "h") for source in HERE.glob(f"*.{ending}")}
    digests = {name: hashlib.sha256(source.read_bytes()).hexdigest() for name, source in sources.items()}
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def why_stale(folder: Path) -> str | None:
    """What is wrong with the compiled kernels of a folder, or ``None``.

    Their arguments may have changed since, and a kernel that is launched with others writes anywhere.
    """
    try:
        stamp = (folder / STAMP).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return f"nothing tells which sources they were compiled from ({STAMP} is missing)"
    return None if stamp == sources_digest() else "they were compiled from other sources than those of this version"
