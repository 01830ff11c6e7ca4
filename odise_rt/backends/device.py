"""One GPU through cuda-core: a stream, device and pinned host memory, captured graphs.

A session belongs to a backend. Its stages run one after the other on its stream, under its lock, and share one piece of
scratch memory, so the peak is that of the hungriest stage and not the sum of all. Where a stage's buffers are set up,
a run allocates nothing.

Tests run it with the real cuda-core on a driver made of host memory: it has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from odise_rt.backends.pinned_memory import PinnedMemory
from odise_rt.errors import BackendError, MissingPackageError, OutOfMemoryError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

_DLPACK_CUDA = frozenset({2, 13})
"""DLPack's numbers for memory of a GPU and for memory that CUDA moves about."""
MAX_FAILED_CAPTURES = 3
"""Of the same work, one after the other, until it is left alone."""


def import_cuda_core() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is not installed, or cannot be imported: the message has the command that helps.
    """
    try:
        import cuda.core
    except ModuleNotFoundError as exc:
        raise MissingPackageError(
            "running engines on a GPU needs cuda-core, which is not installed: pip install 'odise_rt[cuda]'"
        ) from exc
    except ImportError as exc:  # its compiled half and cuda-bindings are of versions that do not go together
        raise MissingPackageError(
            f"running engines on a GPU needs cuda-core, which cannot be imported ({first_line(exc)}): "
            "pip install --upgrade cuda-core cuda-bindings"
        ) from exc
    return cuda.core


@contextlib.contextmanager
def cuda_errors(what: str) -> Iterator[None]:
    """Turns errors of cuda-core into ours. ``what`` was being done."""
    try:
        yield
    except (BackendError, MissingPackageError):
        raise
    except Exception as exc:  # cuda-core raises many types, from the driver's and its own
        raise (
            memory_error(what, str(exc))
            if is_out_of_memory(exc)
            else BackendError(f"{what}: {first_line(exc)}; run `odise-rt doctor`")
        ) from exc


def checked(results: Sequence[Any]) -> Sequence[Any]:
    """What a function of cuda-bindings gives, without its status, which comes first.

    Raises:
        RuntimeError: it failed; see :func:`cuda_errors`.
    """
    status, *values = results
    if int(status) != 0:
        raise RuntimeError(status.name)
    return values


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


def memory_error(what: str, reason: str) -> OutOfMemoryError:
    """The error for memory that ran out on the GPU."""
    return OutOfMemoryError(
        f"{what}: the GPU is out of memory; use a smaller short_edge or windows_per_batch=1 in SegmentOptions, or "
        f"low_memory=True in Segmenter.load ({reason.strip()[:200]})"
    )


def free_memory() -> int:
    """Free bytes on the first GPU."""
    core = import_cuda_core()
    from cuda.bindings import driver

    with cuda_errors("the free memory of the GPU cannot be read"):
        core.Device(0).set_current()
        free, _total = checked(driver.cuMemGetInfo())
    return int(free)


@dataclass(frozen=True)
class DeviceArray:
    """An array that lies on the GPU already, from ``__cuda_array_interface__`` or DLPack."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object
    """Kept alive while the array is used."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def as_device_array(value: object, stream: int) -> DeviceArray | None:
    """A view of an array on the GPU, without a copy; ``None`` for anything else, such as numpy's.

    Args:
        value: of torch, CuPy, pycuda, or whatever else offers one of the two protocols.
        stream: handle of the stream that will read it; work of its producer is waited for, on the device.

    Raises:
        BackendError: the array is not contiguous or cannot be viewed.
    """
    if isinstance(value, DeviceArray):
        return value
    if isinstance(value, np.ndarray) or not is_on_device(value):
        return None
    import_cuda_core()
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_any_interface(_described(value), stream_ptr=stream)
        shape, dtype = tuple(int(size) for size in view.shape), np.dtype(view.dtype)
        strides = tuple(int(step) for step in view.strides) if view.strides is not None else None
        pointer = int(view.ptr)
    except (BufferError, TypeError, ValueError, RuntimeError) as exc:
        raise BackendError(f"an array of type {type(value).__name__} cannot be read on the GPU: {exc}") from exc
    if strides is not None and not is_dense(shape, strides):
        raise BackendError(
            f"an array of shape {shape} has the strides {strides}: expected a C-contiguous one; call .contiguous() or "
            "ascontiguousarray first"
        )
    return DeviceArray(pointer, shape, dtype, (value, view))


class _Described:
    """An array by version 3 of the interface, which is the least that cuda-core reads."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


def _described(value: Any) -> Any:
    """The array itself, or its description where that is of an older version.

    Those versions do not name the stream that the array is written on. It is taken to be the default one, which is
    where it is with a library that knows no other.
    """
    if hasattr(value, "__dlpack__"):
        return value
    interface = value.__cuda_array_interface__
    return value if interface["version"] >= 3 else _Described({**interface, "version": 3, "stream": 1})


def as_host_array(value: Any) -> np.ndarray:
    """An array of the host: numpy's, or a view of somebody else's by DLPack, without a copy."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return np.asarray(value)
    return np.from_dlpack(value)


def is_on_device(value: Any) -> bool:
    """Whether an object is an array in the memory of a GPU, by either protocol; needs no package and no GPU."""
    if isinstance(value, DeviceArray):
        return True
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) in _DLPACK_CUDA


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides in values are those of a C-contiguous array; those of axes of length 1 do not matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


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
            self._graph = self._session.capture(work)
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

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Record what ``work`` puts on the stream.

        Not by cuda-core's GraphBuilder: the driver discards the graph of a capture that broke, and in versions 1.1 and
        1.2 the builder then destroys it again, which ends the process (NVIDIA/cuda-python issue 2834).
        """
        from cuda.bindings import driver

        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with _no_finalisers(), contextlib.ExitStack() as ending:
            checked(driver.cuStreamBeginCapture(self.handle, mode))
            try:
                work()
            finally:
                status, graph = driver.cuStreamEndCapture(self.handle)
                if graph is not None:
                    ending.callback(driver.cuGraphDestroy, graph)
            checked([status])
            parameters = driver.CUDA_GRAPH_INSTANTIATE_PARAMS()
            parameters.flags = driver.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD
            parameters.hUploadStream = self.handle
            (executable,) = checked(driver.cuGraphInstantiateWithParams(graph, parameters))
        return CapturedGraph(executable)

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
