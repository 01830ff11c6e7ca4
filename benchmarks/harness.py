"""One timer, one summary and one description of the machine for every benchmark.

Variants are compared as ratios of interleaved runs: A B C A B C ..., so that a slow minute of a shared machine hits all
of them alike. Every variant lives in a process of its own, which makes its peak memory its own too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("odise_rt", "numpy", "torch", "diffusers", "open_clip_torch", "transformers", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Summary:
    """Order statistics of repeated measurements, in the unit of the samples."""

    count: int
    median: float
    p10: float
    p90: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise at least one sample."""
        values = np.asarray(samples, dtype=np.float64)
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        return cls(len(values), float(median), float(p10), float(p90), float(values.min()), float(values.max()))


def interleave(
    variants: dict[str, Callable[[], float]],
    repeats: int,
    warmup: int,
    progress: Callable[[str, int, float], None] | None = None,
) -> dict[str, list[float]]:
    """Run every variant once a round.

    Args:
        variants: name to a call that runs once and returns its own seconds.
        repeats: rounds that count, at least 1.
        warmup: rounds before them that do not.
        progress: told the variant, the round (negative while warming up) and the seconds.

    Returns:
        Name to ``repeats`` samples in seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(-warmup, repeats):
        for name, run in variants.items():
            seconds = run()
            if progress is not None:
                progress(name, round_index, seconds)
            if round_index >= 0:
                samples[name].append(seconds)
    return samples


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Ratios of samples of the same round: what drifts slowly cancels."""
    return Summary.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def environment(threads: int) -> dict[str, Any]:
    """What a reader needs to place a number: code, versions, processor, memory, threads."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(terse=True),
    }


def matmul_gflops(threads: int, size: int = 2048, repeats: int = 5) -> float:
    """float32 matmul rate of PyTorch on this machine right now: the roofline that stages are held against."""
    code = (
        "import sys, time, torch\n"
        "threads, size, repeats = map(int, sys.argv[1:])\n"
        "torch.set_num_threads(threads)\n"
        "a = torch.randn(size, size)\n"
        "best = min((lambda t: (a @ a, time.perf_counter() - t)[1])(time.perf_counter()) for _ in range(repeats))\n"
        "print(2 * size**3 / best / 1e9)\n"
    )
    command = [sys.executable, "-c", code, str(threads), str(size), str(repeats)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_json(path: Path, data: Any) -> None:
    """Write beside, then rename; dataclasses become objects."""

    def plain(value: Any) -> Any:
        return asdict(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(data, indent=2, default=plain) + "\n", encoding="utf-8")
    temporary.replace(path)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
