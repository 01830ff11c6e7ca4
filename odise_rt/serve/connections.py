"""Connections of clients: the head of a request must be small and come soon, and an answer must be read, or they end.

uvicorn bounds none of it by itself: its faster parser keeps a head of any size, and a connection with no request, with
half of one, or with an answer that nobody reads stays open for ever, with what is in memory for it.
"""

from __future__ import annotations

import asyncio

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers."""
HEAD_SECONDS = 10.0
"""To the end of a head, from the connection or, if it is not the first one there, from its first byte."""

ANSWER_SECONDS = 120.0
"""To read an answer that is too large for the buffers of the connection."""


def bounded_connections() -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP in pure Python, with deadlines for a request's head and for reading its answer.

    uvicorn bounds the size if it is told so (``h11_max_incomplete_event_size``).

    Raises:
        ImportError: uvicorn is not installed.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedConnection(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _answer_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:  # a head has begun and not ended
                self._start_timer()
            else:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_answer_timer()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._answer_timer is None:  # closing would wait for the reader
                self._answer_timer = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_answer_timer()
            super().resume_writing()

        def _start_timer(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _stop_answer_timer(self) -> None:
            if self._answer_timer is not None:
                self._answer_timer.cancel()
                self._answer_timer = None

        def _give_up(self) -> None:
            self._head_timer = None
            self.transport.close()

    return BoundedConnection
