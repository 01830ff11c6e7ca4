"""Which engines to build, and whether they can be built here."""

from __future__ import annotations

from dataclasses import dataclass

from export.engine_from_onnx import OPTIMIZATION_LEVEL, check_targets
from export.engine_profiles import WINDOW_COUNTS
from export.precision import EnginePrecision, check_bundle_precision
from odise_rt.backends.ort import working_provider
from odise_rt.backends.trt_package import import_package
from odise_rt.engine_facts import TITLES, EngineKind, Machine
from odise_rt.errors import ExportError, MissingPackageError
from odise_rt.specs import STAGES

RTX_TARGETS = ("8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for where no GPU says which: GeForce RTX 30, 40 and 50."""


@dataclass(frozen=True)
class EngineOptions:
    """Which engines to build, and how."""

    kinds: tuple[EngineKind, ...]
    precision: EnginePrecision | None = None
    """Precision inside the engines; ``None``: the bundle's."""
    stages: tuple[str, ...] = STAGES
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of images that the engines are tuned for, besides the usual ones."""
    windows: tuple[int, ...] = WINDOW_COUNTS
    targets: tuple[str, ...] = ()
    """Compute capabilities for TensorRT-RTX; empty: the GPU's, or :data:`RTX_TARGETS` without one."""
    unverified: bool = False
    """Put engines in place that cannot be compared here; the runtime does it at its first load."""
    rebuild: bool = False
    """Build engines that are there already, too."""
    optimization_level: int = OPTIMIZATION_LEVEL
    threads: int | None = None
    """Threads inside an operator when graphs are run on the CPU; ``None``: all cores."""
    timing_cache: bool = True
    """Keep what TensorRT learned of this GPU for the next build."""


def check_engine_options(options: EngineOptions, machine: Machine, bundle_precision: str) -> None:
    """Refuse what cannot be built here before minutes of work.

    Args:
        options: asked for.
        machine: this one.
        bundle_precision: of the bundle that gets the engines.

    Raises:
        MissingPackageError: the package of an engine is not installed.
        ExportError: an engine needs a GPU, cannot be compared here, has targets that its package does not know, or is
            to be more precise than its bundle.
    """
    if options.precision is not None:
        check_bundle_precision(bundle_precision, options.precision)
    if options.precision == "bf16" and "ort-cuda" in options.kinds:
        raise ExportError(
            "bf16 is for TensorRT and TensorRT-RTX, whose networks take it for every operator: build ONNX Runtime CUDA "
            "graphs with --engine-precision fp16"
        )
    for kind in options.kinds:
        if kind != "ort-cuda" and kind not in machine.versions:
            raise MissingPackageError(
                f"{TITLES[kind]} is not installed: pip install 'odise_rt[{kind}]' (from NVIDIA, under its own licence)"
            )
        if kind == "tensorrt" and machine.gpu is None:
            raise ExportError(f"TensorRT builds engines only on the GPU that will run them: {machine.no_gpu}")
        problem = why_not_compared(kind, options, machine)
        if problem is not None and not options.unverified:
            raise ExportError(
                f"engines of {TITLES[kind]} cannot be compared with their reference here: {problem}; build them "
                "where they will run, or pass --unverified: then the runtime compares them at their first load, and "
                "refuses those that are wrong"
            )
    if options.targets:
        check_targets(import_package("tensorrt-rtx"), options.targets)


def why_not_compared(kind: EngineKind, options: EngineOptions, machine: Machine) -> str | None:
    """Why engines of a kind cannot run where they are built; ``None`` if they can."""
    if machine.gpu is None:
        return machine.no_gpu
    if kind == "ort-cuda":
        return working_provider("cuda")
    if kind == "tensorrt-rtx" and options.targets and machine.compute_capability not in options.targets:
        return (
            f"they are for the compute capabilities {', '.join(options.targets)}, and that of the {machine.gpu} here "
            f"is {machine.compute_capability}"
        )
    return None
