"""A GPU made of host memory, with TensorRT: what the runtime and the builder call.

Where cuda-core is installed it is the real one, on what stands for NVIDIA's driver (:mod:`tests.odise_rt.fake_driver`);
elsewhere the few parts that are called have stand-ins here. "Device" pointers are addresses of host buffers, so wrong
addresses, sizes or orders show as wrong results or crashes. A plan is an ONNX graph with its profiles, and executing it
runs ONNX Runtime on what lies at the addresses. While a stream is captured, work is recorded and not done, as CUDA does
it. The interface is that of TensorRT 10.16 to 11 as far as it is used; what a stand-in cannot show is whether the real
one behaves the same.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest

from odise_rt.backends import machine
from odise_rt.kernels.native import FOLDER_VARIABLE, MODULES
from odise_rt.kernels.sources import STAMP, sources_digest
from tests.odise_rt import fake_driver
from tests.odise_rt.kernels.compiled import PtxKernels
from tests.odise_rt.kernels.emulated import Emulation

GPU = fake_driver.GPU
CAPABILITY = fake_driver.CAPABILITY
VERSION = "10.16.0"
BEHAVIOUR = "FAKE_TENSORRT"
"""Environment variable that makes the builder "abort", "hang" or "fail"."""


class Calls:
    """What happened, in order, and what shall go wrong."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.device_bytes = 0
        """Allocated on the device at the moment."""
        self.limit = 1 << 62
        """More device memory is refused."""
        self.corrupt: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array
        """Changes what the engine computes."""
        self.spoils: Callable[[onnx.ModelProto], bool] = lambda model: False
        """Engines of these graphs compute NaN."""
        self.streams: dict[int, Any] = {}
        self.graphs = 0
        """Graphs that are not released yet, those that are captured included."""
        self.broken: Literal["begin", "work", "end", "instantiate"] | None = None
        """Step of a capture that fails."""

    def count(self, word: str) -> int:
        return sum(entry.startswith(word) for entry in self.log)


class CUDAError(Exception):
    """Of cuda-core."""


class Buffer:
    def __init__(self, calls: Calls, size: int, device: bool, address: int | None = None) -> None:
        self._calls, self.size, self._device = calls, size, device
        self._memory = ctypes.create_string_buffer(size) if address is None else None
        self.handle = ctypes.addressof(self._memory) if self._memory is not None else address
        self._open = True

    @classmethod
    def from_handle(cls, pointer: int, size: int, mr: Any = None, owner: Any = None) -> Buffer:
        return cls(Calls(), size, False, pointer)

    def copy_to(self, target: Buffer, *, stream: Stream) -> None:
        assert self._open
        assert target._open
        assert target.size == self.size
        if not stream.do(f"copy {self.size}", lambda: ctypes.memmove(target.handle, self.handle, self.size)):
            raise CUDAError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: The operation is not permitted")

    def close(self, stream: Any = None) -> None:
        if self._open and self._device:
            self._calls.device_bytes -= self.size
            self._calls.log.append(f"free {self.size}")
        self._open = False


class Stream(fake_driver.Stream):
    def __init__(self, calls: Calls) -> None:
        super().__init__(calls.log.append, lambda step: calls.broken == step)
        self._calls = calls
        self.handle = 1000 + len(calls.streams)
        calls.streams[self.handle] = self

    def sync(self) -> None:
        assert self.recording is None, "synchronising a stream that is captured is an error in CUDA"

    def close(self) -> None:
        self._calls.log.append("close stream")


