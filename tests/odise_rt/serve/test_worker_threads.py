"""Threads of a server: bounded work, and nothing kept of callers that gave up."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest

from odise_rt.serve.dispatch import LocalDispatcher
from odise_rt.serve.worker import Answer, SegmentRequest, WorkerSettings
from odise_rt.serve.worker_threads import WorkerThreads


class Blocking:
    """Stands for a worker: holds every request until the test lets go."""

    def __init__(self, settings: WorkerSettings | None = None) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.served: list[bytes] = []

    def run(self, request: SegmentRequest) -> Answer:
        self.entered.release()
        assert self.gate.wait(20)
        self.served.append(request.image)
        return Answer(request.image)

    def close(self) -> None:
        pass


Kept = weakref.ref[SegmentRequest]


async def begin(count: int, dispatcher: LocalDispatcher) -> tuple[list[asyncio.Task[Answer]], list[Kept]]:
    """Tasks with a request each, all of them as far as they come by themselves."""
    requests = [SegmentRequest(b"%d" % number, {}) for number in range(count)]
    tasks = [asyncio.create_task(dispatcher.segment(request)) for request in requests]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks, list(map(weakref.ref, requests))


def test_requests_that_were_given_up_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, label_bundle: Path) -> None:
    """Clients come and go while one request is in work: their images must go with them."""
    monkeypatch.setattr("odise_rt.serve.dispatch.Worker", Blocking)

    async def scenario() -> None:
        dispatcher = LocalDispatcher(WorkerSettings(label_bundle))
        await dispatcher.start()
        worker = dispatcher._worker
        assert isinstance(worker, Blocking)
        first, _ = await begin(1, dispatcher)
        assert await asyncio.to_thread(worker.entered.acquire, timeout=20)
        waiting, requests = await begin(20, dispatcher)
        assert all(task.cancel() for task in waiting)
        await asyncio.wait(waiting)
        assert all(task.cancelled() for task in waiting)
        waiting.clear()
        gc.collect()
        kept = sum(request() is not None for request in requests)
        worker.gate.set()
        assert (await first[0]).content == b"0"
        assert kept == 0
        again, _ = await begin(1, dispatcher)
        assert (await asyncio.wait_for(again[0], 20)).content == b"0"
        assert worker.served == [b"0", b"0"], "what was given up never ran"
        await dispatcher.stop()

    asyncio.run(scenario())


def test_a_model_that_nobody_waits_for_any_more_is_released(
    monkeypatch: pytest.MonkeyPatch, label_bundle: Path
) -> None:
    """The server is stopped while it loads: loading cannot be interrupted, but what it brings can be let go."""
    begun, gate = threading.Event(), threading.Event()
    closed: list[str] = []

    class Slow(Blocking):
        def __init__(self, settings: WorkerSettings) -> None:
            super().__init__(settings)
            begun.set()
            assert gate.wait(20)

        def close(self) -> None:
            closed.append("closed")

    monkeypatch.setattr("odise_rt.serve.dispatch.Worker", Slow)

    async def scenario() -> None:
        dispatcher = LocalDispatcher(WorkerSettings(label_bundle))
        loading = asyncio.create_task(dispatcher.start())
        assert await asyncio.to_thread(begun.wait, 20)
        loading.cancel()
        await asyncio.wait({loading})
        gate.set()
        await dispatcher.stop()
        assert loading.cancelled()
        assert closed == ["closed"]
        assert not dispatcher.state().ready

    asyncio.run(scenario())


def test_a_thread_counts_until_it_is_done_even_if_its_caller_left() -> None:
    async def scenario() -> None:
        threads = WorkerThreads(1)
        worker = Blocking()
        first = asyncio.create_task(threads.run(worker.run, SegmentRequest(b"first", {})))
        assert await asyncio.to_thread(worker.entered.acquire, timeout=20)
        first.cancel()
        second = asyncio.create_task(threads.run(worker.run, SegmentRequest(b"second", {})))
        await asyncio.wait({second}, timeout=0.05)
        assert threads.pool._work_queue.qsize() == 0, "it waits here, not in the pool"
        worker.gate.set()
        assert (await asyncio.wait_for(second, 20)).content == b"second"
        assert worker.served == [b"first", b"second"]
        threads.pool.shutdown()

    asyncio.run(scenario())


def test_errors_and_results_come_back_and_give_the_thread_back() -> None:
    async def scenario() -> None:
        threads = WorkerThreads(2)
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                await threads.run(divmod, 1, 0)
        assert await asyncio.gather(*(threads.run(divmod, n, 2) for n in range(9))) == [divmod(n, 2) for n in range(9)]
        threads.pool.shutdown()
        for _ in range(3):  # not a wait without end at the third
            with pytest.raises(RuntimeError, match="shutdown"):
                await asyncio.wait_for(threads.run(divmod, 1, 1), 20)

    asyncio.run(scenario())


def test_a_loop_that_is_gone_is_no_error() -> None:
    threads = WorkerThreads(1)
    gate = threading.Event()

    async def leave() -> None:
        task = asyncio.create_task(threads.run(gate.wait, 20))
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(leave())
    gate.set()
    threads.pool.shutdown()
