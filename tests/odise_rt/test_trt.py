"""TensorRT stages on a stand-in of a GPU: calls, addresses, graphs, memory, errors. A real GPU was never used."""

from __future__ import annotations

import ctypes
import enum
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from odise_rt import BackendError, Bundle, OutOfMemoryError
from odise_rt.backends.captured_work import MAX_FAILED_CAPTURES
from odise_rt.backends.cuda_core import cuda_errors
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import as_device_array
from odise_rt.backends.engine_stage import open_engine_stage
from odise_rt.backends.ort import OrtBackend
from odise_rt.backends.trt import TrtStage
from odise_rt.engines import Engine
from odise_rt.specs import STAGES, StageSpec
from tests.odise_rt import fake_driver
from tests.odise_rt.engine_bundle import DIMS, example, replace_file, write_engine
from tests.odise_rt.fake_gpu import Calls, CUDAError, _Context, _Engine


@pytest.fixture
def gpu(install_gpu: Callable[..., Calls]) -> Calls:
    return install_gpu()


@pytest.fixture
def bundle(new_bundle: Callable[[], Path]) -> Bundle:
    return Bundle.open(new_bundle())


def opened(bundle: Bundle, stage: str, session: CudaSession | None = None, **changes: Any) -> TrtStage:
    made = open_engine_stage(write_engine(bundle, stage, **changes), bundle.stages[stage].spec, session)
    assert isinstance(made, TrtStage)
    return made


