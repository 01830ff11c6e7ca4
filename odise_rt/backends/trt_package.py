"""TensorRT and TensorRT-RTX: which package, which version, made for which CUDA. Nothing is imported before it is asked
for."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
from typing import Any

from odise_rt.engine_facts import TITLES, EngineKind
from odise_rt.errors import BackendError, MissingPackageError

logger = logging.getLogger(__name__)

MODULES: dict[EngineKind, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Engine kind to the name of its Python module; the two have nearly the same interface."""


def import_package(kind: EngineKind) -> Any:
    """The module of an engine.

    Raises:
        MissingPackageError: it is not installed.
        BackendError: it is installed, but its libraries cannot be loaded.
    """
    try:
        return importlib.import_module(MODULES[kind])
    except ModuleNotFoundError as exc:
        raise MissingPackageError(
            f"{TITLES[kind]} is not installed: pip install 'odise_rt[{kind}]' (from NVIDIA, under its own licence)"
        ) from exc
    except (ImportError, OSError, RuntimeError) as exc:
        raise BackendError(f"{TITLES[kind]} is installed but does not load ({exc}); run `odise-rt doctor`") from exc


@functools.cache
def package_version(name: str) -> str | None:
    """The installed version of a package, without importing it; ``None`` if it is not installed. An engine's package is
    named as its kind."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def package_cuda(kind: EngineKind) -> str | None:
    """Major version of CUDA that the installed package is made for: ``tensorrt`` installs ``tensorrt_cu13``, say."""
    pattern = re.compile(rf"{re.escape(MODULES[kind])}_cu(\d+)")
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").replace("-", "_").lower()
        found = pattern.fullmatch(name)
        if found:
            return found.group(1)
    return None


def make_logger(trt: Any) -> Any:
    """TensorRT's messages go to :mod:`logging`; errors are kept, as the calls themselves give no reason."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors = [*self.errors[-9:], " ".join(message.split())[:400]]
                logger.error("%s", message)
            elif severity == levels.WARNING:
                logger.info("%s", message)

        def last(self) -> str:
            return "; ".join(self.errors[-3:])

        def clear(self) -> None:
            self.errors = []

    return Log()
