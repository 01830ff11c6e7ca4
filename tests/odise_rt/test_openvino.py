"""OpenVINO's CPU engine: agrees with ONNX Runtime, is compared before it is trusted, and says what it lacks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from odise_rt import BackendError, Bundle, MissingPackageError, OptionsError, Segmenter
from odise_rt.backends import first_use, openvino
from odise_rt.backends.first_use import FirstUse
from odise_rt.backends.openvino import OpenVinoBackend, OpenVinoStage
from odise_rt.backends.ort import OrtBackend
from odise_rt.backends.select import open_backend
from odise_rt.cli import main
from odise_rt.specs import STAGES
from tests.odise_rt.fake_bundle import colour_image

DIMS = {"N": 2, "s": 64, "H": 64, "W": 96, "h": 50, "w": 90, "Q": 6, "mh": 16, "mw": 24, "L": 3}


def stage_inputs(bundle: Bundle, stage: str, dims: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    tensors = bundle.stages[stage].spec.inputs
    return {t.name: rng.integers(0, 9, t.resolve(dims)).astype(t.dtype) for t in tensors}


# ---- without the package ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Exception from src/core.cpp:95:\nCheck 'false' failed at src/a.cpp:13:\n\"linear\" is no mode\n",
            '"linear" is no mode',
        ),
        ("no memory\nException from src/core.cpp:95:", "no memory"),
        ("Exception from src/core.cpp:95:", "Exception from src/core.cpp:95:"),
    ],
)
def test_what_openvino_says_is_not_where_it_says_it(message: str, expected: str) -> None:
    assert openvino.said(RuntimeError(message)) == expected


def test_absent_package_is_named(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'odise_rt\[openvino\]'"):
        Segmenter.load(label_bundle, device="cpu", cpu_engine="openvino")


def test_unknown_engines_are_refused(label_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionsError, match="cpu_engine is 'tensorflow': expected one of onnxruntime, openvino"):
        open_backend("cpu", cpu_engine="tensorflow")  # type: ignore[arg-type]
    picture = tmp_path / "picture.png"
    Image.fromarray(colour_image()).save(picture)
    arguments = [str(picture), "--bundle", str(label_bundle), "--vocab", "sky", "--out", str(tmp_path / "out")]
    assert main(["segment", *arguments, "--cpu-engine", "tensorflow"]) != 0
    assert "cpu_engine is 'tensorflow'" in capsys.readouterr().err


# ---- with it ---------------------------------------------------------------------------------------------------------

INSTALLED = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="needs the package openvino (make extras)")


@needs_openvino
def test_every_stage_agrees_with_onnxruntime(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    ours, theirs = OpenVinoBackend("fp32", 1), OrtBackend("cpu", 1)
    for name in STAGES:
        stage, reference = ours.load(bundle, name), theirs.load(bundle, name)
        for dims in (DIMS, DIMS | {"N": 3, "H": 96, "mh": 24, "L": 5}):
            inputs = stage_inputs(bundle, name, dims)
            before = {key: value.copy() for key, value in inputs.items()}
            found, expected = stage.run(inputs), reference.run(inputs)
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4)
            assert all(np.array_equal(before[key], inputs[key]) for key in inputs)
        assert stage.facts.engine.startswith("openvino ")
        assert stage.facts.file == f"onnx/{name}.onnx"
        stage.close()
        stage.close()
        with pytest.raises(BackendError, match="is closed"):
            stage.run(inputs)


@needs_openvino
def test_nothing_is_reported() -> None:
    """Importing OpenVINO reports that to its makers, unless the package that does is out of its sight."""
    program = (
        "import sys\n"
        "from odise_rt.backends.openvino import import_openvino\n"
        "package = import_openvino()\n"
        "print([name for name in sys.modules if 'telemetry' in name and not name.startswith('openvino.')])\n"
        "print(package.tools.ovc.telemetry_utils.tm.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "openvino.tools.ovc.telemetry_stub"]


@needs_openvino
def test_the_runtime_outlives_its_backends() -> None:
    first = OpenVinoBackend("fp32", 1)._core
    assert OpenVinoBackend("fp32", 1)._core is first is openvino.shared_core()


@needs_openvino
def test_results_equal_those_of_onnxruntime(label_bundle: Path) -> None:
    image = colour_image()
    with Segmenter.load(label_bundle, device="cpu", threads=1) as segmenter:
        expected = segmenter.segment(image, "sky; tree; sun")
    with Segmenter.load(label_bundle, device="cpu", threads=1, cpu_engine="openvino") as segmenter:
        found = segmenter.segment(image, "sky; tree; sun")
    assert np.array_equal(found.segment_map, expected.segment_map)
    assert {facts.engine.split()[0] for facts in found.facts.stages} == {"openvino"}


@needs_openvino
def test_outputs_are_the_callers(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    stage = OpenVinoBackend("fp32", 1).load(bundle, "clip_image")
    first = stage.run({"windows": np.zeros((1, 3, 64, 64), np.float32)})["image_embedding"]
    kept = first.copy()
    stage.run({"windows": np.ones((1, 3, 64, 64), np.float32)})
    assert np.array_equal(first, kept)


@needs_openvino
def test_threads_share_a_stage(label_bundle: Path) -> None:
    stage = OpenVinoBackend("fp32", 1).load(Bundle.open(label_bundle), "clip_image")
    windows = [np.full((1 + i % 3, 3, 64, 64), i / 40, np.float32) for i in range(40)]
    expected = [stage.run({"windows": w})["image_embedding"] for w in windows]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda w: stage.run({"windows": w})["image_embedding"], windows))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_openvino
def test_few_shapes_are_kept(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "MAX_SHAPES", 2)
    stage = OpenVinoBackend("fp32", 1).load(Bundle.open(label_bundle), "clip_image")
    for count in (1, 2, 1, 3, 1):
        stage.run({"windows": np.zeros((count, 3, 64, 64), np.float32)})
    assert list(stage._models) == [((3, 3, 64, 64),), ((1, 3, 64, 64),)]


@needs_openvino
def test_large_bundles_keep_fewer(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "LARGE_BUNDLE_BYTES", 1)
    monkeypatch.setattr(openvino, "MAX_SHAPES_OF_LARGE", 1)
    stage = OpenVinoBackend("fp32", 1).load(Bundle.open(label_bundle), "clip_image")
    for count in (1, 2):
        stage.run({"windows": np.zeros((count, 3, 64, 64), np.float32)})
    assert list(stage._models) == [((2, 3, 64, 64),)]


@needs_openvino
def test_the_text_encoder_is_compiled_once(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    stage = OpenVinoBackend("fp32", 1).load(bundle, "clip_text")
    for count in (1, 5):
        stage.run(stage_inputs(bundle, "clip_text", DIMS | {"L": count}))
    assert len(stage._models) == 1


@needs_openvino
def test_wrong_arrays_are_refused(label_bundle: Path) -> None:
    stage = OpenVinoBackend("fp32", 1).load(Bundle.open(label_bundle), "clip_image")
    with pytest.raises(BackendError, match="windows"):
        stage.run({"windows": np.zeros((1, 3, 64, 64), np.float64)})


@needs_openvino
def test_absolute_values_of_sizes_survive(tmp_path: Path) -> None:
    """OpenVINO 2026.4 loses an Abs of what follows from sizes; the stage works around it."""
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Cast", ["shape"], ["size"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["size", "seven"], ["difference"]),
            helper.make_node("Abs", ["difference"], ["distance"]),
            helper.make_node("Add", ["x", "distance"], ["y"]),
        ],
        "distance",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [onnx.numpy_helper.from_array(np.array([7], np.float32), "seven")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    package = openvino.import_openvino()
    core = package.Core()
    network = core.read_model(model.SerializeToString())
    openvino._without_abs(package, network)
    network.reshape([3])
    assert core.compile_model(network, "CPU")(np.zeros(3, np.float32))[0].tolist() == [4.0, 4.0, 4.0]


@needs_openvino
def test_bfloat16_needs_the_processor(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "working_openvino", lambda: {"fp32": None, "bf16": "this processor is old"})
    with pytest.raises(BackendError, match="cannot run in bf16 here: this processor is old; use cpu_engine="):
        open_backend("cpu", cpu_engine="openvino-bf16")
    assert "fp32" in open_backend("cpu", cpu_engine="openvino").description


@needs_openvino
@pytest.mark.skipif(
    INSTALLED and openvino.working_openvino()["bf16"] is not None,
    reason="this processor has no bfloat16 products",
)
def test_bfloat16_is_for_the_networks_only(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    backend = OpenVinoBackend("bf16", 1)
    precisions = {name: backend.load(bundle, name).facts.precision for name in STAGES}
    assert precisions == {
        "clip_image": "bf16",
        "unet_tap": "bf16",
        "mask_decoder": "fp32",
        "clip_mask": "bf16",
        "clip_text": "fp32",
    }


# ---- the comparison --------------------------------------------------------------------------------------------------


def count_references(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that ONNX Runtime gave outputs of, as they come."""
    asked: list[str] = []
    for name in ("_image_cases", "_text_case"):
        original: Callable[..., Any] = getattr(first_use, name)

        def counting(*args: Any, _original: Callable[..., Any] = original) -> Any:
            cases = _original(*args)
            asked.extend(cases)
            return cases

        monkeypatch.setattr(first_use, name, counting)
    return asked


