"""CUDA graphs: work on a session's stream that is captured when it comes again, and then launched as a whole."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from odise_rt.backends.cuda_core import checked
from odise_rt.backends.device import CudaSession
from odise_rt.errors import first_line

logger = logging.getLogger(__name__)

MAX_FAILED_CAPTURES = 3
"""Failed captures in a row after which a piece of work is no longer captured."""


class CapturedGraph:
    """What was put on a stream, to be repeated. Released with :meth:`close`, or with its last reference."""

    def __init__(self, executable: Any) -> None:
        """Own the driver's graph."""
        from cuda.bindings import driver

        self._executable = executable
        self.close = weakref.finalize(self, driver.cuGraphExecDestroy, executable)
        """Safe to call twice."""
        self.close.atexit = False  # the driver may be gone by then

    def launch(self, session: CudaSession) -> None:
        """Put all of it on the session's stream."""
        from cuda.bindings import driver

        checked(driver.cuGraphLaunch(self._executable, session.handle))


class CapturedWork:
    """Work on a session's stream that becomes a graph when it comes a second time.

    The first run sets engines up for their shapes. A capture costs far more than a run, so what comes once (a size of
    image, a list of words) does without.

    A capture can fail through no fault of the work: whoever synchronises the whole device meanwhile, in any thread,
    breaks it (CUDA's programming guide, "Prohibited and Unhandled Operations"). Then the work is put on the stream as
    it is, and captured the next time, until that failed :data:`MAX_FAILED_CAPTURES` times.
    """

    def __init__(self, session: CudaSession, what: str) -> None:
        """Nothing is captured yet; ``what`` names the work in the log."""
        self._session, self._what = session, what
        self._graph: CapturedGraph | None = None
        self._ran = False
        self._failures = 0

    def run(
        self, work: Callable[[], None], capturable: Callable[[], bool], uncaptured: Callable[[], None] | None = None
    ) -> None:
        """Put the work on the stream, as a graph if there is one.

        Args:
            work: the same each time, until :meth:`forget`.
            capturable: asked after a run without a graph: some engines only know by then.
            uncaptured: does the same where there is no graph, if that can be done better than by ``work``.
        """
        wanted = self._graph is None and self._ran and self._failures < MAX_FAILED_CAPTURES
        if wanted and capturable():
            self._capture(work)
        if self._graph is None:
            (uncaptured or work)()
            self._ran = True
        else:
            self._graph.launch(self._session)

    def forget(self) -> None:
        """Release the graph: what it points to is about to move or to go."""
        self._ran = False
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _capture(self, work: Callable[[], None]) -> None:
        self._session.stream.sync()
        try:
            self._graph = capture(self._session, work)
        except Exception as exc:  # cuda-core and engines raise many types
            self._failures += 1
            last = self._failures == MAX_FAILED_CAPTURES
            logger.warning(
                "%s: no CUDA graph could be captured (%s)%s",
                self._what,
                first_line(exc),
                "; it runs without one from now on" if last else "",
            )
        else:
            self._failures = 0


def capture(session: CudaSession, work: Callable[[], None]) -> CapturedGraph:
    """Record what ``work`` puts on the session's stream.

    Not by cuda-core's GraphBuilder: the driver discards the graph of a capture that broke, and in versions 1.1 and
    1.2 the builder then destroys it again, which ends the process (NVIDIA/cuda-python issue 2834).
    """
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with _no_finalisers(), contextlib.ExitStack() as ending:
        checked(driver.cuStreamBeginCapture(session.handle, mode))
        try:
            work()
        finally:
            status, graph = driver.cuStreamEndCapture(session.handle)
            if graph is not None:
                ending.callback(driver.cuGraphDestroy, graph)
        checked([status])
        parameters = driver.CUDA_GRAPH_INSTANTIATE_PARAMS()
        parameters.flags = driver.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD
        parameters.hUploadStream = session.handle
        (executable,) = checked(driver.cuGraphInstantiateWithParams(graph, parameters))
    return CapturedGraph(executable)


@contextlib.contextmanager
def _no_finalisers() -> Iterator[None]:
    """No garbage collection by chance: a finaliser that frees memory of the GPU would break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
