"""What this machine offers to engines: its first GPU, and the engines that are installed."""

from __future__ import annotations

import functools
import platform
import sys

from odise_rt.backends.cuda_core import import_cuda_core
from odise_rt.backends.driver import why_too_old
from odise_rt.backends.trt_package import MODULES, package_cuda, package_version
from odise_rt.engine_facts import Machine
from odise_rt.errors import MissingPackageError, first_line


@functools.cache
def this_machine() -> Machine:
    """Look once for a GPU and for engines. Nothing here starts an engine: TensorRT may end the process when it is
    started without a GPU."""
    gpu, capability, problem = _first_gpu()
    versions: dict[str, str] = {}
    cuda: dict[str, str | None] = {}
    for kind in MODULES:
        version = package_version(kind)
        if version is not None:
            versions[kind], cuda[kind] = version, package_cuda(kind)
    onnxruntime = package_version("onnxruntime-gpu")
    if onnxruntime is not None:
        versions["ort-cuda"] = onnxruntime
    return Machine(engine_platform(), gpu, capability, problem, versions, cuda)


def engine_platform() -> str:
    """Operating system and processor, e.g. ``"linux-x86_64"``."""
    return f"{sys.platform}-{platform.machine()}".lower()


def _first_gpu() -> tuple[str | None, str | None, str | None]:
    """Name and compute capability of device 0, or why there is none."""
    try:
        core = import_cuda_core()
    except MissingPackageError as exc:
        return None, None, str(exc)
    bindings = package_version("cuda-bindings")
    problem = bindings and why_too_old(f"cuda-bindings {bindings}", int(bindings.split(".")[0]))
    if problem:
        return None, None, problem
    try:
        device = core.Device(0)
        major, minor = device.compute_capability
        return str(device.name), f"{major}.{minor}", None
    except Exception as exc:  # the driver's absence and its errors come as many types
        reason = first_line(exc)
        if "driver library" in reason or "libcuda" in reason:
            return None, None, "there is no NVIDIA driver here"
        if "NO_DEVICE" in reason:
            return None, None, "the NVIDIA driver shows no GPU"
        return None, None, f"no GPU can be used ({reason[:200]})"
