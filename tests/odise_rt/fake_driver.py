"""The real cuda-core on a driver made of host memory.

cuda-core is Cython over the functions of ``libcuda.so.1``. Here that library is a few lines of C (``fake_driver.c``)
which give Python functions for the names that are asked for: memory is the host's, a stream does its work at once or
records it while it is captured, and kernels are their own source on the CPU. So what the runtime asks of cuda-core, and
what cuda-core asks of the driver (arguments of kernels, captures, copies, releases), are the real ones; only the driver
and the GPU are not. A function of the driver that is not written here is an error which names it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import enum
import functools
import hashlib
import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from odise_rt.kernels.launch_plans import Launch
from tests.odise_rt.kernels.builds import KERNELS, compiler
from tests.odise_rt.kernels.compiled import PtxKernels
from tests.odise_rt.kernels.emulated import Emulation

SOURCE = Path(__file__).resolve().with_suffix(".c")
CONTEXT, POOL = 0xC0DE0000, 0xB0010000


class Status(enum.IntEnum):
    """Of the driver's functions, by its numbers."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NO_DEVICE = 100
    INVALID_CONTEXT = 201
    ILLEGAL_STATE = 401
    NOT_FOUND = 500
    NOT_SUPPORTED = 801
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901


DRIVER_VERSION = 13_000
"""CUDA 13.0: that of driver 580."""
GPU = "Fake GPU"
CAPABILITY = (9, 0)
SHARED_BYTES_OF_A_BLOCK, MAX_DYNAMIC_SHARED_BYTES = 97, 8
MULTIPROCESSORS, SHARED_BYTES = 132, 232_448
ATTRIBUTES = {16: MULTIPROCESSORS, 75: CAPABILITY[0], 76: CAPABILITY[1], SHARED_BYTES_OF_A_BLOCK: SHARED_BYTES}
"""Of the device by the driver's numbers: multiprocessors, compute capability, what a block can ask for. Every other one
is 1, which mostly means yes."""
INVALIDATED = 2
"""State of a capture; 0 is none and 1 an active one."""
POINTER_ATTRIBUTES = {2: 2, 9: 0}
"""Memory of a GPU, of the first one."""
NUMBERS = {"int": np.int32, "int32_t": np.int32, "int64_t": np.int64, "float": np.float32}
C_TYPES: dict[type, Any] = {
    int: ctypes.c_uint64, np.int32: ctypes.c_int32, np.int64: ctypes.c_int64, np.float32: ctypes.c_float,
}  # fmt: skip
LETTERS = {
    "p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint, "z": ctypes.c_size_t, "s": ctypes.c_char_p,
}  # fmt: skip
"""Types of a function's parameters in its signature: pointer or handle, numbers, a name."""


@functools.cache
def why_not() -> str | None:
    """What keeps the real cuda-core from running on this driver here, or ``None``."""
    try:
        found = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return "cuda-core is not installed"
    if sys.platform != "linux":
        return "only on Linux can a library stand for NVIDIA's driver"
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return "this machine has NVIDIA's driver"
    return None if compiler() is not None else "there is no C compiler"


@functools.cache
def parameters() -> dict[str, list[type]]:
    """Types of the parameters of every kernel, from its source; a pointer is ``int``."""
    found = {}
    for source in sorted(KERNELS.glob("*.cu")):
        text = re.sub(r"(?m)^#include.*$", "", source.read_text())
        command = [compiler() or "c++", "-E", "-P", "-x", "c++", "-"]
        plain = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
        for name, inside in re.findall(r"__global__ void __launch_bounds__\([^)]*\)\s*(\w+)\(([^)]*)\)", plain):
            found[name] = [int if "*" in one else NUMBERS[one.split()[0]] for one in inside.split(",")]
    assert found
    return found


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


