"""What is installed, what really works, and which bundles fit."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from odise_rt.backends.driver import nvidia_driver
from odise_rt.backends.machine import this_machine
from odise_rt.backends.trt_package import package_version
from odise_rt.cores import usable_cores
from odise_rt.engine_listing import engine_lines, list_engines
from odise_rt.errors import OdiseError
from odise_rt.version import __version__

REQUIRED = ("numpy", "pillow", "threadpoolctl", "tokenizers", "tqdm")
ENGINES = ("onnxruntime", "openvino", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-core", "cuda-bindings")


def examine(bundles: Iterable[Path] = ()) -> dict[str, Any]:
    """Look at this machine and at some bundles.

    Returns:
        ``packages`` and ``engines`` (name to version or ``None``), ``devices`` (name to ``"works"`` or why not),
        ``driver`` (NVIDIA's, and which CUDA it knows), ``gpu`` (its name, or why there is none), ``kernels`` (where the
        compiled CUDA kernels are, or why there are none), ``bundles`` (path to what is wrong, ``None`` if nothing is,
        and to its engines with whether they fit), and ``ready``: whether a device works and every bundle is sound.
    """
    devices = _devices()
    checked = {str(path): _bundle(path, devices) for path in bundles}
    packages = {name: package_version(name) for name in REQUIRED}
    ready = (
        all(packages.values())
        and any(state == "works" for state in devices.values())
        and all(entry["problem"] is None for entry in checked.values())
    )
    return {
        "odise_rt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "packages": packages,
        "engines": {name: package_version(name) for name in ENGINES},
        "devices": devices,
        "driver": str(nvidia_driver() or "none"),
        "gpu": _gpu(),
        "kernels": _kernels(),
        "bundles": checked,
        "ready": ready,
    }


def report(findings: dict[str, Any]) -> str:
    """The findings as text."""
    lines = [
        f"odise_rt {findings['odise_rt']}, Python {findings['python']}, {findings['platform']}, "
        f"{findings['cores']} usable cores"
    ]
    for title in ("packages", "engines"):
        lines.append(f"{title}:")
        lines += [f"  {name:<30}{version or 'not installed'}" for name, version in findings[title].items()]
    lines.append("devices:")
    lines += [f"  {name:<30}{state}" for name, state in findings["devices"].items()]
    lines.append(f"  {'NVIDIA driver':<30}{findings['driver']}")
    lines.append(f"  {'GPU':<30}{findings['gpu']}")
    lines.append(f"  {'CUDA kernels':<30}{findings['kernels']}")
    if findings["bundles"]:
        lines.append("bundles:")
    for path, entry in findings["bundles"].items():
        lines.append(f"  {path}: {entry['problem'] or entry['summary']}")
        lines += [f"    {line}" for line in engine_lines(entry["engines"])]
    lines.append("ready" if findings["ready"] else "not ready: see above")
    return "\n".join(lines)


def _gpu() -> str:
    """The device that TensorRT would use, or why there is none."""
    machine = this_machine()
    return f"{machine.gpu}, compute capability {machine.compute_capability}" if machine.gpu else str(machine.no_gpu)


def _kernels() -> str:
    """Where the CUDA kernels are, or why there are none: images then pass through host memory between stages."""
    from odise_rt.kernels.native import kernel_folder

    try:
        return f"of this version, in {kernel_folder()}"
    except OdiseError as exc:
        return str(exc)


def _devices() -> dict[str, str]:
    from odise_rt.backends.ort import PROVIDERS, working_provider

    devices = {}
    for device, provider in PROVIDERS.items():
        try:
            devices[f"{device} ({provider})"] = working_provider(device) or "works"
        except OdiseError as exc:
            devices[f"{device} ({provider})"] = str(exc)
    if package_version("openvino") is not None:
        from odise_rt.backends.openvino import working_openvino

        for precision, problem in working_openvino().items():
            devices[f"cpu (OpenVINO, {precision})"] = problem or "works"
    return devices


def _bundle(path: Path, devices: dict[str, str]) -> dict[str, Any]:
    from odise_rt.bundle import Bundle

    try:
        bundle = Bundle.open(path)
        engines = list_engines(bundle)
    except OdiseError as exc:
        return {"problem": str(exc), "summary": None, "engines": []}
    working = [name for name, state in devices.items() if state == "works"]
    where = f"fits {', '.join(working)}" if working else "no engine here can run it"
    variants = sorted({variant for entry in bundle.stages.values() for variant in entry.variants})
    extra = f"; graphs of its own for {', '.join(variants)}" if variants else ""
    summary = f"{bundle.name}, {bundle.facts.variant}, {bundle.precision}: all files match, {where}{extra}"
    return {"problem": None, "summary": summary, "engines": engines}
