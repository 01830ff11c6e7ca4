"""An export as a whole."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from export import exporter
from export.bundle_writer import BundleWriter
from export.exporter import Exporter, ExportOptions, build_bundle, check_stages
from export.flops import StageFlops
from export.precision import Precision
from export.report import ExportReport, StageRow
from export.sources import Source
from export.verify import Example, run_example
from odise_rt.bundle import Bundle
from odise_rt.errors import ExportError
from odise_rt.specs import STAGES, ModelFacts
from tests.export.conftest import run_in_pytorch, small_checkpoint, write_empty_stage
from training.checkpoints import LoadedCheckpoint


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_as_many_steps_are_done_as_were_announced(precision: Precision) -> None:
    told = io.StringIO()
    options = ExportOptions(precision, stages=("clip_text",), threads=1)
    check_stages(Source(small_checkpoint(), {}), options, Console(file=told))
    assert told.getvalue().count("✓") == exporter._steps(options)


# ---- what comes after the stages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> LoadedCheckpoint:
    """One of its own: an export takes parts of the model away."""
    return small_checkpoint()


@pytest.fixture(scope="module")
def known() -> dict[str, Example]:
    """Words to the picture that is segmented for them: PyTorch does so once for all tests."""
    return {}


@pytest.fixture
def stages_apart(loaded: LoadedCheckpoint, known: dict[str, Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are compared in tests of their own; here PyTorch computes them for the bundle, too."""

    def example(loaded: LoadedCheckpoint, pixels: np.ndarray, words: str) -> Example:
        if words not in known:
            known[words] = run_example(loaded, pixels, words)
        return known[words]

    def stage(self: Exporter, graph: Any, flops: StageFlops, examples: Any) -> StageRow:
        write_empty_stage(self.writer, graph.spec)
        return StageRow(graph.spec.name, 0, {}, flops, 0.0, 0, {}, ())

    run_in_pytorch(loaded, monkeypatch)
    monkeypatch.setattr(Exporter, "_stage", stage)
    monkeypatch.setattr(exporter, "run_example", example)
    monkeypatch.setattr(exporter, "count_flops", lambda *arguments: dict.fromkeys(STAGES, StageFlops(0, 0)))


def export(loaded: LoadedCheckpoint, out: Path) -> ExportReport:
    return build_bundle(Source(loaded, {}), out, ExportOptions(threads=1), Console(quiet=True))


def test_both_pictures_are_segmented_with_the_bundle(
    loaded: LoadedCheckpoint, stages_apart: None, tmp_path: Path
) -> None:
    report = export(loaded, tmp_path / "bundle")
    assert [(found.panoptic, found.semantic, found.passed) for found in report.results] == [(1.0, 1.0, True)] * 2
    assert any(any(found.segments) for found in report.results)
    assert Bundle.open(tmp_path / "bundle").training_vocabulary == {"sky", "tree"}


def test_a_bundle_that_segments_otherwise_is_not_put_in_place(
    loaded: LoadedCheckpoint, stages_apart: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = small_checkpoint()
    other.model.mask_generator.mask_embedding.logit_scale.data.neg_()
    other.model.clip.visual.proj.data.neg_()
    run_in_pytorch(other, monkeypatch)
    with pytest.raises(ExportError, match=r"end to end \(64 x 64\): [\d.]+% of pixels(.|\n)*end to end \(48 x 120\): "):
        export(loaded, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "share"), [("noise", 1.05), ("null_text_embedding", 1.05), ("no_object_embedding", 1.0 + 2**-20)]
)
def test_constants_are_read_back(
    name: str,
    share: float,
    loaded: LoadedCheckpoint,
    stages_apart: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = BundleWriter.write_constants

    def wrong(self: BundleWriter, constants: Mapping[str, np.ndarray]) -> None:
        write(self, {**constants, name: constants[name] * np.float32(share)})

    monkeypatch.setattr(BundleWriter, "write_constants", wrong)
    with pytest.raises(ExportError, match=rf"has: {name} in constants\.npz\. "):
        export(loaded, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_weight_seen": 0.75}, r"has: clip_weight_seen in bundle\.json \(0\.75, expected 0\.\d+\)\. "),
        ({"clip_logit_scale": 15.5}, r"has: clip_logit_scale in bundle\.json \(15\.5, expected [\d.]+\)\. "),
        ({"clip_prompt": "a {}"}, r"has: clip_prompt in bundle\.json \('a \{\}', expected 'a photo of a \{\}\.'\)\. "),
        ({"training_vocabulary": ["sky"]}, r"has: training_vocabulary in bundle\.json \(1 words, e\.g\. 'tree'\)\. "),
        (
            {"training_vocabulary": ["sky", "tree", "sun"]},
            r"has: training_vocabulary in bundle\.json \(1 words, e\.g\. 'sun'\)\. ",
        ),
    ],
)
def test_facts_and_words_are_read_back(
    change: dict[str, Any],
    message: str,
    loaded: LoadedCheckpoint,
    stages_apart: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = BundleWriter.write_manifest
    words = {key: value for key, value in change.items() if key == "training_vocabulary"}

    def wrong(self: BundleWriter, facts: ModelFacts, description: Mapping[str, Any]) -> None:
        changes = {key: value for key, value in change.items() if key not in words}
        write(self, replace(facts, **changes), {**description, **words})

    monkeypatch.setattr(BundleWriter, "write_manifest", wrong)
    with pytest.raises(ExportError, match=message):
        export(loaded, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_read_back(
    loaded: LoadedCheckpoint, stages_apart: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = BundleWriter.write_tokenizer
    monkeypatch.setattr(BundleWriter, "write_tokenizer", lambda self, text: write(self, f"{text} "))
    with pytest.raises(ExportError, match=r"has: tokenizer\.json\. "):
        export(loaded, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