class Result(enum.IntEnum):
    """``CUresult``."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


def _driver_bindings(calls: Calls) -> types.ModuleType:
    """The functions of cuda-bindings that graphs are made with."""
    graphs: dict[int, list[Callable[[], Any]]] = {}
    handles = itertools.count(1)
    good, broken = Result.CUDA_SUCCESS, Result.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED

    def keep(work: list[Callable[[], Any]]) -> int:
        handle = next(handles)
        graphs[handle] = work
        calls.graphs += 1
        return handle

    def begin(stream: int, mode: Any) -> tuple[Any, ...]:
        return (good if calls.streams[stream].begin() else broken,)

    def end(stream: int) -> tuple[Any, ...]:
        work = calls.streams[stream].recording
        return (good, keep(work)) if calls.streams[stream].end() else (broken, None)

    def instantiate(graph: int, parameters: Any) -> tuple[Any, ...]:
        if calls.broken == "instantiate":
            return broken, None
        calls.log.append("capture")
        return good, keep(list(graphs[graph]))

    def destroy(graph: int) -> tuple[Any, ...]:
        del graphs[graph]
        calls.graphs -= 1
        return (good,)

    def launch(graph: int, stream: int) -> tuple[Any, ...]:
        calls.log.append("launch")
        for step in graphs[graph]:
            step()
        return (good,)

    driver = types.ModuleType("cuda.bindings.driver")
    driver.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)  # type: ignore[attr-defined]
    driver.CUgraphInstantiate_flags = types.SimpleNamespace(  # type: ignore[attr-defined]
        CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD=2
    )
    driver.CUDA_GRAPH_INSTANTIATE_PARAMS = types.SimpleNamespace  # type: ignore[attr-defined]
    driver.cuStreamBeginCapture, driver.cuStreamEndCapture = begin, end  # type: ignore[attr-defined]
    driver.cuGraphInstantiateWithParams, driver.cuGraphLaunch = instantiate, launch  # type: ignore[attr-defined]
    driver.cuGraphDestroy = driver.cuGraphExecDestroy = destroy  # type: ignore[attr-defined]
    return driver


def _cuda_core(calls: Calls, kernels: Emulation | None) -> types.ModuleType:
    class Device:
        name = GPU
        compute_capability = CAPABILITY
        device_id = 0
        properties = types.SimpleNamespace(
            multiprocessor_count=fake_driver.MULTIPROCESSORS,
            max_shared_memory_per_block_optin=fake_driver.SHARED_BYTES,
        )

        def __init__(self, index: int = 0) -> None:
            assert index == 0

        def set_current(self) -> None:
            pass

        def create_stream(self) -> Stream:
            return Stream(calls)

        def allocate(self, size: int, *, stream: Stream) -> Buffer:
            if calls.device_bytes + size > calls.limit:
                raise CUDAError(
                    "CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough"
                )
            calls.device_bytes += size
            calls.log.append(f"allocate {size}")
            return Buffer(calls, size, True)

    class LegacyPinnedMemoryResource:
        def allocate(self, size: int) -> Buffer:
            calls.log.append(f"pin {size}")
            return Buffer(calls, size, False)

    class StridedMemoryView:
        def __init__(self, value: Any) -> None:
            described = value.__cuda_array_interface__
            self.ptr, self.shape, self.strides = described["data"][0], described["shape"], None
            self.dtype = np.dtype(described["typestr"])
            if described.get("strides"):
                self.strides = tuple(step // self.dtype.itemsize for step in described["strides"])
            self.is_device_accessible = True

        @classmethod
        def from_any_interface(cls, value: Any, stream_ptr: int) -> StridedMemoryView:
            assert stream_ptr in calls.streams
            return cls(value)

    def launch(stream: Stream, config: Any, kernel: str, *arguments: Any) -> None:
        assert kernels is not None
        assert all(type(a) in (int, np.int32, np.int64, np.float32) for a in arguments), "as cuda-core passes them on"
        stream.do(f"kernel {kernel}", lambda: kernels.launch(kernel, arguments))

    core = types.ModuleType("cuda.core")
    core.ObjectCode = types.SimpleNamespace(  # type: ignore[attr-defined]
        from_fatbin=lambda data, name: types.SimpleNamespace(get_kernel=lambda kernel: kernel)
    )
    core.LaunchConfig, core.launch = lambda **options: options, launch  # type: ignore[attr-defined]
    core.Device, core.Buffer = Device, Buffer  # type: ignore[attr-defined]
    core.LegacyPinnedMemoryResource = LegacyPinnedMemoryResource  # type: ignore[attr-defined]
    core.utils = types.ModuleType("cuda.core.utils")  # type: ignore[attr-defined]
    core.utils.StridedMemoryView = StridedMemoryView  # type: ignore[attr-defined]
    return core


# ---- TensorRT --------------------------------------------------------------------------------------------------------

_IO = {1: np.float32, 7: np.int64}


def plan_of(graph: bytes, profiles: list[dict[str, Any]]) -> bytes:
    """The stand-in's plan."""
    return json.dumps({"graph": graph.hex(), "profiles": profiles}).encode()


