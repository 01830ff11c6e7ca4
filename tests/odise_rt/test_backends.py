"""Engines: what they refuse, what they report, and who holds which graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from odise_rt import BackendError, Bundle, BundleError, OutOfMemoryError, Segmenter
from odise_rt.backends import ort
from odise_rt.backends.base import StageFacts
from odise_rt.backends.ort import OrtBackend, working_provider
from odise_rt.backends.pool import StagePool
from odise_rt.backends.select import open_backend
from tests.odise_rt.fake_bundle import digest, read_manifest, write_manifest


def replace_graph(root: Path, stage: str, content: bytes) -> Path:
    """Put another graph in place of a stage's, with its hash."""
    path = root / "onnx" / f"{stage}.onnx"
    path.write_bytes(content)
    manifest = read_manifest(root)
    manifest["stages"][stage]["sha256"] = digest(path)
    write_manifest(root, manifest)
    return root


def test_probe_is_the_identity() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert onnx.load_from_string(ort._PROBE_MODEL) == model


def test_cpu_works() -> None:
    assert working_provider("cpu") is None


def test_every_stage_runs_alone(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    backend = OrtBackend("cpu", threads=1)
    dims = {"N": 2, "s": 64, "H": 64, "W": 96, "h": 50, "w": 90, "Q": 6, "mh": 16, "mw": 24, "L": 3}
    for name, entry in bundle.stages.items():
        stage = backend.load(bundle, name)
        inputs = {t.name: np.ones(t.resolve(dims), t.dtype) for t in entry.spec.inputs}
        outputs = stage.run(inputs)
        assert {t.name: t.resolve(dims) for t in entry.spec.outputs} == {k: v.shape for k, v in outputs.items()}
        assert stage.facts.provider == "CPUExecutionProvider"
        assert stage.facts.file == f"onnx/{name}.onnx"
        stage.close()
        with pytest.raises(BackendError, match="closed"):
            stage.run(inputs)


def test_wrong_input_is_named_before_the_engine_sees_it(label_bundle: Path) -> None:
    stage = OrtBackend("cpu", 1).load(Bundle.open(label_bundle), "clip_image")
    with pytest.raises(BackendError, match="windows is float64"):
        stage.run({"windows": np.zeros((1, 3, 64, 64))})


def test_graph_that_is_no_graph(new_bundle: Callable[[], Path]) -> None:
    root = replace_graph(new_bundle(), "unet_tap", b"not a model")
    with pytest.raises(BundleError, match=r"unet_tap\.onnx is no ONNX graph"):
        Segmenter.load(root, device="cpu", threads=1)
    replace_graph(root, "unet_tap", b"\x08\x09")  # a version, and no graph
    with pytest.raises(BackendError, match=r"cannot load stage unet_tap.*odise-rt inspect"):
        Segmenter.load(root, device="cpu", threads=1)


def test_graph_of_another_stage(new_bundle: Callable[[], Path]) -> None:
    root = new_bundle()
    replace_graph(root, "clip_image", (root / "onnx/clip_text.onnx").read_bytes())
    with pytest.raises(BackendError, match="has inputs"):
        Segmenter.load(root, device="cpu", threads=1)


def test_graph_that_fails_at_run_time(new_bundle: Callable[[], Path]) -> None:
    """Declares the right outputs, but cannot broadcast."""
    root = new_bundle()
    spec = Bundle.open(root).stages["clip_image"].spec
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["windows", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weight"], ["image_embedding"]),
        ],
        "broken",
        [helper.make_tensor_value_info("windows", TensorProto.FLOAT, list(spec.inputs[0].shape))],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, ["N", "D"])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
            helper.make_tensor("weight", TensorProto.FLOAT, [5, 8], [0.0] * 40),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    replace_graph(root, "clip_image", model.SerializeToString())
    with (
        Segmenter.load(root, device="cpu", threads=1) as segmenter,
        pytest.raises(BackendError, match=r"clip_image failed on windows \(1, 3, 64, 64\)"),
    ):
        segmenter.segment(np.zeros((64, 64, 3), np.uint8), "red")


@pytest.mark.parametrize(
    "message",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9",
        "CUDA failure 2: out of memory",
        "std::bad_alloc",
    ],
)
def test_out_of_memory_has_its_own_error(label_bundle: Path, message: str) -> None:
    class Full:
        def get_inputs(self) -> list[Any]:
            return [type("Value", (), {"name": "windows"})]

        def get_outputs(self) -> list[Any]:
            return [type("Value", (), {"name": "image_embedding"})]

        def run(self, *args: Any) -> None:
            raise RuntimeError(message)

    spec = Bundle.open(label_bundle).stages["clip_image"].spec
    facts = StageFacts("clip_image", "test", "test", "cpu", "", 0.0)
    with pytest.raises(OutOfMemoryError, match="windows_per_batch=1"):
        ort.OrtStage(Full(), spec, facts).run({"windows": np.zeros((1, 3, 64, 64), np.float32)})