class Launched(NamedTuple):
    """What the driver was told to launch."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    arguments: tuple[Any, ...]
    """As :meth:`odise_rt.kernels.native.Kernels.launch` gets them."""


class Stream:
    """Work of a stream: done at once, or recorded while it is captured."""

    def __init__(self, log: Callable[[str], None], breaks: Callable[[str], bool]) -> None:
        """``breaks`` is asked whether a step of a capture breaks it."""
        self._log, self._breaks = log, breaks
        self.recording: list[Callable[[], Any]] | None = None
        self.invalidated = False
        """The capture is broken: nothing can be done with it but to end it."""
        self.graph = 0
        """Of the last capture."""

    def begin(self) -> bool:
        """Begin a capture; whether that went well."""
        assert self.recording is None
        self.recording = None if self._breaks("begin") else []
        return self.recording is not None

    def do(self, what: str, work: Callable[[], Any]) -> bool:
        """Put work on the stream; whether that went well."""
        if self.recording is None:
            self._log(what)
            work()
            return True
        self.invalidated |= self._breaks("work")
        self.recording.append(work)
        return not self.invalidated

    def end(self) -> bool:
        """End the capture; whether there is a graph of it."""
        broken = self.invalidated or self._breaks("end")
        self.recording, self.invalidated = None, False
        return not broken


class Owner(Protocol):
    """Who watches what the driver does, and says what shall go wrong."""

    log: list[str]
    device_bytes: int
    limit: int
    streams: dict[int, Any]
    graphs: int
    broken: Literal["begin", "work", "end", "instantiate"] | None


@dataclass
class Graph:
    """Recorded work."""

    owner: Owner
    work: list[Callable[[], Any]]


def _put(address: int | None, kind: Any, value: Any) -> None:
    """Write a result."""
    assert address is not None
    ctypes.cast(address, ctypes.POINTER(kind))[0] = value


def _takes(letters: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Names the types of a function's parameters."""

    def mark(function: Callable[..., int | None]) -> Callable[..., int | None]:
        function.letters = letters  # type: ignore[attr-defined]
        return function

    return mark


