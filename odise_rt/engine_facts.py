"""What the validity of an engine depends on, and what a machine offers; see :mod:`odise_rt.engines`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from odise_rt.specs import STAGES

EngineKind = Literal["tensorrt", "tensorrt-rtx", "ort-cuda"]
ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)
"""Kinds of engines, in the order of preference."""
TITLES: dict[EngineKind, str] = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "ort-cuda": "ONNX Runtime CUDA",
}

CHANNELS_LAST = "channels-last"
"""Flag of ``ort-cuda`` engines whose convolutions have channels last in the graph."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRange:
    """What one input may look like under one profile."""

    min: Shape
    opt: Shape
    """The engine is tuned for this shape."""
    max: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies in the range."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


Profile = dict[str, ShapeRange]
"""Input name to its range; an engine has several profiles."""


@dataclass(frozen=True)
class EngineFacts:
    """Everything that the validity of an engine depends on."""

    stage: str
    engine: EngineKind
    engine_version: str
    cuda: str | None
    """Major version of CUDA that the engine's package is made for; ``None`` if it does not matter."""
    platform: str
    """Operating system and processor, e.g. ``"linux-x86_64"``."""
    gpu: str | None
    """Name of the device; ``None`` if every device of ``targets`` will do."""
    compute_capability: str | None
    """Compute capability of that device, e.g. ``"9.0"``."""
    targets: tuple[str, ...]
    """Compute capabilities that the engine may run on, if it is not bound to one device; empty: see ``gpu``."""
    graph: str
    """SHA-256 over the bundle's portable graph and weights that the engine was made from."""
    built_graph: str
    """SHA-256 of the graph that the engine was built from, after passes."""
    precision: str
    profiles: tuple[Profile, ...]
    """Shapes that the engine takes; empty if it takes any."""
    flags: tuple[str, ...]
    """Other options of its build that decide what it is."""

    @property
    def digest(self) -> str:
        """SHA-256 of the facts in canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """Name of the engine's folder."""
        return f"{self.stage}.{self.engine}.{self.digest[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = dataclasses.asdict(self)
        return cast("dict[str, Any]", json.loads(json.dumps(data)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EngineFacts:
        """The inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError when malformed."""
        names = {f.name for f in dataclasses.fields(cls)}
        if set(data) != names:
            raise ValueError(f"facts are {sorted(data)}, expected {sorted(names)}")
        values = dict(data)
        if values["stage"] not in STAGES or values["engine"] not in ENGINE_KINDS:
            raise ValueError(f"stage {values['stage']!r} or engine {values['engine']!r} is unknown")
        for name in ("engine_version", "platform", "graph", "built_graph", "precision"):
            if not isinstance(values[name], str):
                raise ValueError(f"{name} is {values[name]!r}")
        for name in ("cuda", "gpu", "compute_capability"):
            if not isinstance(values[name], str | None):
                raise ValueError(f"{name} is {values[name]!r}")
        for name in ("targets", "flags"):
            if not isinstance(values[name], list) or not all(isinstance(v, str) for v in values[name]):
                raise ValueError(f"{name} is {values[name]!r}")
            values[name] = tuple(values[name])
        values["profiles"] = cls.profiles_from(values["profiles"])
        return cls(**values)

    @staticmethod
    def profiles_from(data: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[Profile, ...]:
        """Profiles from JSON; raises KeyError, TypeError or ValueError when malformed."""
        return tuple(
            {name: ShapeRange(*(_shape(r[side]) for side in ("min", "opt", "max"))) for name, r in profile.items()}
            for profile in data
        )


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)


@dataclass(frozen=True)
class Machine:
    """What this machine offers to an engine."""

    platform: str
    gpu: str | None
    """Name of the first device; ``None`` if there is none."""
    compute_capability: str | None
    no_gpu: str | None
    """Why there is no device."""
    versions: Mapping[str, str]
    """Engine kind to the installed version; kinds that are not installed are missing."""
    cuda: Mapping[str, str | None] = field(default_factory=dict)
    """Engine kind to the major version of CUDA that its package is made for."""


@dataclass(frozen=True)
class Mismatch:
    """One fact that keeps an engine from being used here."""

    fact: str
    built: str
    here: str

    def __str__(self) -> str:
        return f"{self.fact} was {self.built} when it was built and is {self.here} here"
