"""What one command measures: sizes, repeats, which variants, which groups."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.pool import WorkerPool
from benchmarks.preparation import Missing, Preparation
from benchmarks.results import Result
from benchmarks.timed_picture import WORDS
from benchmarks.variants import VARIANTS, Job

GROUPS = ("peers", "sizes", "batches", "words", "cold", "vocabulary")
"""Groups of results of the CPU and GPU suites, in the order in which they run."""

_EXTRA_BYTES = 1 << 30
"""Memory beside weights: interpreter, libraries, activations of a small picture."""


@dataclass(frozen=True)
class Plan:
    """Settings of a CPU or GPU suite."""

    config: str = "odise-tiny"
    size: tuple[int, int] = (256, 256)
    device: Literal["cpu", "cuda"] = "cpu"
    variants: tuple[str, ...] = tuple(VARIANTS)
    groups: tuple[str, ...] = GROUPS
    threads: int = 2
    repeats: int = 20
    warmup: int = 5
    """Rounds before those that count; OpenVINO's first three were up to twice its median."""
    scenes: int = 50
    """Pictures for panoptic quality; 0: none."""
    sizes: tuple[int, ...] = (128, 256, 384, 512, 768, 1024, 1536, 2048)
    """Image sides of the scaling measurement."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Windows that run at a time, on a picture of four windows a side."""
    word_counts: tuple[int, ...] = (1, 10, 100, 1_000, 10_000)
    new_words: tuple[int, ...] = (1, 10, 100, 1_000)
    cold_starts: int = 3
    one_at_a_time: bool = False

    @property
    def size_text(self) -> str:
        """``"256x256"``, part of every key."""
        return f"{self.size[0]}x{self.size[1]}"

    def quick(self) -> Plan:
        """The same plan in little, for a look while developing, and for CI."""
        import dataclasses

        few = ("official", "pruned", "ort-portable", "runtime", "runtime-again")
        return dataclasses.replace(
            self,
            variants=tuple(v for v in self.variants if v in few),
            repeats=min(self.repeats, 7),
            warmup=1,
            scenes=min(self.scenes, 6),
            sizes=tuple(s for s in self.sizes if s <= 768),
            batches=(1, 4, 16),
            word_counts=(100, 2_000),
            new_words=(1, 100),
            cold_starts=1,
        )


@dataclass
class Bench:
    """A plan at work: what was prepared, and the results so far."""

    plan: Plan
    prepared: Preparation
    scratch: Path
    """Empty folder for the time of the run."""
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fits: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Structure to stage to work, for the picture of the peers."""

    def say(self, message: str) -> None:
        """Progress on standard output."""
        print(f"  {message}", flush=True)

    def job(self, variant: str, *, cache_dir: Path | None = None) -> Job | Missing:
        """What a worker of a variant runs, or why it cannot."""
        plan, prepared, entry = self.plan, self.prepared, VARIANTS[variant]
        source = dict(prepared.source)
        if entry.family == "ort":
            if entry.cpu_engine != "onnxruntime" and importlib.util.find_spec("openvino") is None:
                return Missing("openvino is not installed: pip install 'odise_rt[openvino]'", "absent")
            bundle = prepared.bundles.get(entry.bundle_precision, Missing("no bundle of this precision", "absent"))
            if isinstance(bundle, Missing):
                return bundle
            source = {"bundle": str(bundle)}
            if entry.graphs == "official":
                if isinstance(prepared.official, Missing):
                    return prepared.official
                source["graphs"] = str(prepared.official)
        else:
            source = {key: str(value) if key == "checkpoint" else value for key, value in source.items()}
        height, width = plan.size
        cache = None if cache_dir is None else str(cache_dir)
        return Job(variant, source, height, width, WORDS, plan.threads, plan.device, cache)

    def pool(self, names: dict[str, Job]) -> WorkerPool:
        """Workers for jobs, with what each is expected to need."""
        weights = self.prepared.weight_bytes
        # PyTorch holds some weights twice while it loads; ONNX Runtime packs matrices beside the mapped file.
        needs = {
            name: int(weights * (1.4 if VARIANTS[job.variant].family == "torch" else 1.8)) + _EXTRA_BYTES
            for name, job in names.items()
        }
        # torch.compile must not find what an earlier run compiled: its first picture is part of what is measured.
        environments = {
            name: {"TORCHINDUCTOR_CACHE_DIR": str(self.scratch / f"inductor-{name}")}
            for name, job in names.items()
            if VARIANTS[job.variant].compiled
        }
        return WorkerPool(names, needs, one_at_a_time=self.plan.one_at_a_time, environments=environments, say=self.say)
