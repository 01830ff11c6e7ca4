"""Threads for blocking work of an event loop, without a queue of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class WorkerThreads:
    """Runs so much at a time; the rest waits in the event loop, where a caller that gives up leaves nothing behind.

    A :class:`ThreadPoolExecutor` keeps what waits in a queue of its own, cancelled or not, with everything that it was
    given, until a thread is free to look at it: while one request is in work, any number of requests that were given up
    would keep their images in memory.
    """

    def __init__(self, count: int) -> None:
        """Start with ``count`` threads. One event loop may use them at a time."""
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="segment")
        self._free = asyncio.Semaphore(count)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``work`` in a thread.

        Cancelling gives up work that waits; work that a thread has begun is finished and its result dropped. Its thread
        counts as taken until then.
        """
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        try:
            future = self.pool.submit(work, *args, **kwargs)
        except BaseException:
            self._free.release()
            raise

        def release(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._free.release)

        future.add_done_callback(release)
        return await asyncio.wrap_future(future)
