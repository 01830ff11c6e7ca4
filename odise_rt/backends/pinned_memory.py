"""Page-locked memory of the host, which is taken back and lent again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

MAX_IDLE = 64 << 20
"""Bytes that wait to be lent again."""


class PinnedMemory:
    """Lends buffers. Locking pages takes the driver about a millisecond, and freeing them waits for the GPU: too long
    for what is set up for one image, or for words that change from image to image."""

    def __init__(self, core: Any) -> None:
        """``core``: the module ``cuda.core``."""
        self._core = core
        self._resource = core.LegacyPinnedMemoryResource()
        self._lent: dict[int, Any] = {}
        self._idle: defaultdict[int, list[Any]] = defaultdict(list)
        """Buffers by their size."""
        self._idle_bytes = 0

    def lend(self, size: int, stream: Any) -> Any:
        """A buffer of ``size`` bytes; at least one. Work on ``stream`` may still use a buffer that came back: it is
        waited for."""
        whole = 1 << (max(size, 1) - 1).bit_length()
        if self._idle[whole]:
            stream.sync()
            buffer = self._idle[whole].pop()
            self._idle_bytes -= whole
        else:
            buffer = self._resource.allocate(whole)
        self._lent[int(buffer.handle)] = buffer
        return self._core.Buffer.from_handle(int(buffer.handle), max(size, 1), owner=buffer)

    def take_back(self, lent: Any, stream: Any) -> None:
        """A buffer is not needed any more, nor any array on it."""
        buffer = self._lent.pop(int(lent.handle))
        size = int(buffer.size)
        if self._idle_bytes + size > MAX_IDLE:
            buffer.close(stream)
            return
        self._idle[size].append(buffer)
        self._idle_bytes += size

    def close(self, stream: Any) -> None:
        """Release what is not lent."""
        for buffers in self._idle.values():
            while buffers:
                buffers.pop().close(stream)
        self._idle_bytes = 0
