"""Connections of clients: the head of a request must be small and come soon, and an answer must be read, or they end.

uvicorn bounds none of it by itself: its faster parser keeps a head of any size, and a connection with no request, with
half of one, with a body that drips on when it was answered, or with an answer that nobody reads stays open for ever,
with what is in memory for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers."""
HEAD_SECONDS = 10.0
"""To the end of a head, from the connection or, if it is not the first one there, from its first byte."""
REST_SECONDS = 30.0
"""To the end of a body that was answered before it had come. Most clients read no answer until they have sent all."""
ANSWER_SECONDS = 120.0
"""To read an answer that is too large for the buffers of the connection."""


class _Deadline:
    """A time by which something must have happened."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, missed: Callable[[], object]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._missed = missed
        self._timer: asyncio.TimerHandle | None = None

    def set(self, waiting: bool) -> None:
        """Start when there is something to wait for, stop when not; going on with it moves nothing."""
        if waiting and self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._missed)
        elif not waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bounded_connections() -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP in pure Python, with deadlines for a request's head, for the rest of a body that was
    answered already, and for reading an answer. A request with two kinds of length is answered with 400, and its
    connection closed.

    uvicorn bounds the size if it is told so (``h11_max_incomplete_event_size``).

    Raises:
        ImportError: uvicorn is not installed.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class OneLength(h11.Connection):
        def next_event(self) -> Any:
            event = super().next_event()
            if isinstance(event, h11.Request):
                lengths = {name for name, _ in event.headers} & {b"content-length", b"transfer-encoding"}
                if len(lengths) > 1:  # RFC 9112, 6.1: a proxy may see the end of the body elsewhere than this server
                    raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
            return event

    class BoundedConnection(H11Protocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.conn = OneLength(h11.SERVER, self.config.h11_max_incomplete_event_size or MAX_HEAD_BYTES)
            self._head = _Deadline(self.loop, HEAD_SECONDS, self._close)
            self._rest = _Deadline(self.loop, REST_SECONDS, self._close)
            self._answer = _Deadline(self.loop, ANSWER_SECONDS, self._abort)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head.set(True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            theirs = self.conn.their_state
            self._head.set(theirs is h11.IDLE)  # one has begun and not ended
            self._rest.set(theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE)

        def connection_lost(self, exc: Exception | None) -> None:
            for deadline in (self._head, self._rest, self._answer):
                deadline.set(False)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer.set(True)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.cycle is None or self.cycle.response_complete:
                self._answer.set(False)

        def on_response_complete(self) -> None:
            if not self.flow.write_paused:
                self._answer.set(False)
            super().on_response_complete()

        def _close(self) -> None:
            self.transport.close()

        def _abort(self) -> None:
            self.transport.abort()  # closing would wait for the reader

    return BoundedConnection
