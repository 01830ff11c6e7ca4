"""ONNX graph to engine, for TensorRT 10.16 and 11 and for TensorRT-RTX, whose Python interfaces agree in all that is
used here.

Run as a program it builds one engine, so that a parser that brings its process down (an unknown operator does that in
TensorRT-RTX) ends in an error that names the stage and not in the end of an export::

    python -m export.engine_from_onnx JOB.json

Networks are strongly typed: precision is what the graph says, and TF32 is off, since a graph that says float32 for a
part means it. Neither PyTorch nor ONNX is imported here, so a build has the memory to itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odise_rt.backends.trt_package import import_package, make_logger
from odise_rt.engine_facts import CHANNELS_LAST, EngineFacts, EngineKind, Profile
from odise_rt.errors import ExportError, OdiseError

RESULT_NAME = "result.json"
OPTIMIZATION_LEVEL = 3
"""TensorRT's own default: heuristics first, then timing."""
_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class BuildJob:
    """One engine to be built."""

    stage: str
    engine: EngineKind
    graph: Path
    """The ONNX file, with its weights beside it."""
    plan: Path
    """Where the engine is written."""
    profiles: tuple[Profile, ...]
    targets: tuple[str, ...] = ()
    """TensorRT-RTX: compute capabilities such as "8.9"; empty for the device that is here."""
    workspace_bytes: int | None = None
    """Scratch memory that a tactic may use; ``None``: the engine's default, which is all there is."""
    timing_cache: Path | None = None
    """File of timings, read if it is there, and replaced by what the build learned."""
    optimization_level: int = OPTIMIZATION_LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = dataclasses.asdict(self)
        return data | {key: str(data[key]) for key in ("graph", "plan", "timing_cache") if data[key] is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BuildJob:
        """The inverse of :meth:`to_dict`."""
        values = dict(data)
        for name in ("graph", "plan", "timing_cache"):
            values[name] = Path(values[name]) if values[name] is not None else None
        values["profiles"] = EngineFacts.profiles_from(values["profiles"])
        values["targets"] = tuple(values["targets"])
        return cls(**values)


@dataclass(frozen=True)
class BuildResult:
    """What became of a job."""

    seconds: float
    plan_bytes: int
    layers: int
    """Layers of the parsed network."""
    warning: str | None = None
    """What went wrong apart from the engine, which is whole."""


def build_flags(engine: EngineKind, optimization_level: int) -> tuple[str, ...]:
    """The options of a build that decide what the engine is; part of its facts."""
    if engine == "ort-cuda":
        return (CHANNELS_LAST,)
    flags = ("strongly-typed", "no-tf32", f"optimization-level={optimization_level}")
    return (*flags, "user-allocation" if engine == "tensorrt-rtx" else "activation-resize")


def build_engine(job: BuildJob) -> BuildResult:
    """Build one engine in this process.

    Raises:
        MissingPackageError: the engine's package is not installed.
        ExportError: the graph was refused or the engine could not be built.
    """
    started = time.perf_counter()
    trt = import_package(job.engine)
    log = make_logger(trt)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(job.graph)):
        errors = [_describe(parser.get_error(i)) for i in range(min(parser.num_errors, _ERRORS_SHOWN))]
        raise ExportError(
            f"stage {job.stage}: {trt.__name__} {trt.__version__} does not read {job.graph.name}: "
            f"{'; '.join(errors) or log.last()}; build the stage for another engine, e.g. --engine ort-cuda"
        )
    config = builder.create_builder_config()
    config.builder_optimization_level = job.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)
    if job.engine == "tensorrt-rtx":
        # It may allocate while it runs otherwise, and then a CUDA graph cannot be captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    else:
        # Without it some engines ask for the scratch memory of a profile's largest shape whatever they run; in
        # TensorRT-RTX it is on.
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.targets:
        _set_targets(trt, config, job)
    _add_profiles(builder, network, config, job)
    cache = _load_timing_cache(config, job.timing_cache)
    layers = int(network.num_layers)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"stage {job.stage}: {trt.__name__} {trt.__version__} built no engine: {log.last() or 'it gives no reason'}"
        )
    with job.plan.open("xb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())
    warning = None
    if cache is not None and job.timing_cache is not None:
        try:
            _save_timing_cache(config, job.timing_cache)
        except OSError as exc:
            warning = f"timings for the next build cannot be kept in {job.timing_cache.parent} ({exc.strerror or exc})"
    return BuildResult(time.perf_counter() - started, job.plan.stat().st_size, layers, warning)


def _describe(error: Any) -> str:
    where = f" at node {error.node_name() or error.node()} ({error.node_operator()})" if error.node() >= 0 else ""
    return f"{error.desc()}{where}"


def _add_profiles(builder: Any, network: Any, config: Any, job: BuildJob) -> None:
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    for number, profile in enumerate(job.profiles):
        if set(profile) != inputs:
            raise ExportError(
                f"stage {job.stage}: the graph has inputs {sorted(inputs)}, the profiles are for {sorted(profile)}: "
                "export the bundle again"
            )
        made = builder.create_optimization_profile()
        for name, shapes in profile.items():
            made.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(made) < 0:
            raise ExportError(f"stage {job.stage}: profile {number} was refused: {profile}")


def check_targets(trt: Any, targets: Sequence[str]) -> None:
    """Refuse compute capabilities that a package does not know.

    Args:
        trt: the package of TensorRT-RTX.
        targets: such as "8.9".

    Raises:
        ExportError: naming those that it knows.
    """
    known = trt.ComputeCapability.__members__
    unknown = [target for target in targets if _capability_name(target) not in known]
    if unknown:
        possible = ", ".join(f"{n[2:-1]}.{n[-1]}" for n in known if n.startswith("SM"))
        raise ExportError(
            f"{trt.__name__} {trt.__version__} has no target {', '.join(unknown)}: it builds for {possible}; for other "
            "GPUs use --engine tensorrt or ort-cuda"
        )


def _capability_name(target: str) -> str:
    return f"SM{target.replace('.', '')}"


def _set_targets(trt: Any, config: Any, job: BuildJob) -> None:
    check_targets(trt, job.targets)
    config.num_compute_capabilities = len(job.targets)
    for index, target in enumerate(job.targets):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[_capability_name(target)], index):
            raise ExportError(f"stage {job.stage}: target {target} was refused")


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Attach the cache, or an empty one; a damaged file counts as none."""
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        return None
    return cache


def _save_timing_cache(config: Any, path: Path) -> None:
    from odise_rt.files import atomic_writer

    learned = config.get_timing_cache()
    data = learned.serialize() if learned is not None else None
    if data is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(memoryview(data))


def main(argv: Sequence[str] | None = None) -> int:
    """Build the engine of a job file; the result, or the error, goes into ``result.json`` beside it."""
    (job_file,) = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    path = Path(job_file)
    job = BuildJob.from_dict(json.loads(path.read_text(encoding="utf-8")))
    try:
        outcome: dict[str, Any] = {"result": dataclasses.asdict(build_engine(job))}
    except (OdiseError, OSError, MemoryError) as exc:
        outcome = {"error": str(exc) or type(exc).__name__}
    (path.parent / RESULT_NAME).write_text(json.dumps(outcome), encoding="utf-8")
    return 0 if "result" in outcome else 1


def _end_with_parent() -> None:
    """End this process when the one that holds the other end of its input is gone, however that ended."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main())