@needs_openvino
def test_a_bundle_is_compared_once(label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_references(monkeypatch)
    bundle = Bundle.open(label_bundle)
    for _ in range(2):
        backend = OpenVinoBackend("fp32", 1, FirstUse(tmp_path))
        for name in STAGES:
            backend.load(bundle, name).close()
        assert sorted(asked) == sorted(STAGES)
    notes = sorted((tmp_path / "checked").iterdir())
    assert len(notes) == len(STAGES)
    for note in notes:
        content = json.loads(note.read_text())
        assert content["stage"] in STAGES
        assert content["identity"].startswith("openvino ")
        assert all(check["passed"] for check in content["checks"])
        note.write_text("{", encoding="utf-8")  # damaged: compared again
    asked.clear()
    OpenVinoBackend("fp32", 1, FirstUse(tmp_path)).load(bundle, "clip_text")
    assert asked == ["clip_text"]
    asked.clear()
    OpenVinoBackend("fp32", 1, FirstUse(None)).load(bundle, "clip_text")
    assert asked == ["clip_text"]


@needs_openvino
def test_a_wrong_engine_is_refused(label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OpenVinoStage.run

    def wrong(self: OpenVinoStage, inputs: Any) -> dict[str, np.ndarray]:
        outputs = right(self, inputs)
        return outputs | {"s3": outputs["s3"] * np.float32(1.01)} if "s3" in outputs else outputs

    monkeypatch.setattr(OpenVinoStage, "run", wrong)
    with pytest.raises(BackendError, match=r"stage unet_tap is wrong in openvino .*: s3 of case 0 is off by"):
        Segmenter.load(label_bundle, device="cpu", threads=1, cpu_engine="openvino", cache_dir=tmp_path)
    stages = {json.loads(note.read_text())["stage"] for note in (tmp_path / "checked").iterdir()}
    assert stages == {"clip_image"}


@needs_openvino
def test_a_folder_that_cannot_be_written_costs_a_warning(
    label_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "odise_rt")
    (tmp_path / "checked").write_text("a file")
    OpenVinoBackend("fp32", 1, FirstUse(tmp_path)).load(Bundle.open(label_bundle), "clip_image").close()
    assert "the next load compares again" in caplog.text
