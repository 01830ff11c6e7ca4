"""Memory on both sides of the bus that is allocated and released together."""

from __future__ import annotations

from typing import Any

import numpy as np

from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray


class DeviceMemory:
    """Buffers on both sides that go together."""

    def __init__(self, session: CudaSession) -> None:
        self._session = session
        self._buffers: dict[int, Any] = {}
        self._pinned: list[Any] = []

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> DeviceArray:
        """Uninitialised memory on the GPU."""
        kind = np.dtype(dtype)
        buffer = self._session.allocate(int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
        self._buffers[int(buffer.handle)] = buffer
        return DeviceArray(int(buffer.handle), shape, kind, buffer)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, np.ndarray]:
        """Pinned memory of the host, and an array on it."""
        buffer, array = self._session.host_array(shape, dtype)
        self._pinned.append(buffer)
        return buffer, array

    def upload(self, values: np.ndarray) -> DeviceArray:
        """A copy on the GPU. Waits for it: for what is set up once."""
        target = self.array(values.shape, values.dtype.name)
        pinned, staging = self._session.host_array(values.shape, values.dtype.name)
        try:
            np.copyto(staging, values)
            pinned.copy_to(buffer_of(target), stream=self._session.stream)
            self._session.stream.sync()
        finally:
            self._session.free_host(pinned)
        return target

    def free(self, array: DeviceArray) -> None:
        """Release one of the arrays."""
        self._buffers.pop(array.pointer).close(self._session.stream)

    def close(self) -> None:
        """Release all of it. Safe to call twice."""
        while self._buffers:
            self._buffers.popitem()[1].close(self._session.stream)
        while self._pinned:
            self._session.free_host(self._pinned.pop())


def buffer_of(array: DeviceArray) -> Any:
    """The cuda-core buffer that an array of :class:`DeviceMemory` lies in."""
    return array.owner
