"""Engines for the colour bundle, written as the exporter writes them, without PyTorch and without TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.backends.ort import OrtBackend
from odise_rt.bundle import Bundle, file_sha256
from odise_rt.engine_check import Bounds, Case
from odise_rt.engine_facts import EngineFacts, EngineKind, ShapeRange
from odise_rt.engines import REFERENCE_FILE, Engine, write_engine_file, write_reference
from odise_rt.specs import STAGES, StageSpec
from tests.odise_rt.fake_gpu import CAPABILITY, GPU, VERSION, plan_of

LOW = {"N": 1, "s": 32, "H": 32, "W": 32, "h": 1, "w": 1, "mh": 8, "mw": 8, "Q": 1, "L": 1}
HIGH = {"N": 4, "s": 64, "H": 320, "W": 320, "h": 320, "w": 320, "mh": 80, "mw": 80, "Q": 6, "L": 32}
DIMS = {"N": 2, "s": 64, "H": 64, "W": 96, "h": 50, "w": 90, "Q": 6, "mh": 16, "mw": 24, "L": 3}


def profiles(spec: StageSpec) -> tuple[dict[str, ShapeRange], ...]:
    """A wide profile and one of exactly :data:`DIMS`."""

    def between(low: dict[str, int], high: dict[str, int]) -> dict[str, ShapeRange]:
        return {t.name: ShapeRange(t.resolve(low), t.resolve(high), t.resolve(high)) for t in spec.inputs}

    return between(LOW, HIGH), between(DIMS, DIMS)


def example(spec: StageSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a stage at :data:`DIMS`."""
    random = np.random.default_rng(seed)
    return {
        t.name: random.integers(0, 60, t.resolve(DIMS))
        if t.dtype == "int64"
        else random.random(t.resolve(DIMS), np.float32)
        for t in spec.inputs
    }


def write_engine(
    bundle: Bundle, stage: str, kind: EngineKind = "tensorrt", verified_on: str | None = None, **changes: Any
) -> Engine:
    """Write one engine whose reference is the bundle's graph on the CPU; ``changes`` replace facts."""
    entry = bundle.stages[stage]
    bound = kind == "tensorrt"
    facts = EngineFacts(
        stage=stage,
        engine=kind,
        engine_version=VERSION,
        cuda="13" if kind != "ort-cuda" else None,
        platform=_platform(),
        gpu=GPU if bound else None,
        compute_capability=".".join(map(str, CAPABILITY)) if bound else None,
        targets=("8.9",) if kind == "tensorrt-rtx" else (),
        graph=entry.file.digest,
        built_graph="0" * 64,
        precision="fp32",
        profiles=profiles(entry.spec),
        flags=("strongly-typed",),
    )
    facts = dataclasses.replace(facts, **changes)
    folder = bundle.root / "engines" / facts.key
    folder.mkdir(parents=True)
    inputs = example(entry.spec)
    run = OrtBackend("cpu", 1).load(bundle, stage)
    write_reference(folder / REFERENCE_FILE, [Case(inputs, run.run(inputs))])
    ranges = [{k: dataclasses.asdict(r) for k, r in profile.items()} for profile in facts.profiles]
    content = entry.file.path.read_bytes()
    path = folder / (f"{stage}.onnx" if kind == "ort-cuda" else f"{stage}.plan")
    path.write_bytes(content if kind == "ort-cuda" else plan_of(content, ranges))
    verified = ({"gpu": verified_on, "version": VERSION, "checks": []},) if verified_on else ()
    files = {p.name: file_sha256(p) for p in (path, folder / REFERENCE_FILE)}
    engine = Engine(folder, facts, files, Bounds(1e-4, 1e-5), "the test", verified, {"seconds": 1.0})
    write_engine_file(engine)
    return engine


def write_engines(bundle: Bundle, **changes: Any) -> list[Engine]:
    """One engine for every stage."""
    return [write_engine(bundle, stage, **changes) for stage in STAGES]


def _platform() -> str:
    from odise_rt.backends.machine import engine_platform

    return engine_platform()


def replace_file(engine: Engine, name: str, content: bytes) -> Path:
    """Alter a file of an engine behind the description's back."""
    path = engine.folder / name
    path.write_bytes(content)
    return path
