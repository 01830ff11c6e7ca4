"""Workers share the machine's memory: what fits stays, what does not becomes a row."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.pool import RESERVE_BYTES, WorkerPool
from benchmarks.variants import Job
from benchmarks.worker import WorkerError

GIB = 1 << 30


class FakeWorker:
    """Takes memory of a pretended machine."""

    free = 16 * GIB
    peaks: dict[str, int]

    def __init__(self, job: Job, _environment: dict[str, str] | None = None) -> None:
        self.name = job.variant
        self.bytes = self.peaks[job.variant]
        type(self).free -= self.bytes
        self.ready = {"load_peak_bytes": self.bytes, "load_seconds": 1.0}

    def close(self) -> None:
        type(self).free += self.bytes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(FakeWorker, "free", 16 * GIB)
    monkeypatch.setattr(
        FakeWorker, "peaks", {"official": 8 * GIB, "pruned": 6 * GIB, "runtime": 4 * GIB}, raising=False
    )
    return FakeWorker


def _pool(machine: type[FakeWorker], needs: dict[str, int] | None = None, **more: Any) -> tuple[WorkerPool, list[str]]:
    said: list[str] = []
    jobs = {name: Job(name, {}, 64, 64, "word", 1) for name in machine.peaks}
    pool = WorkerPool(
        jobs,
        needs or dict(machine.peaks),
        say=said.append,
        start=machine,  # type: ignore[arg-type]
        available=lambda: machine.free,
        **more,
    )
    return pool, said


def test_workers_stay_loaded_while_they_fit(machine: type[FakeWorker]) -> None:
    pool, said = _pool(machine)
    with pool:
        for _ in range(2):
            pool.get("official")
            pool.get("pruned")
        assert pool.starts == {"official": 1, "pruned": 1, "runtime": 0}
    assert machine.free == 16 * GIB
    assert said == ["loading official ...", "loading pruned ..."]


def test_the_one_that_rested_longest_makes_room(machine: type[FakeWorker]) -> None:
    pool, said = _pool(machine)
    with pool:
        for name in ("official", "pruned", "runtime"):
            pool.get(name)
            assert machine.free >= RESERVE_BYTES
        assert "ending official to make room for runtime" in said
        pool.get("pruned")
        pool.get("official")
        assert (
            said[-2:] == ["ending runtime to make room for official", "loading official ..."]
            or pool.starts["pruned"] == 1
        )
    assert machine.free == 16 * GIB


def test_one_at_a_time_never_has_two(machine: type[FakeWorker]) -> None:
    pool, _ = _pool(machine, one_at_a_time=True)
    with pool:
        for name in ("official", "runtime", "official"):
            pool.get(name)
            assert machine.free == 16 * GIB - machine.peaks[name]
        assert pool.starts["official"] == 2


def test_what_cannot_fit_is_out_of_memory_and_was_never_started(machine: type[FakeWorker]) -> None:
    pool, _ = _pool(machine, needs={"official": 20 * GIB, "pruned": 1, "runtime": 1})
    with pool:
        pool.get("runtime")
        with pytest.raises(WorkerError, match=r"needs about 20\.0 GiB") as raised:
            pool.get("official")
        assert raised.value.status == "oom"
        assert pool.starts["official"] == 0


def test_what_a_worker_really_needed_replaces_the_estimate(machine: type[FakeWorker]) -> None:
    pool, _ = _pool(machine, needs={"official": 14 * GIB, "pruned": 1, "runtime": 1})
    with pool:
        pool.get("official")
        assert pool.needs["official"] == 8 * GIB
        pool.learn("official", 9 * GIB)
        assert pool.needs["official"] == 9 * GIB