class _Context:
    def __init__(self, calls: Calls, engine: _Engine) -> None:
        self._calls, self._engine = calls, engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._profile: int | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self._calls.streams
        self._profile = index
        self._calls.log.append(f"profile {index}")
        return index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "TensorRT wants the profile first"
        limits = self._engine.profiles[self._profile][name]
        self._shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(limits["min"], shape, limits["max"], strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {k: np.zeros(self._shapes[k], dtype) for k, dtype in self._engine.inputs.items()}
        return self._engine.session.run([name], zeros)[0].shape

    def update_device_memory_size_for_shapes(self) -> int:
        # As in the real network it is the windows that need memory.
        windows = self._shapes.get("windows")
        return 100 * int(np.prod(windows)) if windows else 1000

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self._memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert self._memory is not None
        self._calls.streams[stream].do("execute", self._execute)
        return True

    def _execute(self) -> None:
        assert self._memory is not None
        ctypes.memset(self._memory[0], 0xAA, self._memory[1])  # scratch is really there
        inputs = {}
        for name, dtype in self._engine.inputs.items():
            size = int(np.prod(self._shapes[name])) * np.dtype(dtype).itemsize
            inputs[name] = np.frombuffer(ctypes.string_at(self._addresses[name], size), dtype).reshape(
                self._shapes[name]
            )
        names = list(self._engine.outputs)
        for name, array in zip(names, self._engine.session.run(names, inputs), strict=True):
            array = np.full_like(array, np.nan) if self._engine.spoilt else self._calls.corrupt(name, array)
            data = np.ascontiguousarray(array).tobytes()
            ctypes.memmove(self._addresses[name], data, len(data))


class _Engine:
    def __init__(self, calls: Calls, plan: bytes) -> None:
        data = json.loads(plan)
        self._calls, self.profiles = calls, data["profiles"]
        model = onnx.load_from_string(bytes.fromhex(data["graph"]))
        self.spoilt = calls.spoils(model)
        self.inputs = {v.name: _IO[v.type.tensor_type.elem_type] for v in model.graph.input}
        self.outputs = {v.name: _IO[v.type.tensor_type.elem_type] for v in model.graph.output}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(bytes.fromhex(data["graph"]), options, ["CPUExecutionProvider"])
        self.num_optimization_profiles = len(self.profiles)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return (self.inputs | self.outputs)[name]

    def create_execution_context(self, strategy: Any) -> _Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._calls.log.append("context")
        return _Context(self._calls, self)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 0


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class PreviewFeature(enum.Enum):
    ALIASED_PLUGIN_IO_10_03, RUNTIME_ACTIVATION_RESIZE_10_10 = range(2)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name


class _Network:
    """What the parser read."""

    model: onnx.ModelProto | None = None

    @property
    def _inputs(self) -> list[str]:
        assert self.model is not None
        return [value.name for value in self.model.graph.input]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> _Named:
        return _Named(self._inputs[index])

    @property
    def num_layers(self) -> int:
        assert self.model is not None
        return len(self.model.graph.node)


class _Error:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return -1


class OnnxParser:
    def __init__(self, network: _Network, log: Any) -> None:
        self._network, self._errors = network, []  # type: ignore[var-annotated]

    def parse_from_file(self, path: str) -> bool:
        if os.environ.get(BEHAVIOUR) == "abort":
            print("unsupported operator: giving up", file=sys.stderr, flush=True)
            os.abort()
        if os.environ.get(BEHAVIOUR) == "hang":
            time.sleep(600)
        try:
            self._network.model = onnx.load(path)
        except Exception:
            self._errors.append(_Error("no ONNX file"))
            return False
        assert all(node.op_type != "GridSample" for node in self._network.model.graph.node), "miscompiled by TensorRT"
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _Error:
        return self._errors[index]


class _OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self.shapes[name] = {"min": low, "opt": opt, "max": high}


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"learned;"


class _Config:
    builder_optimization_level = 3

    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []
        self.flags = {BuilderFlag.TF32}
        self.previews: set[PreviewFeature] = set()
        self.workspace: int | None = None
        self.cache: _TimingCache | None = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        (self.previews.add if enable else self.previews.discard)(feature)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.workspace = size

    def add_optimization_profile(self, profile: _OptimizationProfile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> _TimingCache | None:
        return None if data.startswith(b"damaged") else _TimingCache(data)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class Builder:
    def __init__(self, log: Any) -> None:
        self._log = log

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _OptimizationProfile:
        return _OptimizationProfile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        assert network.model is not None
        assert not config.flags, "TF32 must be off"
        assert config.previews == {PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10}, "scratch memory follows the shape"
        if os.environ.get(BEHAVIOUR) == "fail":
            self._log.log(ILogger.Severity.ERROR, "Error Code 10: Could not find any implementation for node")
            return None
        return plan_of(network.model.SerializeToString(), config.profiles)


def tensorrt_module(calls: Calls) -> types.ModuleType:
    """The stand-in of the package."""

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
            try:
                return _Engine(calls, plan)
            except ValueError:
                self._log.log(
                    ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Magic tag does not match"
                )
                return None

    module = types.ModuleType("tensorrt")
    for name, value in {
        "__version__": VERSION,
        "ILogger": ILogger,
        "Runtime": Runtime,
        "TensorIOMode": TensorIOMode,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "nptype": lambda dtype: dtype,
        "NetworkDefinitionCreationFlag": NetworkDefinitionCreationFlag,
        "BuilderFlag": BuilderFlag,
        "MemoryPoolType": MemoryPoolType,
        "PreviewFeature": PreviewFeature,
        "OnnxParser": OnnxParser,
        "Builder": Builder,
    }.items():
        setattr(module, name, value)
    return module


def write_fatbins(folder: Path, **other: bytes) -> None:
    """Files in the place of compiled kernels; ``other`` gives some modules another content."""
    for name in MODULES:
        (folder / f"{name}.fatbin").write_bytes(other.get(name, b"fatbin"))
    (folder / STAMP).write_text(f"{sources_digest()}\n")


def install(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Emulation | PtxKernels | None = None,
    kernel_folder: Path | None = None,
) -> Calls:
    """Put the stand-ins in the place of the packages until the test ends.

    Args:
        monkeypatch: of the test.
        kernels: what launches run, compiled ones only with the real cuda-core; ``None``: the kernels are not built.
        kernel_folder: with ``kernels``, where files in the place of fatbins are written.
    """
    calls = Calls()
    if kernels is not None and kernel_folder is not None:
        write_fatbins(kernel_folder)
    monkeypatch.setenv(FOLDER_VARIABLE, str(kernel_folder or "/not/built"))
    modules = {"tensorrt": tensorrt_module(calls)}
    driver = fake_driver.installed()
    if driver is not None:
        monkeypatch.setattr(driver, "owner", calls)
        monkeypatch.setattr(driver, "kernels", kernels)
        monkeypatch.setattr(driver, "launched", [])
    else:
        assert not isinstance(kernels, PtxKernels), "the stand-in for cuda-core launches no compiled kernels"
        core = _cuda_core(calls, kernels)
        cuda = types.ModuleType("cuda")
        cuda.core = core  # type: ignore[attr-defined]
        bindings = types.ModuleType("cuda.bindings")
        bindings.driver = _driver_bindings(calls)  # type: ignore[attr-defined]
        modules |= {"cuda": cuda, "cuda.core": core, "cuda.core.utils": core.utils, "cuda.bindings": bindings}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(machine, "package_version", lambda kind: VERSION if kind == "tensorrt" else None)
    monkeypatch.setattr(machine, "package_cuda", lambda kind: "13" if kind == "tensorrt" else None)
    return calls


def check_driver() -> None:
    """Nothing went wrong inside the driver, where an error may be lost."""
    driver = fake_driver.installed()
    if driver is not None:
        problems = list(driver.problems)
        driver.problems.clear()
        assert not problems, problems


def install_in_children(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let processes that the test starts find the stand-in of TensorRT, too."""
    package = folder / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from tests.odise_rt.fake_gpu import Calls, tensorrt_module\n"
        "globals().update({k: v for k, v in vars(tensorrt_module(Calls())).items() if k != '__name__'})\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
