"""One timer and one summary for every benchmark; importing this loads no model and no engine.

Variants are compared as ratios of interleaved runs: A B C A B C ..., so that a slow minute of a shared machine hits all
of them alike. Every variant lives in a process of its own (:mod:`benchmarks.worker`), which makes its peak memory its
own too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import REPOSITORY, environment
from odise_rt.files import write_json

__all__ = [
    "REPOSITORY",
    "Summary",
    "environment",
    "interleave",
    "paired_ratio",
    "time_calls",
    "time_cuda_calls",
    "write_results",
]


@dataclass(frozen=True)
class Summary:
    """Order statistics of repeated measurements, in the unit of the samples."""

    count: int
    median: float
    p10: float
    p90: float
    minimum: float
    maximum: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise at least one finite sample; percentiles are interpolated linearly.

        Raises:
            ValueError: there is none, or one is not finite.
        """
        values = np.asarray(samples, dtype=np.float64)
        if values.ndim != 1 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"expected a list of finite numbers, got {samples!r}: keep failed runs out of the samples")
        p10, median, p90, p99 = (float(v) for v in np.percentile(values, [10, 50, 90, 99]))
        return cls(len(values), median, p10, p90, float(values.min()), float(values.max()), p99)

    @property
    def tail(self) -> float:
        """``p99``, or the maximum of fewer than :data:`TAIL_SAMPLES` samples."""
        return self.p99 if self.count >= TAIL_SAMPLES else self.maximum

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Summary:
        """Rebuild from JSON; raises :class:`ValueError` for a missing or unknown field."""
        try:
            return cls(**data)
        except TypeError as exc:
            raise ValueError(f"a summary came as {dict(data)!r}: {exc}") from exc


LEAD_CYCLES = 1_000_000
"""Cycles of the GPU's clock: some half a millisecond, in which Python queues what takes it up to a quarter."""
MAX_LEAD_CYCLES = 1 << 29
"""Some quarter of a second, which no call takes that only queues."""
TAIL_SAMPLES = 100
"""Of fewer samples the 99th percentile is a name for something between the two largest."""
SETTLE_SECONDS = 0.25
"""Pause before every measured call. Threads of a pool that has just finished spin for up to 0.2 s in the hope of more
work (OpenMP's do), and would be counted against the variant whose turn is next."""


def interleave(
    variants: dict[str, Callable[[], float]],
    repeats: int,
    warmup: int,
    progress: Callable[[str, int, float], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Run every variant once a round.

    Args:
        variants: name to a call that runs once and returns its own seconds.
        repeats: rounds that count, at least 1.
        warmup: rounds before them that do not.
        progress: told the variant, the round (negative while warming up) and the seconds.
        on_failure: told the variant and what it raised; the variant is then left out, and the others go on. ``None``:
            the first failure ends all.

    Returns:
        Name to ``repeats`` samples in seconds, for every variant that never failed.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(-warmup, repeats):
        for name in list(samples):
            time.sleep(SETTLE_SECONDS)
            try:
                seconds = variants[name]()
            except Exception as exc:
                if on_failure is None:
                    raise
                del samples[name]
                on_failure(name, exc)
                continue
            if progress is not None:
                progress(name, round_index, seconds)
            if round_index >= 0:
                samples[name].append(seconds)
    return samples


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Ratios of samples of the same round: what drifts slowly cancels."""
    return Summary.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def time_calls(call: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls after ``warmup`` more, by ``perf_counter``."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def time_cuda_calls(
    call: Callable[[], object], repeats: int, warmup: int = 3, before: Callable[[], object] | None = None
) -> list[float]:
    """Seconds on the device of each call, by CUDA events on PyTorch's current stream: for kernels, whose launch returns
    before they ran. What a caller waits for is what :func:`time_calls` gives of a call that ends in a copy to the host.

    Before each call the device is kept busy, until the host has queued all of it: otherwise the time would be that of
    the host. A call that began before it was all queued is not counted, and the device is kept busy for twice as long.

    Args:
        call: what is timed. It must not wait for the device.
        repeats: measured calls.
        warmup: calls before them.
        before: queued before every measured call and not timed, e.g. to empty the cache.

    Raises:
        ImportError: PyTorch is not installed.
        RuntimeError: there is no CUDA device, or the call waits for it.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("CUDA events need a GPU, and PyTorch finds none: use time_calls on the CPU")
    for _ in range(warmup):
        call()
    lead = LEAD_CYCLES
    pairs: list[tuple[Any, Any]] = []
    while len(pairs) < repeats:
        if before is not None:
            before()
        torch.cuda._sleep(lead)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        if not start.query():
            pairs.append((start, end))
        elif lead < MAX_LEAD_CYCLES:
            lead *= 2
        else:
            raise RuntimeError("a call waits for the GPU, so events cannot time it: use time_calls")
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) / 1e3 for start, end in pairs]


def write_results(path: Path, data: Any) -> None:
    """Write what was measured as JSON; its folder is made, dataclasses become objects, and NaN is refused."""

    def plain(value: Any) -> Any:
        return asdict(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(data, default=plain, allow_nan=False)))
