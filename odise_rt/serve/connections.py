"""Connections of clients: the head of a request must come soon and be small, or its connection is closed.

uvicorn bounds neither by itself: its faster parser keeps a head of any size, and a connection with no request, or with
half of one, stays open for ever and takes the place of others.
"""

from __future__ import annotations

import asyncio

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers."""
HEAD_SECONDS = 10.0
"""To the end of a head, from the connection or, if it is not the first one there, from its first byte."""


def bounded_heads() -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP in pure Python, with a deadline for the head of each request.

    uvicorn bounds the size if it is told so (``h11_max_incomplete_event_size``).

    Raises:
        ImportError: uvicorn is not installed.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedHeads(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

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
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _give_up(self) -> None:
            self._head_timer = None
            self.transport.close()

    return BoundedHeads
