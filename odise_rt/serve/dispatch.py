"""Who does the work: threads of the server's own process, or (``application.py``) Ray Serve replicas."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from odise_rt.serve.problems import RequestRefused
from odise_rt.serve.worker import Answer, SegmentRequest, Worker, WorkerSettings
from odise_rt.serve.worker_threads import WorkerThreads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """How the workers are."""

    ready: bool
    """Whether a request can be served now."""
    replicas: int
    """Copies of the model that are loaded."""
    reason: str = ""
    """Why it is not ready."""


class Dispatcher(Protocol):
    """Serves requests somewhere."""

    @property
    def workers(self) -> int:
        """Requests that can be in work at a time; always the same number."""
        ...

    async def start(self) -> None:
        """Load the model; returns when the first request can be served.

        Raises:
            OdiseError: it cannot be loaded.
        """
        ...

    def state(self) -> State:
        """How the workers are, from memory."""
        ...

    async def segment(self, request: SegmentRequest) -> Answer:
        """Serve a request. Cancelling gives up a request that waits; one in work is finished and dropped.

        Raises:
            RequestRefused: no worker can take it, or the one that had it died.
        """
        ...

    async def stop(self) -> None:
        """Release everything. Safe to call twice."""
        ...


class LocalDispatcher:
    """Threads of this process around one model: no Ray, no other process, and nothing listens but the server."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Serve ``settings.concurrency`` requests at a time."""
        self._settings = settings
        self._threads = WorkerThreads(settings.concurrency)
        self._worker: Worker | None = None

    @property
    def workers(self) -> int:
        """One for each thread."""
        return self._settings.concurrency

    async def start(self) -> None:
        """Load the model in a thread. Cancelled, it is still loaded to the end, and then released."""
        loading = self._threads.pool.submit(Worker, self._settings)
        try:
            self._worker = await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(_release)
            raise

    def state(self) -> State:
        """Ready once the model is loaded."""
        if self._worker is None:
            return State(False, 0, "the model is being loaded")
        return State(True, 1)

    async def segment(self, request: SegmentRequest) -> Answer:
        """Serve a request in a thread."""
        worker = self._worker
        if worker is None:
            raise RequestRefused("not_ready", "the model is being loaded: try again in a moment", 2.0)
        return await self._threads.run(worker.run, request)

    async def stop(self) -> None:
        """Wait for threads at work and release the model."""
        await asyncio.to_thread(self._threads.pool.shutdown, True, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _release(loaded: Future[Worker]) -> None:
    if not loaded.cancelled() and loaded.exception() is None:
        loaded.result().close()