def windows(count: int, side: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    return {"windows": np.random.default_rng(seed).random((count, 3, side, side), np.float32)}


@pytest.mark.parametrize("stage", STAGES)
def test_gives_what_the_graph_gives(bundle: Bundle, stage: str, gpu: Calls) -> None:
    spec = bundle.stages[stage].spec
    expected = OrtBackend("cpu", 1).load(bundle, stage)
    engine = opened(bundle, stage)
    for seed in range(3):  # the first run is direct, later ones are the captured graph
        inputs = example(spec, seed)
        found = engine.run(inputs)
        for name, array in expected.run(inputs).items():
            np.testing.assert_array_equal(found[name], array)
    assert gpu.count("capture") == 1
    assert gpu.count("launch") == 2
    assert engine.facts.engine == "tensorrt 10.16.0"
    assert engine.facts.provider == "TensorRT on Fake GPU"
    assert engine.facts.file == f"engines/{engine.facts.file.split('/')[1]}/{stage}.plan"
    engine.close()
    assert gpu.device_bytes == 0
    with pytest.raises(BackendError, match="closed"):
        engine.run(example(spec))
    engine.close()


def test_outputs_belong_to_the_caller(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    first = stage.run(windows(1, seed=1))["image_embedding"]
    kept = first.copy()
    stage.run(windows(1, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_allocates_nothing_once_a_shape_was_captured(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    for count in (1, 2, 3):
        stage.run(windows(count))
    for count in (1, 2, 3, 1, 2):  # scratch has moved since the first two were set up
        stage.run(windows(count))
    before = len(gpu.log)
    for count in (1, 2, 3, 2, 1, 3):
        stage.run(windows(count))
    after = gpu.log[before:]
    assert not [entry for entry in after if entry.startswith(("allocate", "pin", "free", "context", "capture"))]
    assert after.count("launch") == 6


def test_takes_the_narrowest_profile(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    stage.run(windows(DIMS["N"], DIMS["s"]))
    assert "profile 1" in gpu.log
    stage.run(windows(3))
    assert gpu.log.count("profile 0") == 1


def test_shape_outside_of_every_profile_says_how_to_build_for_it(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    with pytest.raises(BackendError, match=r"not built for windows \(9, 3, 64, 64\).*--size HEIGHTxWIDTH"):
        stage.run(windows(9))
    assert stage.run(windows(1))


def test_shapes_are_kept_within_a_bound(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    peaks = []
    for side in (32, 40, 48, 56, 64, 32, 40, 48):
        stage.run(windows(1, side))
        peaks.append(gpu.device_bytes)
    assert len(stage._states) == 4
    assert gpu.count("context") == 8  # 32, 40 and 48 were dropped before they came again
    assert max(peaks[4:]) <= peaks[4] + 4 * 3 * 64 * 64 * 4


def test_scratch_is_shared_and_graphs_over_the_old_one_are_not_launched(bundle: Bundle, gpu: Calls) -> None:
    session = CudaSession()
    first, second = opened(bundle, "clip_image", session), opened(bundle, "unet_tap", session)
    expected = OrtBackend("cpu", 1).load(bundle, "clip_image").run(windows(1))
    first.run(windows(1))
    generation = session.generation
    first.run(windows(4))  # needs more scratch: it moves
    assert session.generation > generation
    np.testing.assert_array_equal(first.run(windows(1))["image_embedding"], expected["image_embedding"])
    moved = session.generation
    second.run(example(bundle.stages["unet_tap"].spec))
    assert session.generation == moved, "the second stage needs less"
    first.close()
    assert not session.is_closed
    second.close()
    assert session.is_closed
    assert gpu.device_bytes == 0


class OnDevice:
    """An array with ``__cuda_array_interface__``, as torch, CuPy and pycuda have it."""

    def __init__(self, array: np.ndarray, strides: tuple[int, ...] | None = None) -> None:
        self.array = array
        data = {"data": (array.ctypes.data, False), "shape": array.shape, "typestr": array.dtype.str, "version": 3}
        self.__cuda_array_interface__ = data | ({"strides": strides} if strides else {})


def test_arrays_on_the_device_are_read_where_they_are(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    inputs = windows(2)
    expected = stage.run(inputs)["image_embedding"]
    stage._states[next(iter(stage._states))].host["windows"][1].fill(7)  # staging must not be what is read
    found = stage.run({"windows": OnDevice(inputs["windows"])})["image_embedding"]
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(BackendError, match="expected a C-contiguous one"):
        stage.run({"windows": OnDevice(inputs["windows"], (49152, 4, 256, 1024))})
    with pytest.raises(BackendError, match="windows is float64"):
        stage.run({"windows": OnDevice(inputs["windows"].astype(np.float64))})
    assert as_device_array(inputs["windows"], stage._session.handle) is None


def test_an_older_interface_is_taken_to_mean_the_default_stream(bundle: Bundle, gpu: Calls) -> None:
    """pycuda's, say; cuda-core reads version 3 only."""
    stage = opened(bundle, "clip_image")
    inputs = windows(2)
    array = OnDevice(inputs["windows"])
    array.__cuda_array_interface__ |= {"version": 2}
    found = stage.run({"windows": array})["image_embedding"]
    np.testing.assert_array_equal(found, stage.run(inputs)["image_embedding"])
    if fake_driver.why_not() is None:
        assert gpu.count("wait for stream 1") == 1


class Tensor(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("dtype", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class ByDlpack:
    """An array of float32 that says by DLPack that it lies on the GPU, as torch's and CuPy's do."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.streams = array, []  # type: ignore[var-annotated]
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        device, float32 = (ctypes.c_int32 * 2)(2, 0), 2 | 32 << 8 | 1 << 16
        self._deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda tensor: None)
        deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        self._tensor = Tensor(array.ctypes.data, device, array.ndim, float32, shape, None, 0, None, deleter)

    def __dlpack__(self, stream: int | None = None, **options: Any) -> Any:
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.mark.skipif(fake_driver.why_not() is not None, reason=f"{fake_driver.why_not()}")
def test_arrays_on_the_device_by_dlpack(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    inputs = windows(2)
    array = ByDlpack(inputs["windows"])
    found = stage.run({"windows": array})["image_embedding"]
    assert array.streams == [stage._session.handle], "so its producer makes this stream wait"
    np.testing.assert_array_equal(found, stage.run(inputs)["image_embedding"])


class OnHost:
    """An array that speaks DLPack and is no numpy array, as torch's are on the CPU."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_arrays_of_others_on_the_host_are_read_by_dlpack(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    inputs = windows(2)
    found = stage.run({"windows": OnHost(inputs["windows"])})["image_embedding"]
    np.testing.assert_array_equal(found, stage.run(inputs)["image_embedding"])


def test_threads_take_turns(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    reference = OrtBackend("cpu", 1).load(bundle, "clip_image")
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(5):
            inputs = windows(1 + (number + step) % 3, seed=number)
            if not np.array_equal(stage.run(inputs)["image_embedding"], reference.run(inputs)["image_embedding"]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_out_of_memory_while_a_shape_is_set_up_leaves_nothing(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    stage.run(windows(1))
    used = gpu.device_bytes
    gpu.limit = used + 100_000
    with pytest.raises(OutOfMemoryError, match=r"stage clip_image: the GPU is out of memory.*windows_per_batch=1"):
        stage.run(windows(4))
    gpu.limit = 1 << 62
    assert stage.run(windows(4))
    gpu.limit = 0
    assert stage.run(windows(4)), "what is set up runs without new memory"


def test_out_of_memory_for_scratch_leaves_a_stage_that_runs(bundle: Bundle, gpu: Calls) -> None:
    stage = opened(bundle, "clip_image")
    stage.run(windows(1))
    gpu.limit = gpu.device_bytes + 4 * 3 * 64 * 64 * 4 + 1000  # the windows fit, scratch does not
    with pytest.raises(OutOfMemoryError):
        stage.run(windows(4))
    assert stage.run(windows(1))


def test_plan_that_tensorrt_refuses(bundle: Bundle, gpu: Calls) -> None:
    engine = write_engine(bundle, "clip_image")
    replace_file(engine, "clip_image.plan", b"not a plan")
    with pytest.raises(BackendError, match=r"tensorrt 10\.16\.0 refuses .*Magic tag does not match.*build it again"):
        open_engine_stage(engine, bundle.stages["clip_image"].spec)


def test_plan_of_another_stage(bundle: Bundle, gpu: Calls) -> None:
    engine = write_engine(bundle, "clip_image")
    other = write_engine(bundle, "clip_text")
    replace_file(engine, "clip_image.plan", other.path.read_bytes())
    with pytest.raises(BackendError, match=r"has \{'tokens': 'int64'\}, expected \{'windows': 'float32'\}"):
        open_engine_stage(engine, bundle.stages["clip_image"].spec)


def test_engine_that_fails(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = opened(bundle, "clip_image")
    stage.run(windows(1))
    engine = stage._engine
    assert engine is not None

    def fail(self: Any, stream: int) -> bool:
        engine.log.log(engine.trt.ILogger.Severity.ERROR, "Cuda Runtime (an illegal memory access was encountered)")
        return False

    context = type(stage._states[next(iter(stage._states))].bound._context)
    monkeypatch.setattr(context, "execute_async_v3", fail)
    with pytest.raises(BackendError, match=r"the engine failed: Cuda Runtime \(an illegal memory access"):
        stage.run(windows(2))


def test_a_first_run_that_failed_is_done_again(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = opened(bundle, "clip_image")
    expected = OrtBackend("cpu", 1).load(bundle, "clip_image").run(windows(1))["image_embedding"]
    fail_once(monkeypatch, gpu, attempt=1)
    with pytest.raises(OutOfMemoryError):
        stage.run(windows(1))
    for _ in range(2):
        np.testing.assert_array_equal(stage.run(windows(1))["image_embedding"], expected)
    assert gpu.count("context") == 1
    assert gpu.count("launch") == 1


def fail_once(monkeypatch: pytest.MonkeyPatch, gpu: Calls, attempt: int) -> None:
    """Let one call of the engine fail: the first one is direct, the second one is captured."""
    calls: list[int] = []

    class Context(_Context):
        def execute_async_v3(self, stream: int) -> bool:
            calls.append(stream)
            gpu.broken = "end" if len(calls) == attempt == 2 else None  # what fails in a capture ends it
            if len(calls) == attempt:
                raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate")
            return super().execute_async_v3(stream)

    monkeypatch.setattr("tests.odise_rt.fake_gpu._Context", Context)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to",  # cuda-core 1.1
        "Failed to allocate memory from pool",  # cuda-core 1.0
        "[OutOfMemory] (Requested amount of GPU memory (1024 bytes) could not be allocated.)",  # TensorRT
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_)",  # ONNX Runtime
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cudnnCreate(&cudnn_handle_)",
    ],
)
def test_memory_that_ran_out_is_known_by_many_words(words: str) -> None:
    with pytest.raises(OutOfMemoryError, match="windows_per_batch=1"), cuda_errors("segmenting"):
        raise RuntimeError(words)


@pytest.mark.parametrize("step", ["begin", "work", "end", "instantiate"])
def test_a_capture_that_fails_costs_only_the_graph(
    bundle: Bundle, gpu: Calls, caplog: pytest.LogCaptureFixture, step: Literal["begin", "work", "end", "instantiate"]
) -> None:
    """As when another thread synchronises the device meanwhile."""
    caplog.set_level("WARNING", "odise_rt")
    stage = opened(bundle, "clip_image")
    expected = OrtBackend("cpu", 1).load(bundle, "clip_image").run(windows(1))["image_embedding"]
    stage.run(windows(1))
    gpu.broken = step
    np.testing.assert_array_equal(stage.run(windows(1))["image_embedding"], expected)
    assert gpu.graphs == 0
    assert "stage clip_image: no CUDA graph could be captured (CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" in caplog.text
    gpu.broken = None
    np.testing.assert_array_equal(stage.run(windows(1))["image_embedding"], expected)
    assert gpu.graphs == 1
    assert gpu.count("launch") == 1
    stage.close()
    assert gpu.graphs == 0


def test_a_capture_that_always_fails_is_given_up(bundle: Bundle, gpu: Calls, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "odise_rt")
    stage = opened(bundle, "clip_image")
    gpu.broken = "end"
    stage.run(windows(1))
    for _ in range(MAX_FAILED_CAPTURES):
        stage.run(windows(1))
    assert [("without one" in record.message) for record in caplog.records] == [False, False, True]
    gpu.broken = None
    stage.run(windows(1))
    assert (gpu.graphs, len(caplog.records)) == (0, MAX_FAILED_CAPTURES)


def test_why_a_capture_failed_is_what_the_engine_said(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not that the capture, which that broke, could not be ended."""
    caplog.set_level("WARNING", "odise_rt")
    stage = opened(bundle, "clip_image")
    fail_once(monkeypatch, gpu, attempt=2)
    for _ in range(2):
        stage.run(windows(1))
    assert "captured (CUDA_ERROR_OUT_OF_MEMORY" in caplog.text


def test_finalisers_wait_until_a_capture_is_over(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    collects = []

    class Context(_Context):
        def execute_async_v3(self, stream: int) -> bool:
            collects.append(gc.isenabled())
            return super().execute_async_v3(stream)

    monkeypatch.setattr("tests.odise_rt.fake_gpu._Context", Context)
    stage = opened(bundle, "clip_image")
    for _ in range(2):
        stage.run(windows(1))
    assert collects == [True, False]
    assert gc.isenabled()


def test_an_engine_that_cannot_be_captured_yet_is_asked_again(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT-RTX's, until it has compiled the kernels of a shape."""
    answers = [False, True]

    class Context(_Context):
        def is_stream_capturable(self, stream: int) -> bool:
            assert gpu.count("execute") > 0, "asked after a run"
            return answers.pop(0)

    monkeypatch.setattr("tests.odise_rt.fake_gpu._Context", Context)
    stage = opened(bundle, "clip_image")
    for graphs in (0, 0, 1, 1):
        stage.run(windows(1))
        assert gpu.graphs == graphs
    assert (answers, gpu.count("launch")) == ([], 2)


def test_kernels_are_compiled_before_they_are_captured(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX's default would let a graph keep the slower ones that run until then."""
    import sys

    package: Any = sys.modules["tensorrt"]
    monkeypatch.setattr(package, "DynamicShapesKernelSpecializationStrategy", Specialisation, raising=False)
    monkeypatch.setattr(_Engine, "create_runtime_config", lambda self: RuntimeConfig(), raising=False)
    make, made = _Engine.create_execution_context, []

    def create(self: _Engine, config: RuntimeConfig) -> _Context:
        made.append(config.dynamic_shapes_kernel_specialization_strategy)
        return make(self, config.allocation)

    monkeypatch.setattr(_Engine, "create_execution_context", create)
    opened(bundle, "clip_image").run(windows(1))
    assert made == [Specialisation.EAGER]


class Specialisation(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class RuntimeConfig:
    """Of TensorRT-RTX."""

    dynamic_shapes_kernel_specialization_strategy = Specialisation.LAZY
    allocation: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy


def engine_and_spec(bundle: Bundle) -> tuple[Engine, StageSpec]:
    return write_engine(bundle, "clip_image"), bundle.stages["clip_image"].spec


def test_missing_package_says_how_to_install_it(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    engine, spec = engine_and_spec(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match=r"pip install 'odise_rt\[tensorrt\]'"):
        open_engine_stage(engine, spec)


def test_strides_of_axes_of_length_one_do_not_matter(gpu: Calls) -> None:
    session = CudaSession()
    array = np.zeros((1, 4, 1, 3), np.float32)

    class OnGpu:
        def __init__(self, strides: tuple[int, ...]) -> None:
            self.__cuda_array_interface__ = {
                "shape": array.shape, "typestr": "<f4", "data": (array.ctypes.data, False), "strides": strides,
                "version": 3,
            }  # fmt: skip

    found = as_device_array(OnGpu((3996, 12, 28, 4)), session.handle)
    assert found is not None
    assert found.shape == (1, 4, 1, 3)
    with pytest.raises(BackendError, match="C-contiguous"):
        as_device_array(OnGpu((48, 16, 4, 4)), session.handle)
    session.close()