class Driver:
    """The functions of the driver that cuda-core calls; one for the process, as the library is."""

    def __init__(self, library: Path) -> None:
        """Put the library in the place of ``libcuda.so.1``."""
        self.owner: Owner | None = None
        """``None``: this machine has no GPU."""
        self.kernels: Emulation | PtxKernels | None = None
        """What launches run; ``None``: nothing."""
        self.launched: list[Launched] = []
        self.problems: list[str] = []
        """Errors inside of functions, which cannot leave them through C."""
        self._functions: dict[str, tuple[int, Any]] = {}
        """Slot of the library and function in C, by name."""
        self._handles = itertools.count(0x10000, 16)
        self._memory: dict[int, tuple[Any, int, Owner]] = {}
        self._streams: dict[int, Stream] = {1: Stream(self._log, self._breaks)}  # the legacy default stream
        self._events: dict[int, int | None] = {}
        """Streams that they were recorded on."""
        self._graphs: dict[int, Graph] = {}
        self._kernels: dict[int, str] = {}
        self._shared_limits: dict[int, int] = {}
        self._thread = threading.local()
        self._names = {int(code): ctypes.create_string_buffer(f"CUDA_ERROR_{code.name}".encode()) for code in Status}
        self._library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        self._lookup = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(self._find)
        self._library.odise_look_up_with(self._lookup)
        atexit.register(self._library.odise_look_up_with, None)

    def _find(self, name: bytes) -> int:
        """Slot of a function of the driver. One that is not written here is an error only when it is called."""
        text = name.decode()
        if text not in self._functions:
            work = getattr(self, text, None)
            kinds = [LETTERS[letter] for letter in getattr(work, "letters", "")]
            self._functions[text] = len(self._functions), ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(self._call(text, work))
            self._library.odise_place(*self._functions[text])
        return self._functions[text][0]

    def _call(self, name: str, work: Callable[..., int | None] | None) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            try:
                if work is None:
                    raise NotImplementedError(f"{name} of the driver is called: write it in {__name__}")
                return work(*arguments) or 0
            except BaseException as exc:
                self.problems.append(f"{name}{arguments}: {exc!r}")
                return Status.NOT_SUPPORTED

        return call

    def _log(self, what: str) -> None:
        if self.owner is not None:
            self.owner.log.append(what)

    def _new(self) -> int:
        return next(self._handles)

    # ---- device and context ------------------------------------------------------------------------------------------

    @_takes("ip")
    def cuGetErrorName(self, code: int, out: int) -> int | None:
        if code not in self._names:
            return Status.INVALID_VALUE
        _put(out, ctypes.c_void_p, ctypes.addressof(self._names[code]))
        return None

    cuGetErrorString = cuGetErrorName

    @_takes("u")
    def cuInit(self, flags: int) -> int | None:
        return Status.NO_DEVICE if self.owner is None else None

    @_takes("p")
    def cuDriverGetVersion(self, out: int) -> None:
        _put(out, ctypes.c_int, DRIVER_VERSION)

    @_takes("p")
    def cuDeviceGetCount(self, out: int) -> None:
        _put(out, ctypes.c_int, 0 if self.owner is None else 1)

    @_takes("pi")
    def cuDeviceGet(self, out: int, index: int) -> None:
        assert index == 0
        _put(out, ctypes.c_int, 0)

    @_takes("pii")
    def cuDeviceGetName(self, out: int, size: int, device: int) -> None:
        text = GPU.encode()[: size - 1] + b"\0"
        ctypes.memmove(out, text, len(text))

    @_takes("pii")
    def cuDeviceGetAttribute(self, out: int, attribute: int, device: int) -> None:
        _put(out, ctypes.c_int, ATTRIBUTES.get(attribute, 1))

    @_takes("pi")
    def cuDevicePrimaryCtxRetain(self, out: int, device: int) -> int | None:
        if self.owner is None:
            return Status.NO_DEVICE
        _put(out, ctypes.c_void_p, CONTEXT)
        return None

    @_takes("i")
    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        pass

    @_takes("p")
    def cuCtxGetCurrent(self, out: int) -> None:
        _put(out, ctypes.c_void_p, self._current)

    @_takes("p")
    def cuCtxSetCurrent(self, context: int | None) -> int | None:
        if self.owner is None:
            return Status.NO_DEVICE
        self._thread.context = context
        return None

    @_takes("p")
    def cuCtxGetDevice(self, out: int) -> int | None:
        if self._current is None:
            return Status.INVALID_CONTEXT
        _put(out, ctypes.c_int, 0)
        return None

    @property
    def _current(self) -> int | None:
        return getattr(self._thread, "context", None)

    # ---- memory ------------------------------------------------------------------------------------------------------

    @_takes("pp")
    def cuMemGetInfo(self, free: int, total: int) -> int | None:
        if self._current is None or self.owner is None:
            return Status.INVALID_CONTEXT
        _put(free, ctypes.c_size_t, self.owner.limit - self.owner.device_bytes)
        _put(total, ctypes.c_size_t, self.owner.limit)
        return None

    @_takes("pi")
    def cuDeviceGetMemPool(self, out: int, device: int) -> None:
        _put(out, ctypes.c_void_p, POOL)

    cuDeviceGetDefaultMemPool = cuDeviceGetMemPool

    @_takes("pip")
    def cuMemPoolSetAttribute(self, pool: int, attribute: int, value: int) -> None:
        assert pool == POOL

    @_takes("pip")
    def cuMemPoolGetAttribute(self, pool: int, attribute: int, value: int) -> None:
        assert pool == POOL
        _put(value, ctypes.c_uint64, 0)

    @_takes("pz")
    def cuMemPoolTrimTo(self, pool: int, kept: int) -> None:
        assert (pool, kept) == (POOL, 0)
        self._log("trim")

    @_takes("pzpp")
    def cuMemAllocFromPoolAsync(self, out: int, size: int, pool: int, stream: int) -> int | None:
        if self.owner is None or self._current is None:
            return Status.INVALID_CONTEXT
        assert self._streams[stream].recording is None, "what is allocated during a capture belongs to the graph"
        if self.owner.device_bytes + size > self.owner.limit:
            return Status.OUT_OF_MEMORY
        self.owner.device_bytes += size
        self._hand_out(out, size, f"allocate {size}", self.owner)
        return None

    @_takes("pp")
    def cuMemFreeAsync(self, address: int, stream: int) -> None:
        assert self._streams[stream].recording is None
        _memory, size, owner = self._memory.pop(address)
        owner.device_bytes -= size
        owner.log.append(f"free {size}")

    @_takes("pz")
    def cuMemAllocHost(self, out: int, size: int) -> int | None:
        if self.owner is None or self._current is None:
            return Status.INVALID_CONTEXT
        self._hand_out(out, size, f"pin {size}", self.owner)
        return None

    @_takes("p")
    def cuMemFreeHost(self, address: int) -> None:
        del self._memory[address]

    def _hand_out(self, out: int, size: int, what: str, owner: Owner) -> None:
        memory = ctypes.create_string_buffer(b"\xaa" * size, size)
        self._memory[ctypes.addressof(memory)] = memory, size, owner
        owner.log.append(what)
        _put(out, ctypes.c_void_p, ctypes.addressof(memory))

    @_takes("pip")
    def cuPointerGetAttribute(self, out: int, attribute: int, address: int) -> None:
        assert attribute in POINTER_ATTRIBUTES, "write it here"
        _put(out, ctypes.c_int, POINTER_ATTRIBUTES[attribute])

    @_takes("ppzp")
    def cuMemcpyAsync(self, target: int, source: int, size: int, stream: int) -> int | None:
        return self._put_on(stream, f"copy {size}", lambda: ctypes.memmove(target, source, size))

    # ---- streams and graphs ------------------------------------------------------------------------------------------

    @_takes("pui")
    def cuStreamCreateWithPriority(self, out: int, flags: int, priority: int) -> int | None:
        if self.owner is None or self._current is None:
            return Status.INVALID_CONTEXT
        handle = self._new()
        self._streams[handle] = self.owner.streams[handle] = Stream(self._log, self._breaks)
        _put(out, ctypes.c_void_p, handle)
        return None

    @_takes("pu")
    def cuEventCreate(self, out: int, flags: int) -> None:
        handle = self._new()
        self._events[handle] = None
        _put(out, ctypes.c_void_p, handle)

    @_takes("pp")
    def cuEventRecord(self, event: int, stream: int) -> None:
        assert stream in self._streams
        self._events[event] = stream

    @_takes("ppu")
    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        assert stream in self._streams
        self._log(f"wait for stream {self._events[event]}")

    @_takes("p")
    def cuEventDestroy(self, event: int) -> None:
        del self._events[event]

    @_takes("p")
    def cuStreamDestroy(self, stream: int) -> None:
        del self._streams[stream]
        self._log("close stream")

    @_takes("p")
    def cuStreamSynchronize(self, stream: int) -> int | None:
        return Status.STREAM_CAPTURE_UNSUPPORTED if self._streams[stream].recording is not None else None

    @_takes("pp")
    def cuCtxGetStreamPriorityRange(self, least: int, greatest: int) -> None:
        _put(least, ctypes.c_int, 0)
        _put(greatest, ctypes.c_int, -5)

    @_takes("pp")
    def cuStreamGetCtx(self, stream: int, out: int) -> None:
        assert stream in self._streams
        _put(out, ctypes.c_void_p, CONTEXT)

    @_takes("pp")
    def cuStreamIsCapturing(self, stream: int, out: int) -> None:
        found = self._streams[stream]
        _put(out, ctypes.c_int, INVALIDATED if found.invalidated else int(found.recording is not None))

    @_takes("pi")
    def cuStreamBeginCapture(self, stream: int, mode: int) -> int | None:
        captured = self._streams[stream]
        if not captured.begin():
            return Status.STREAM_CAPTURE_INVALIDATED
        assert captured.recording is not None
        captured.graph = self._keep_graph(captured.recording)
        return None

    @_takes("pp")
    def cuStreamEndCapture(self, stream: int, out: int) -> int | None:
        captured = self._streams[stream]
        if captured.recording is None:
            return Status.ILLEGAL_STATE
        if not captured.end():
            self.cuGraphDestroy(captured.graph)  # the driver's part: whoever destroys it again crashes
            return Status.STREAM_CAPTURE_INVALIDATED
        _put(out, ctypes.c_void_p, captured.graph)
        return None

    @_takes("ppp")
    def cuGraphInstantiateWithParams(self, out: int, graph: int, parameters: int) -> int | None:
        if self._breaks("instantiate"):
            return Status.STREAM_CAPTURE_INVALIDATED
        self._log("capture")
        _put(out, ctypes.c_void_p, self._keep_graph(list(self._graphs[graph].work)))
        return None

    @_takes("p")
    def cuGraphDestroy(self, graph: int) -> None:
        self._graphs.pop(graph).owner.graphs -= 1

    cuGraphExecDestroy = cuGraphDestroy

    def _put_on(self, stream: int, what: str, work: Callable[[], Any]) -> int | None:
        return None if self._streams[stream].do(what, work) else Status.STREAM_CAPTURE_INVALIDATED

    def _breaks(self, step: str) -> bool:
        return self.owner is not None and self.owner.broken == step

    def _keep_graph(self, work: list[Callable[[], Any]]) -> int:
        assert self.owner is not None
        self.owner.graphs += 1
        handle = self._new()
        self._graphs[handle] = Graph(self.owner, work)
        return handle

    @_takes("pp")
    def cuGraphLaunch(self, graph: int, stream: int) -> None:
        assert self._streams[stream].recording is None
        self._log("launch")
        for step in self._graphs[graph].work:
            step()

    # ---- kernels -----------------------------------------------------------------------------------------------------

    @_takes("pppp")
    def cuLibraryLoadData(self, out: int, code: int, *rest: int) -> int | None:
        if ctypes.string_at(code, 6) != b"fatbin":
            return Status.INVALID_VALUE
        _put(out, ctypes.c_void_p, self._new())
        return None

    @_takes("p")
    def cuLibraryUnload(self, library: int) -> None:
        pass

    @_takes("pps")
    def cuLibraryGetKernel(self, out: int, library: int, name: bytes) -> int | None:
        if name.decode() not in parameters():
            return Status.NOT_FOUND
        handle = self._new()
        self._kernels[handle] = name.decode()
        _put(out, ctypes.c_void_p, handle)
        return None

    @_takes("iipi")
    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: int, device: int) -> int | None:
        assert attribute == MAX_DYNAMIC_SHARED_BYTES
        if value > ATTRIBUTES[SHARED_BYTES_OF_A_BLOCK]:
            return Status.INVALID_VALUE
        self._shared_limits[kernel] = value
        return None

    @_takes("pppp")
    def cuLaunchKernelEx(self, config_at: int, kernel: int, values_at: int, extra: int | None) -> int | None:
        config, name = LaunchConfig.from_address(config_at), self._kernels[kernel]
        if config.shared_bytes > self._shared_limits.get(kernel, 48 << 10):
            return Status.INVALID_VALUE
        kinds = parameters()[name]
        places = ctypes.cast(values_at, ctypes.POINTER(ctypes.c_void_p))
        values = [C_TYPES[kind].from_address(places[i] or 0).value for i, kind in enumerate(kinds)]
        arguments = tuple(kind(value) for kind, value in zip(kinds, values, strict=True))
        stream = config.stream or 0
        self.launched.append(
            Launched(name, tuple(config.grid), tuple(config.block), config.shared_bytes, stream, arguments)
        )
        if self.kernels is None:
            return None
        return self._put_on(stream, f"kernel {name}", functools.partial(self._run, self.launched[-1]))

    def _run(self, launched: Launched) -> None:
        if isinstance(self.kernels, PtxKernels):
            x, y, z = launched.grid
            plan = Launch(launched.kernel, (x, y, z), launched.block[0], launched.shared_bytes)
            memory = [np.frombuffer(memory, np.uint8) for memory, _, _ in self._memory.values()]
            self.kernels.run(plan, launched.arguments, memory)
        elif self.kernels is not None:
            self.kernels.launch(launched.kernel, launched.arguments)


_BUILD = Path(__file__).resolve().parents[2] / "build" / "driver"


@functools.cache
def installed() -> Driver | None:
    """The driver of this process, put in its place by the first call; ``None`` without cuda-core or a compiler."""
    return None if why_not() is not None else Driver(_build())


def _build() -> Path:
    """Compile the library; one of the same source is reused."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = _BUILD / digest / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            fresh = Path(scratch) / library.name
            command = [compiler() or "c++", "-x", "c", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
            subprocess.run([*command, f"-Wl,-soname,{library.name}", str(SOURCE), "-o", str(fresh)], check=True)
            fresh.replace(library)
    return library
