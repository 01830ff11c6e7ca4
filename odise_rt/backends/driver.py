"""NVIDIA's driver, asked without any package: which one it is, and which CUDA it knows."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

CUDA_12_EXTRA = "gpu-cuda12"
"""The package's extra for drivers that know CUDA 12 and not 13."""
_LIBRARIES = {"cuda": "libcuda.so.1", "nvml": "libnvidia-ml.so.1"}
_LIBRARIES_ON_WINDOWS = {"cuda": "nvcuda.dll", "nvml": "nvml.dll"}
_MAX_CHARACTERS = 96


class Driver(NamedTuple):
    """What is installed."""

    version: str | None
    """Its own, e.g. ``"580.65.06"``; ``None`` where it does not say."""
    cuda: tuple[int, int]
    """The newest CUDA that it knows."""

    def __str__(self) -> str:
        name = self.version or "of an unknown version"
        return f"{name}, for CUDA up to {self.cuda[0]}.{self.cuda[1]}"


def nvidia_driver() -> Driver | None:
    """The driver, or ``None`` where there is none. No GPU is started."""
    library = _load("cuda")
    number = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return Driver(_version(), (number.value // 1000, number.value % 1000 // 10))


def why_too_old(what: str, cuda: int) -> str | None:
    """Why something that is made for a major version of CUDA cannot run on the driver here, or ``None``.

    Args:
        what: package and version.
        cuda: the major version.
    """
    driver = nvidia_driver()
    if driver is None or driver.cuda[0] >= cuda:
        return None
    extra = f", or pip install 'odise_rt[{CUDA_12_EXTRA}]'" if driver.cuda[0] == 12 else ""
    return (
        f"{what} is made for CUDA {cuda}, and NVIDIA's driver here is {driver}: update it (CUDA 13 needs 580 or newer)"
        f"{extra}"
    )


def _version() -> str | None:
    library = _load("nvml")
    text = ctypes.create_string_buffer(_MAX_CHARACTERS)
    if library is None or library.nvmlInit_v2() != 0:
        return None
    try:
        failed = library.nvmlSystemGetDriverVersion(text, _MAX_CHARACTERS)
    finally:
        library.nvmlShutdown()
    return None if failed else text.value.decode(errors="replace")


def _load(name: str) -> Any:
    try:
        return ctypes.CDLL((_LIBRARIES_ON_WINDOWS if sys.platform == "win32" else _LIBRARIES)[name])
    except OSError:
        return None
