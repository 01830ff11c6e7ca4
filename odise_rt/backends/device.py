"""One GPU through cuda-core: a stream, device memory and pinned host memory.

A session belongs to a backend. Its stages run one after the other on its stream, under its lock, and share one piece of
scratch memory, so the peak is that of the hungriest stage and not the sum of all. Where a stage's buffers are set up,
a run allocates nothing.

Tests run it with the real cuda-core on a driver made of host memory: it has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from odise_rt.backends.cuda_core import checked, cuda_errors, import_cuda_core
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.backends.pinned_memory import PinnedMemory

logger = logging.getLogger(__name__)


class CudaSession:
    """A device with one stream. Use it as a context manager, or call :meth:`close`."""

    def __init__(self) -> None:
        """Open the first GPU.

        Raises:
            MissingPackageError: cuda-core is not installed.
            BackendError: there is no GPU that works.
        """
        self._core = import_cuda_core()
        self.lock = threading.RLock()
        """Held while a stage runs or sets itself up."""
        self._scratch: Any = None
        self._users = 0
        self.generation = 0
        """Grows when scratch memory moves: graphs that were captured before must not be launched any more."""
        with cuda_errors("the GPU cannot be opened"):
            self._device = self._core.Device(0)
            self._device.set_current()
            self.stream = self._device.create_stream()
            self._pinned = PinnedMemory(self._core)

    @property
    def name(self) -> str:
        """Name of the device."""
        return str(self._device.name)

    @property
    def handle(self) -> int:
        """Of the stream, for engines."""
        return int(self.stream.handle)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed; a closed one is not opened again."""
        return self.stream is None

    def retain(self) -> bool:
        """Count one more user: a stage, or who is about to open one. False if the session was closed meanwhile."""
        with self.lock:
            if self.is_closed:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Count one user less; the last one closes the session."""
        with self.lock:
            self._users -= 1
            if self._users <= 0:
                self.close()

    @contextlib.contextmanager
    def use(self, what: str) -> Iterator[None]:
        """The device for this thread alone; errors inside become ours."""
        with self.lock, cuda_errors(what):
            self._device.set_current()
            yield

    def allocate(self, size: int) -> Any:
        """Device memory; at least one byte."""
        return self._device.allocate(max(size, 1), stream=self.stream)

    def host_array(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, np.ndarray]:
        """Pinned host memory, and an array on it that must not outlive it; for :meth:`free_host`."""
        count = int(np.prod(shape, dtype=np.int64))
        buffer = self._pinned.lend(count * np.dtype(dtype).itemsize, self.stream)
        raw = memoryview((ctypes.c_byte * int(buffer.size)).from_address(int(buffer.handle))).cast("B")
        return buffer, np.frombuffer(raw, dtype, count).reshape(shape)

    def free_host(self, buffer: Any) -> None:
        """Give back what :meth:`host_array` gave."""
        self._pinned.take_back(buffer, self.stream)

    def scratch(self, size: int) -> Any:
        """Memory that all stages share, of at least ``size`` bytes. It may move; see :attr:`generation`."""
        if self._scratch is None or int(self._scratch.size) < size:
            if self._scratch is not None:
                self.stream.sync()
                self._scratch.close(self.stream)
                self._scratch = None
                self.give_back()
            self.generation += 1
            self._scratch = self.allocate(size)
        return self._scratch

    def give_back(self) -> None:
        """Return what was released to the driver. cuda-core's pool keeps it otherwise, and engines that allocate in
        other ways cannot have it."""
        pool = getattr(getattr(self._device, "memory_resource", None), "handle", None)
        if pool is None:  # a device without pools
            return
        from cuda.bindings import driver

        self.stream.sync()
        try:
            checked(driver.cuMemPoolTrimTo(pool, 0))
        except RuntimeError as exc:
            logger.info("the GPU's memory pool could not be trimmed (%s)", exc)

    def view(self, array: DeviceArray) -> Any:
        """A buffer over memory of somebody else."""
        return self._core.Buffer.from_handle(array.pointer, array.nbytes, owner=array.owner)

    def close(self) -> None:
        """Release the stream and scratch memory. Safe to call twice."""
        with self.lock:
            if self.stream is None:
                return
            with cuda_errors("the GPU cannot be released"):
                self._device.set_current()
                self.stream.sync()
                if self._scratch is not None:
                    self._scratch.close(self.stream)
                    self._scratch = None
                self._pinned.close(self.stream)
                self.stream.close()
            self.stream = None

    def __enter__(self) -> CudaSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
