"""Writes the micro-benchmarks of ``pytest benchmarks`` in the format of every other benchmark.

pytest benchmarks --run-json out/bench/kernels.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import clocks, environment, measure_rates
from benchmarks.results import Result, Run

_THREADS = 1
"""numpy's loops have one thread; what calls BLAS says so in its name."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--run-json``."""
    parser.addoption(
        "--run-json", type=Path, help="Write the micro-benchmarks as a run of python -m benchmarks.report."
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what pytest-benchmark measured."""
    out: Path | None = session.config.getoption("--run-json")
    measured: Any = getattr(session.config, "_benchmarksession", None)
    if out is None or measured is None:
        return
    run = Run("kernels", "pytest benchmarks", False, environment(_THREADS))
    run.rates.append(measure_rates(_THREADS))
    run.clocks.append({"when": "end", **clocks()})
    run.results = [_result(entry) for entry in measured.benchmarks]
    run.save(out)


def _result(entry: Any) -> Result:
    """One benchmark of pytest-benchmark, whatever became of it."""
    name = str(entry.name).removeprefix("test_").replace("/", " ")
    label = str((entry.extra_info or {}).get("label", name))
    facts = {"threads": _THREADS, "device": "cpu", "engine": "numpy"} | {
        key: value for key, value in (entry.extra_info or {}).items() if key != "label"
    }
    samples = list(entry.stats.data) if entry.stats else []
    if entry.has_error or not samples:
        return Result.missing(f"kernels/{name}", label, "failed", "the benchmark raised an error", facts=facts)
    # A run file holds every sample: of ten thousand rounds of a microsecond, a thousand say as much.
    step = max(1, len(samples) // 1000)
    return Result.measured(f"kernels/{name}", label, samples[::step], facts=facts)