def test_silent_fallback_of_a_session_is_an_error(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime builds without CUDA take the CPU with a logged warning; here that must not pass for CUDA."""
    monkeypatch.setattr(ort, "working_provider", lambda device: None)
    backend = OrtBackend("cuda", threads=1)
    monkeypatch.setattr(ort, "PROVIDERS", {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"})

    class Pretender:
        __version__ = "0"
        SessionOptions = backend._ort.SessionOptions

        @staticmethod
        def InferenceSession(path: str, options: Any, providers: list[str]) -> Any:
            return OrtBackend("cpu", 1)._ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    backend._ort = Pretender()
    with pytest.raises(BackendError, match="chose CPUExecutionProvider"):
        backend.load(Bundle.open(label_bundle), "clip_image")


def test_large_bundles_give_memory_back_and_agree(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"windows": np.random.default_rng(0).random((2, 3, 64, 64), np.float32)}
    bundle = Bundle.open(label_bundle)
    small = OrtBackend("cpu", 1).load(bundle, "clip_image")
    monkeypatch.setattr(ort, "LARGE_BUNDLE_BYTES", 1)
    large = OrtBackend("cpu", 1).load(bundle, "clip_image")
    assert small._run_options is None
    assert large._run_options is not None
    for _ in range(2):
        assert np.array_equal(large.run(inputs)["image_embedding"], small.run(inputs)["image_embedding"])


def test_large_bundles_keep_only_what_is_slow_to_load(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    with Segmenter.load(label_bundle, device="cpu", threads=1) as segmenter:
        assert all(slot.stage is not None for name, slot in segmenter._stages._slots.items() if name != "clip_text")
        expected = segmenter.segment(image, "sky; tree")
    monkeypatch.setattr(ort, "LARGE_BUNDLE_BYTES", 1)
    with Segmenter.load(label_bundle, device="cpu", threads=1) as segmenter:
        found = segmenter.segment(image, "sky; tree")
        kept = {name for name, slot in segmenter._stages._slots.items() if slot.stage is not None}
        assert kept == {"unet_tap", "mask_decoder"}
        assert {stage.stage for stage in found.facts.stages} >= {"clip_image", "clip_mask"}
    assert np.array_equal(found.segment_map, expected.segment_map)


def test_threads_are_reported() -> None:
    assert "3 threads" in open_backend("cpu", threads=3).description


def test_small_windows_run_together() -> None:
    backend = OrtBackend("cpu", threads=1)
    assert backend.windows_per_batch(512) == 1
    assert backend.windows_per_batch(128) == 16
    assert backend.windows_per_batch(1024) == 1


class SlowStage:
    """A stage whose run waits until the test lets it go on."""

    def __init__(self) -> None:
        self.facts = StageFacts("unet_tap", "test", "test", "cpu", "", 0.0)
        self.started, self.go_on = threading.Event(), threading.Event()
        self.closed = False

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.started.set()
        assert self.go_on.wait(20)
        assert not self.closed, "released while running"
        return {}

    def close(self) -> None:
        self.closed = True


class OneStage:
    device = "cpu"
    description = "test"

    def __init__(self, stage: SlowStage) -> None:
        self.stage = stage
        self.loads = 0

    def load(self, bundle: Bundle, stage: str) -> SlowStage:
        self.loads += 1
        return self.stage

    def windows_per_batch(self, side: int) -> int:
        return 1


def test_closing_waits_for_a_stage_that_runs(label_bundle: Path) -> None:
    stage = SlowStage()
    pool = StagePool(OneStage(stage), Bundle.open(label_bundle), keep=frozenset({"unet_tap"}))  # type: ignore[arg-type]

    def work() -> None:
        with pool.use("unet_tap") as used:
            used.run({})

    thread = threading.Thread(target=work)
    thread.start()
    assert stage.started.wait(20)
    pool.close()
    assert not stage.closed
    stage.go_on.set()
    thread.join()
    assert stage.closed
    with pytest.raises(BackendError, match="closed"), pool.use("unet_tap"):
        pass


def test_stage_is_released_even_if_it_fails(label_bundle: Path) -> None:
    stage = SlowStage()
    backend = OneStage(stage)
    pool = StagePool(backend, Bundle.open(label_bundle), keep=frozenset())  # type: ignore[arg-type]
    with pytest.raises(KeyError), pool.use("clip_text"):
        raise KeyError
    assert stage.closed
    assert pool.facts()["clip_text"].engine == "test"
    with pool.use("clip_text"):
        assert backend.loads == 2
