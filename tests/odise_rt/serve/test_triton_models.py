"""The models of a repository without Triton: its module for Python models is a stand-in of this file."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from odise_rt import Bundle
from odise_rt.backends.ort import CUDA_OPTIONS, PROVIDERS
from odise_rt.serve.triton import stage_model
from odise_rt.serve.triton.orchestrator import TritonPythonModel
from odise_rt.serve.triton.repository import RepositoryOptions, export_repository
from tests.odise_rt.fake_bundle import colour_image
from tests.odise_rt.serve.conftest import png


@dataclasses.dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str = "") -> None:
        self.message, self.code = message, code


@dataclasses.dataclass
class Response:
    output_tensors: list[Tensor] = dataclasses.field(default_factory=list)
    error: TritonError | None = None


@pytest.fixture(autouse=True)
def utils(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=Response,
        get_input_tensor_by_name=lambda request, name: request.get(name),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)  # type: ignore[arg-type]


def text(value: str) -> Tensor:
    return Tensor("", np.array([value.encode()], dtype=np.object_))


@pytest.fixture
def ask(label_bundle: Path, tmp_path: Path) -> Callable[..., Response]:
    """Asks the orchestrator of a repository that accepts four words."""
    options = RepositoryOptions(stages="inside", max_words=4)
    export_repository(Bundle.open(label_bundle), tmp_path / "models", options)
    parameters = {"stages": "inside", "device": "cpu", "max_pixels": "50000", "max_words": "4"}
    model = TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": {k: {"string_value": v} for k, v in parameters.items()}}),
            "model_repository": str(tmp_path / "models/odise"),
            "model_version": "1",
            "model_name": "odise",
        }
    )

    def asked(words: str, **options: Any) -> Response:
        request = {"PIXELS": Tensor("", colour_image()), "VOCABULARY": text(words)}
        if options:
            request["OPTIONS"] = text(json.dumps(options))
        response: Response = model.execute([request])[0]
        return response

    return asked


def test_the_orchestrator_segments(ask: Callable[..., Response]) -> None:
    answer = ask("red; green; blue; white")
    assert answer.error is None
    result = json.loads(answer.output_tensors[1].array[0])
    assert {s["label"] for s in result["segments"]} == {"red", "green", "blue", "white"}


def test_names_are_given_as_over_http(ask: Callable[..., Response], client: Any) -> None:
    """The same request, the same answer."""
    words = "red; green; blue; white"
    for options in ({}, {"explain": 0}, {"explain": 2}):
        files = {"image": ("image.png", png(), "image/png")}
        fields = {"vocabulary": words, "masks": "none"} | {name: str(n) for name, n in options.items()}
        over_http = client.post("/v1/segment", files=files, data=fields).json()
        result = json.loads(ask(words, **options).output_tensors[1].array[0])
        assert result["segments"] == over_http["segments"]
        assert result["facts"]["options"]["explain"] == over_http["facts"]["options"]["explain"]
        assert ("candidates" in result["segments"][0]) == ("explain" in options and options["explain"] > 0)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("a; b; c; d, e", {}, "has 5 words, this server accepts 4"),
        ("x" * 4001, {}, "4,001 characters"),
        ("red", {"instances_per_image": 101}, "at most 100"),
        ("red", {"short_edge": 65}, "at most 64"),
    ],
)
def test_the_orchestrator_bounds_what_a_request_costs(
    ask: Callable[..., Response], words: str, options: dict[str, Any], message: str
) -> None:
    error = ask(words, **options).error
    assert error is not None
    assert message in error.message
    assert error.code == TritonError.INVALID_ARG


@pytest.mark.parametrize(("kind", "works"), [("CPU", True), ("GPU", True), ("GPU", False)])
def test_a_stage_runs_on_the_device_of_its_instance(monkeypatch: pytest.MonkeyPatch, kind: str, works: bool) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked.extend(providers)
            assert options.intra_op_num_threads == 3  # two copies share the cores

        def get_providers(self) -> list[str]:
            names = [p if isinstance(p, str) else p[0] for p in asked]
            return names if works else names[1:]

    ort = SimpleNamespace(InferenceSession=Session, SessionOptions=SimpleNamespace)
    monkeypatch.setattr(stage_model, "usable_cores", lambda: 6)
    monkeypatch.setattr(stage_model, "import_onnxruntime", lambda device: ort)
    arguments = {
        "model_config": json.dumps({"input": [], "output": [], "instance_group": [{"count": 2}]}),
        "model_repository": "models/odise_unet_tap",
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": "3",
    }
    if not works:
        with pytest.raises(RuntimeError, match=f"was to run on {PROVIDERS['cuda']} and does not"):
            stage_model.TritonPythonModel().initialize(arguments)
        return
    stage_model.TritonPythonModel().initialize(arguments)
    cuda = (PROVIDERS["cuda"], {**CUDA_OPTIONS, "device_id": "3"})
    assert asked == ([PROVIDERS["cpu"]] if kind == "CPU" else [cuda, PROVIDERS["cpu"]])
