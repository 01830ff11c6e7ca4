"""Which backend serves a device request. Nothing falls back without saying so."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from odise_rt.backends.base import Backend
from odise_rt.backends.ort import OrtBackend, working_provider
from odise_rt.errors import OptionsError

logger = logging.getLogger(__name__)

DeviceRequest = Literal["auto", "cpu", "cuda"]


def open_backend(device: DeviceRequest = "auto", threads: int | None = None) -> Backend:
    """Open an engine.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA where it really works, else CPU. What was chosen, and why,
            is logged, and every result records it.
        threads: CPU threads inside an operator; ``None``: the cores that this process may use.

    Raises:
        OptionsError: an unknown device or a thread count below 1.
        BackendError: ``"cuda"`` was asked for and does not work.
        MissingPackageError: no engine is installed.
    """
    if device not in get_args(DeviceRequest):
        raise OptionsError(f"device is {device!r}: expected one of {', '.join(get_args(DeviceRequest))}")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise OptionsError(f"threads is {threads!r}: expected a whole number of at least 1, or None")
    if device == "auto":
        problem = working_provider("cuda")
        device = "cpu" if problem else "cuda"
        if problem:
            logger.info("device auto: using the CPU, because %s", problem)
    backend = OrtBackend(device, threads)
    logger.info("engine: %s", backend.description)
    return backend
