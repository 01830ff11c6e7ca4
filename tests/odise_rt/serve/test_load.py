"""Two thousand requests, sixteen at a time, one in a hundred broken: no 5xx, every answer right, no growth."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from benchmarks.running_server import running_server
from tests.odise_rt.serve import load

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

REQUESTS, CONCURRENCY, BROKEN_SHARE = 2000, 16, 0.01
WARM_UP = 300
"""Requests before memory is measured for the first time: caches fill, and allocators take what they keep."""
GROWTH = 0.05


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["in process", "replicas", "batching"])
def test_many_requests(mode: str, label_bundle: Path, tmp_path: Path) -> None:
    arguments = {
        "in process": ["--in-process"],
        "replicas": ["--replicas", "2", "--cpus-per-replica", "0.5", "--object-store-mb", "200"],
        "batching": ["--in-process", "--batch-windows", "on", "--concurrency", "4"],
    }[mode]
    if mode == "replicas":
        pytest.importorskip("ray", reason="needs the extra 'serve'")
    work = list(load.jobs(label_bundle, REQUESTS, BROKEN_SHARE))
    assert sum(j.status == 400 for j in work) > 5
    common = ["--device", "cpu", "--threads", "1", "--queue", "64"]
    with running_server(label_bundle, tmp_path, [*arguments, *common]) as server:
        server.wait_for("ready", 180)
        load.run(server, work[:WARM_UP], CONCURRENCY)
        before = server.resident()
        started = time.monotonic()
        outcome = load.run(server, work, CONCURRENCY)
        seconds = time.monotonic() - started
        gc.collect()
        after = server.resident()
        metrics = server.get("/metrics")[1].decode()
        assert server.terminate() == 0
    growth = sum(after.values()) / sum(before.values()) - 1
    each = {name: f"{before.get(name, 0) >> 20} -> {size >> 20}" for name, size in after.items()}
    ordered = sorted(outcome.seconds)
    middle, late = ordered[len(ordered) // 2], ordered[-len(ordered) // 100]
    print(
        f"\n{mode}: {REQUESTS} requests in {seconds:.0f} s ({REQUESTS / seconds:.0f}/s), statuses "
        f"{dict(outcome.statuses)}, median {middle:.3f} s, 99 % {late:.3f} s, memory "
        f"{sum(before.values()) >> 20} -> {sum(after.values()) >> 20} MiB ({growth:+.1%}); {each}"
    )
    assert outcome.wrong == []
    assert outcome.lost == []
    assert not [status for status in outcome.statuses if status >= 500]
    assert outcome.statuses[200] == sum(j.status == 200 for j in work)
    assert outcome.statuses[400] == sum(j.status == 400 for j in work)
    assert "odise_requests_inside 0.0" in metrics
    assert growth < GROWTH, each
