"""Compiles what tests of the kernels need; what is there already, of the same sources and command, is reused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "odise_rt" / "kernels"
COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str | None:
    """A C++ compiler: ``$CXX``, or the first that is there."""
    wanted = os.environ.get("CXX")
    return next((found for name in ([wanted] if wanted else COMPILERS) if (found := shutil.which(name))), None)


def cached(folder: Path, name: str, command: Sequence[str], sources: Sequence[Path]) -> Path:
    """The file that ``command`` with ``-o FILE`` makes of the sources; ``name`` with its ending."""
    digest = hashlib.sha256("\0".join(command).encode() + b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    made = folder / f"{digest}-{name}"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / name
            done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            fresh.replace(made)
    return made


def library(folder: Path, source: Path, headers: Sequence[Path] = (), flags: Sequence[str] = ()) -> Path:
    """A C++ source as a library for ctypes."""
    command = [compiler() or "c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
    return cached(folder, f"{source.stem}.so", [*command, str(source)], [source, *headers])
