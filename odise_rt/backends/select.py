"""Which backend serves a device request. Nothing falls back without saying so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, get_args

from odise_rt.backends.base import Backend
from odise_rt.backends.ort import OrtBackend, working_provider
from odise_rt.bundle import Bundle
from odise_rt.engines import FOLDER
from odise_rt.errors import BackendError, MissingPackageError, OptionsError

MAX_THREADS = 1024
"""More would only exhaust the machine."""
logger = logging.getLogger(__name__)

DeviceRequest = Literal["auto", "cpu", "cuda"]
CpuEngine = Literal["onnxruntime", "openvino", "openvino-bf16"]
CPU_ENGINES: tuple[CpuEngine, ...] = get_args(CpuEngine)


def open_backend(
    device: DeviceRequest = "auto",
    threads: int | None = None,
    bundle: Bundle | None = None,
    cpu_engine: CpuEngine = "onnxruntime",
    notes: Path | None = None,
) -> Backend:
    """Open an engine.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA where it really works, else CPU. What was chosen, and why,
            is logged, and every result records it.
        threads: CPU threads inside an operator; ``None``: the cores that this process may use.
        bundle: whose engines may be used on CUDA; ``None``: only graphs in ONNX Runtime.
        cpu_engine: what runs the graphs where the device is a CPU.
        notes: folder in which OpenVINO's backend notes what it compared; ``None``: it compares at each load.

    Raises:
        OptionsError: an unknown device or engine, or a thread count below 1.
        BackendError: what was asked for does not work here.
        MissingPackageError: no engine is installed.
    """
    if device not in get_args(DeviceRequest):
        raise OptionsError(f"device is {device!r}: expected one of {', '.join(get_args(DeviceRequest))}")
    if threads is not None and (
        not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
    ):
        raise OptionsError(f"threads is {threads!r}: expected a whole number from 1 to {MAX_THREADS}, or None")
    if cpu_engine not in CPU_ENGINES:
        raise OptionsError(f"cpu_engine is {cpu_engine!r}: expected one of {', '.join(CPU_ENGINES)}")
    backend: Backend | None = None
    if device == "auto":
        backend = gpu_if_it_works(threads, bundle)
    elif device == "cuda" and bundle is not None:
        backend = _cuda_backend(bundle, threads)
    if backend is None:
        on_cpu = device in ("auto", "cpu")
        backend = _cpu_backend(cpu_engine, threads, notes) if on_cpu else OrtBackend("cuda", threads)
    logger.info("engine: %s", backend.description)
    return backend


def gpu_if_it_works(threads: int | None, bundle: Bundle | None) -> Backend | None:
    """What ``"auto"`` means: a backend on a GPU, or ``None`` with the reason in the log.

    Raises:
        MissingPackageError: no engine is installed.
    """
    try:
        problem = working_provider("cuda")
    except MissingPackageError:
        if bundle is None or not (bundle.root / FOLDER).is_dir():
            raise
        problem = "onnxruntime is not installed"
    if problem is None:
        return OrtBackend("cuda", threads) if bundle is None else _cuda_backend(bundle, threads)
    if bundle is not None and (bundle.root / FOLDER).is_dir():
        try:
            return _cuda_backend(bundle, threads)
        except BackendError as exc:
            problem = str(exc)
    logger.info("device auto: using the CPU, because %s", problem)
    return None


def _cpu_backend(engine: CpuEngine, threads: int | None, notes: Path | None) -> Backend:
    if engine == "onnxruntime":
        return OrtBackend("cpu", threads)
    from odise_rt.backends.first_use import FirstUse
    from odise_rt.backends.openvino import OpenVinoBackend

    return OpenVinoBackend("bf16" if engine == "openvino-bf16" else "fp32", threads, FirstUse(notes))


def _cuda_backend(bundle: Bundle, threads: int | None) -> Backend:
    from odise_rt.backends.cuda import CudaBackend

    return CudaBackend(bundle, threads)
