"""Worker processes that share one machine's memory: as many as fit stay loaded, the others are started when needed.

At full size one implementation needs 6 to 12 GiB, so three of them do not fit 24. A worker is only started when the
memory for it is free; if it is not, the one that rested longest is ended. If it still is not, the variant becomes an
OOM row: nothing here lets the machine swap or the kernel kill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.machine import available_bytes
from benchmarks.variants import Job
from benchmarks.worker import Worker, WorkerError

RESERVE_BYTES = 1 << 30
"""Kept free for everything else on the machine."""


class WorkerPool:
    """Starts, keeps and ends workers. Use it as a context manager."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        needs: Mapping[str, int],
        *,
        one_at_a_time: bool = False,
        environments: Mapping[str, dict[str, str]] | None = None,
        say: Callable[[str], None] = print,
        start: Callable[[Job, dict[str, str] | None], Worker] = Worker,
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            jobs: name to what its worker runs.
            needs: name to bytes that its worker is expected to need at most; what it really needed replaces this.
            one_at_a_time: end every worker before the next one is started.
            environments: name to environment variables of its process.
            say: told what is loaded and ended.
            start: makes a worker; for tests.
            available: bytes that are free; for tests.
        """
        self.jobs = dict(jobs)
        self.needs = dict(needs)
        self.environments = dict(environments or {})
        self.one_at_a_time = one_at_a_time
        self.starts: dict[str, int] = dict.fromkeys(jobs, 0)
        """How often each worker was started."""
        self.ready: dict[str, dict[str, float]] = {}
        """What each worker said when it was first loaded, with ``spawn_seconds`` from its start until then."""
        self._workers: dict[str, Worker] = {}  # the one used last comes last
        self._say, self._start, self._available = say, start, available

    def get(self, name: str) -> Worker:
        """The worker of that name, started if it is not running.

        Raises:
            WorkerError: it does not fit, or failed to load.
        """
        worker = self._workers.pop(name, None)
        if worker is None:
            self._make_room(name)
            self._say(f"loading {name} ...")
            begun = time.perf_counter()
            worker = self._start(self.jobs[name], self.environments.get(name))
            self.starts[name] += 1
            spawned = {"spawn_seconds": time.perf_counter() - begun}
            self.ready.setdefault(name, dict(worker.ready) | spawned)
            self.learn(name, int(worker.ready.get("load_peak_bytes", 0)))
        self._workers[name] = worker
        return worker

    def learn(self, name: str, peak_bytes: int) -> None:
        """Remember that a worker needed so much."""
        known = self.needs.get(name, 0) if self.starts.get(name, 0) > 1 else 0
        self.needs[name] = max(known, peak_bytes)

    def end(self, name: str) -> None:
        """End a worker if it runs."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def _make_room(self, name: str) -> None:
        while self._workers and (self.one_at_a_time or not self._fits(name)):
            oldest = next(iter(self._workers))
            self._say(f"ending {oldest} to make room for {name}")
            self.end(oldest)
        if not self._fits(name):
            free = self._available() or 0
            raise WorkerError(
                f"not started: needs about {self.needs[name] / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free "
                f"({RESERVE_BYTES / 2**30:.0f} GiB of them are kept in reserve)",
                "oom",
            )

    def _fits(self, name: str) -> bool:
        free = self._available()
        return free is None or free - RESERVE_BYTES >= self.needs.get(name, 0)

    def close(self) -> None:
        """End all workers."""
        for name in list(self._workers):
            self.end(name)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
