"""Bound buffers of ONNX Runtime, on the CPU, where the same code runs; and what is asked of CUDA."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from odise_rt import Bundle
from odise_rt.backends import ort
from odise_rt.backends.ort import OrtBackend
from odise_rt.backends.ort_binding import RUNS_TO_A_WAIT, BoundRuns, BoundSession
from odise_rt.specs import STAGES, StageSpec
from tests.odise_rt.engine_bundle import example


def bound(label_bundle: Path, stage: str, **options: Any) -> tuple[BoundRuns, StageSpec, Any]:
    bundle = Bundle.open(label_bundle)
    session = onnxruntime.InferenceSession(str(bundle.stages[stage].file.path), providers=["CPUExecutionProvider"])
    spec = bundle.stages[stage].spec
    return BoundRuns(onnxruntime, session, spec, "cpu", **options), spec, OrtBackend("cpu", 1).load(bundle, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_bound_runs_agree_with_plain_ones(label_bundle: Path, stage: str) -> None:
    runs, spec, plain = bound(label_bundle, stage)
    for seed in range(3):
        inputs = example(spec, seed)
        found = runs.run(inputs, spec.check(inputs))
        for name, array in plain.run(inputs).items():
            np.testing.assert_array_equal(found[name], array)


def test_outputs_belong_to_the_caller(label_bundle: Path) -> None:
    runs, spec, _ = bound(label_bundle, "clip_image")
    first = runs.run(example(spec, 0), spec.check(example(spec, 0)))["image_embedding"]
    kept = first.copy()
    runs.run(example(spec, 1), spec.check(example(spec, 1)))
    np.testing.assert_array_equal(first, kept)


def test_inputs_are_not_written_to(label_bundle: Path) -> None:
    runs, spec, _ = bound(label_bundle, "clip_image")
    first, second = example(spec, 0), example(spec, 1)
    kept = {name: array.copy() for name, array in first.items()}
    for inputs in (first, second):
        runs.run(inputs, spec.check(inputs))
    assert all(np.array_equal(first[name], array) for name, array in kept.items())


def windows(count: int) -> dict[str, np.ndarray]:
    return {"windows": np.full((count, 3, 64, 64), count, np.float32)}


def test_shapes_are_kept_within_a_bound(label_bundle: Path) -> None:
    runs, spec, plain = bound(label_bundle, "clip_image", max_shapes=2)
    for count in (1, 2, 3, 1, 4, 1):
        found = runs.run(windows(count), spec.check(windows(count)))
        np.testing.assert_array_equal(found["image_embedding"], plain.run(windows(count))["image_embedding"])
        assert len(runs._known) <= 2
    assert [key[0][0] for key in runs._known] == [4, 1]


class Recorder:
    """A session that notes with which graph id it is run."""

    def __init__(self, session: Any) -> None:
        self.session, self.ids = session, []  # type: ignore[var-annotated]

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.ids.append(options.get_run_config_entry("gpu_graph_id"))
        self.session.run_with_iobinding(binding)


def test_only_the_first_shapes_get_a_graph(label_bundle: Path) -> None:
    runs, spec, _ = bound(label_bundle, "clip_image", cuda_graph=True, max_shapes=2)
    recorder = Recorder(runs._session)
    runs._session = recorder
    for count in (1, 2, 3, 1, 4, 5, 2):
        runs.run(windows(count), spec.check(windows(count)))
    assert recorder.ids == ["1", "2", "-1", "1", "-1", "-1", "2"]
    # Buffers under a captured graph must never move.
    assert {key[0][0] for key, kept in runs._known.items() if kept.graph > 0} == {1, 2}
    assert len(runs._known) == 4


def test_threads_take_turns(label_bundle: Path) -> None:
    runs, spec, plain = bound(label_bundle, "clip_image")
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            inputs: Mapping[str, np.ndarray] = example(spec, number)
            found = runs.run(inputs, spec.check(inputs))["image_embedding"]
            if not np.array_equal(found, plain.run(inputs)["image_embedding"]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_cuda_sessions_are_bound_and_ask_for_what_they_need(
    label_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a session that claims to run on CUDA: which options it is given, and that it is run on bound buffers."""
    asked: list[Any] = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(ort, "working_provider", lambda device: None)
    backend = OrtBackend("cuda", 1, cuda_graph=True)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    stage = backend.load(Bundle.open(label_bundle), "clip_image")
    (name, options), fallback = asked[0]
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["enable_cuda_graph"] == "1"
    assert options["use_tf32"] == "0"
    assert options["prefer_nhwc"] == "1"
    assert stage._bound is not None
    assert stage.facts.provider == "CUDAExecutionProvider"
    assert stage.facts.precision == "fp32"
    turned = backend.open_graph(
        Bundle.open(label_bundle).stages["clip_image"].file.path, stage._spec, "", "", False, True
    )
    assert asked[1][0][1] == options | {"prefer_nhwc": "0"}
    turned.close()


def test_a_run_waits_for_the_gpu_now_and_then(label_bundle: Path) -> None:
    """ONNX Runtime frees what a run pinned when one waits."""
    bundle = Bundle.open(label_bundle)
    spec = bundle.stages["clip_text"].spec

    class Session:
        waits: list[bool] = []  # noqa: RUF012

        def io_binding(self) -> None:
            """Nothing is bound."""

        def run_with_iobinding(self, binding: object, options: Any) -> None:
            key = "disable_synchronize_execution_providers"
            self.waits.append(options is None or options.get_run_config_entry(key) != "1")

    session = BoundSession(onnxruntime, Session(), spec, example(spec), "cpu")
    for _ in range(2 * RUNS_TO_A_WAIT):
        session.enqueue()
    assert [number for number, waits in enumerate(Session.waits, 1) if waits] == [RUNS_TO_A_WAIT, 2 * RUNS_TO_A_WAIT]
