"""What counts as agreement."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.bundle_writer import BundleWriter
from export.engine_profiles import WINDOW_COUNTS, engine_shapes, stage_profiles
from export.engine_reference import CHECK_WORDS
from export.report import ExportReport
from export.tolerances import RESULT_AGREEMENT, STAGE_TOLERANCES
from export.verify import (
    ResultComparison,
    compare_results,
    compare_stage,
    engine_references,
    example_pictures,
    panoptic_agreement,
    run_example,
)
from export.weight_store import WeightStore, save_graph
from odise_rt.bundle import CONSTANTS_NAME, Bundle
from odise_rt.check_picture import landscape
from odise_rt.engine_check import Case
from odise_rt.errors import ExportError
from odise_rt.results import PanopticResult, Segment
from odise_rt.specs import STAGES, StageSpec, TensorSpec, stage_specs
from tests.export.conftest import graph_from_text, run_in_pytorch, small_checkpoint, write_empty_stage
from training.checkpoints import LoadedCheckpoint
from training.torch_stages import model_constants, model_facts


@pytest.fixture(scope="module")
def example(small: LoadedCheckpoint):  # type: ignore[no-untyped-def]
    return run_example(small, example_pictures(model_facts(small.model))[1], CHECK_WORDS[1])


def test_an_example_records_what_every_stage_got_and_gave(example, small: LoadedCheckpoint) -> None:  # type: ignore[no-untyped-def]
    assert set(example.cases) == set(STAGES)
    # Two windows in one batch, where the other picture is one window: a constant in place of the number would be seen.
    assert example.cases["unet_tap"].inputs["windows"].shape == (2, 3, small.config.window, small.config.window)
    assert example.result.semantic_map is not None


def test_most_pixels_of_an_example_have_a_segment(example) -> None:  # type: ignore[no-untyped-def]
    """Under the published overlap threshold fewer than half have one, and agree with more results."""
    assert (example.result.segment_map > 0).mean() > 0.5


def test_the_two_pictures_differ_in_every_dimension(small: LoadedCheckpoint) -> None:
    facts = replace(model_facts(small.model), window=128)
    first, second = example_pictures(facts)
    assert first.shape == (128, 128, 3)
    assert second.shape[0] < 64 < second.shape[1] < 128
    assert (landscape(40, 50) == landscape(40, 50)).all()
    assert (landscape(40, 50) != landscape(40, 50, seed=1)).any()


@pytest.mark.parametrize(("windows", "recorded"), [(WINDOW_COUNTS, 2), ((1,), 1)])
def test_references_of_engines_are_whole_windows_by_pytorch(
    small: LoadedCheckpoint, windows: tuple[int, ...], recorded: int
) -> None:
    references = engine_references(small, max(windows))
    assert references.by.startswith("PyTorch ")
    window = small.config.window
    shapes = [case.inputs["windows"].shape for case in references.cases["unet_tap"]]
    assert shapes == [(1, 3, window, window), (recorded, 3, window, window)]
    facts = model_facts(small.model)
    specs, shapes_of = stage_specs(facts), engine_shapes(facts, windows=windows)
    for stage, cases in references.cases.items():
        profiles = stage_profiles(specs[stage], facts, shapes_of, few=True)
        for case in cases:
            assert any(all(p[name].holds(a.shape) for name, a in case.inputs.items()) for p in profiles), stage
            assert all(np.isfinite(array).all() for array in case.outputs.values())


def _result(example, ids: list[list[int]], classes: dict[int, int]) -> PanopticResult:  # type: ignore[no-untyped-def]
    segments = tuple(Segment(i, f"class {c}", c, 1.0, 1, (0, 0, 1, 1), True) for i, c in sorted(classes.items()))
    return replace(example.result, segment_map=np.array(ids, np.int32), segments=segments)


def test_agreement_does_not_depend_on_ids(example) -> None:  # type: ignore[no-untyped-def]
    expected = _result(example, [[1, 1, 2, 0]], {1: 7, 2: 7})
    assert panoptic_agreement(expected, _result(example, [[2, 2, 1, 0]], {1: 7, 2: 7})) == 1.0


def test_agreement_counts_pixels_of_other_segments_and_classes(example) -> None:  # type: ignore[no-untyped-def]
    expected = _result(example, [[1, 1, 2, 2]], {1: 3, 2: 3})
    assert panoptic_agreement(expected, _result(example, [[1, 1, 1, 2]], {1: 3, 2: 3})) == 0.75
    assert panoptic_agreement(expected, _result(example, [[1, 1, 2, 2]], {1: 3, 2: 4})) == 0.5
    # Merging two things into one is an error for the smaller of them.
    merged = _result(example, [[1, 1, 1, 1]], {1: 3})
    assert panoptic_agreement(expected, merged) == 0.5
    # And so is splitting one into two.
    assert panoptic_agreement(merged, expected) == 0.5
    assert panoptic_agreement(expected, _result(example, [[0, 0, 0, 0]], {})) == 0.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "mask_classifier.no_object_embedding",
            r"the model's constants: no_object_embedding holds NaN or infinite values",
        ),
        ("clip.token_embedding.weight", r"stage clip_text in torch .*: text_embedding holds NaN or infinite values"),
        ("clip.visual.proj", r"stage clip_image in torch .*: image_embedding holds nothing but zeros"),
    ],
)
def test_a_model_that_computes_nothing_sound_is_refused(damage: str, message: str) -> None:
    loaded = small_checkpoint()
    value = 0.0 if "proj" in damage else float("nan")
    loaded.model.get_parameter(damage).data.fill_(value)
    with pytest.raises(ExportError, match=message):
        run_example(loaded, example_pictures(model_facts(loaded.model))[1], CHECK_WORDS[1])


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(small: LoadedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the small model, whose stages are left to PyTorch."""
    facts, out = model_facts(small.model), tmp_path_factory.mktemp("whole") / "bundle"
    with BundleWriter(out) as writer:
        for spec in stage_specs(facts).values():
            write_empty_stage(writer, spec)
        writer.write_constants(model_constants(small.model))
        writer.write_tokenizer(small.tokenizer_json)
        words = {"training_vocabulary": list(small.training_vocabulary)}
        writer.write_manifest(facts, {"name": "small", "precision": "fp32", **words})
        return Bundle.open(writer.publish())


@pytest.fixture
def in_pytorch(small: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_pytorch(small, monkeypatch)


def test_a_bundle_of_the_model_agrees_end_to_end(in_pytorch: None, bundle: Bundle, example) -> None:  # type: ignore[no-untyped-def]
    found = compare_results(bundle, "fp32", example)
    assert (found.panoptic, found.semantic, found.passed) == (1.0, 1.0, True)
    assert found.segments[0] == found.segments[1] > 0


@pytest.mark.parametrize("name", ["noise", "no_object_embedding"])
def test_other_constants_do_not_pass_end_to_end(
    in_pytorch: None,
    bundle: Bundle,
    example,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    name: str,
) -> None:
    constants = bundle.constants()
    constants[name] = -constants[name]
    shutil.copytree(bundle.root, tmp_path / "altered")
    np.savez(tmp_path / "altered" / CONSTANTS_NAME, **constants)  # type: ignore[arg-type]
    altered = Bundle.open(tmp_path / "altered", verify=False)
    assert not compare_results(altered, "fp32", example).passed


def test_another_prompt_does_not_pass_end_to_end(in_pytorch: None, bundle: Bundle, example) -> None:  # type: ignore[no-untyped-def]
    altered = replace(bundle, facts=replace(bundle.facts, mask_prompt="a bad sketch of the {}, at night."))
    assert not compare_results(altered, "fp32", example).passed


@pytest.mark.parametrize("wrong", ["panoptic", "semantic"])
def test_segments_and_classes_must_both_agree(
    in_pytorch: None,
    bundle: Bundle,
    example,  # type: ignore[no-untyped-def]
    wrong: str,
) -> None:
    name = "segment_map" if wrong == "panoptic" else "semantic_map"
    altered = getattr(example.result, name).copy()
    # One row of 48 is another segment's or class's: beyond the bound of float32, within that of fp16.
    altered[0] = (altered[0] + 1) % (max(1, len(example.result.segments)) + 1)
    expected = replace(example, result=replace(example.result, **{name: altered}))
    found = compare_results(bundle, "fp32", expected)
    shares = {"panoptic": found.panoptic, "semantic": found.semantic}
    assert 0.97 < shares.pop(wrong) < 0.999
    assert list(shares.values()) == [1.0]
    assert not found.passed
    assert compare_results(bundle, "fp16", expected).passed


def _report(*results: ResultComparison) -> str:
    return " ".join(ExportReport("m", "fp32", (64, 64), (), results, 1.0, 0, 0).totals())


def test_a_report_has_the_worse_of_the_pictures() -> None:
    totals = _report(ResultComparison(1.0, 0.98, (3, 4), {}, True), ResultComparison(0.99, 1.0, (0, 2), {}, True))
    assert "99.0000% of pixels in the same segment, 98.0000% in the same class" in totals
    assert "3 segments in PyTorch, 6 from the bundle" in totals
    assert "End to end" not in _report()


@pytest.mark.parametrize("segments", [(4, 4), (1, 0), (0, 1), (0, 0)])
def test_a_report_says_when_no_segment_was_compared(segments: tuple[int, int]) -> None:
    totals = _report(ResultComparison(1.0, 1.0, (0, 0), {}, True), ResultComparison(1.0, 1.0, segments, {}, True))
    assert ("in the same segment" in totals) == any(segments)
    assert ("No segment was" in totals) != any(segments)


SPEC = StageSpec("clip_text", (TensorSpec("x", "float32", ("L", 2)),), (TensorSpec("y", "float32", ("L", 2)),))


def _compare(tmp_path: Path, example, body: str, expected: np.ndarray):  # type: ignore[no-untyped-def]
    x = np.array([[1.0, -2.0]], np.float32)
    recorded = replace(example, cases={"clip_text": Case({"x": x}, {"y": expected})})
    with WeightStore(tmp_path / "w.data") as store:
        save_graph(graph_from_text(f"g (float[L, 2] x) => (float[L, 2] y) {{ {body} }}"), tmp_path / "g.onnx", store)
    return compare_stage(tmp_path / "g.onnx", SPEC, "portable", "fp32", [recorded], threads=1)


def test_equal_outputs_pass(tmp_path: Path, example) -> None:  # type: ignore[no-untyped-def]
    (comparison,) = _compare(tmp_path, example, "y = Neg(x)", np.array([[-1.0, 2.0]], np.float32))
    assert comparison.check.passed
    assert (comparison.check.scale, comparison.check.max_error) == (2.0, 0.0)


def test_errors_are_relative_to_the_scale(tmp_path: Path, example) -> None:  # type: ignore[no-untyped-def]
    (comparison,) = _compare(tmp_path, example, "y = Neg(x)", np.array([[-1.0, 2.002]], np.float32))
    assert not comparison.check.passed
    assert comparison.check.relative_max == pytest.approx(0.001, rel=0.01)
    assert comparison.check.relative_mean == pytest.approx(0.0005, rel=0.01)


def test_nan_does_not_pass(tmp_path: Path, example) -> None:  # type: ignore[no-untyped-def]
    (comparison,) = _compare(tmp_path, example, "y = Log(x)", np.array([[0.0, 1.0]], np.float32))
    assert comparison.check.not_finite == 1
    assert not comparison.check.passed


def test_another_shape_is_an_error(tmp_path: Path, example) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ExportError, match=r"stage clip_text \(portable\): y of case 0 .* symbolic dimension"):
        _compare(tmp_path, example, "y = Neg(x)", np.zeros((2, 2), np.float32))


def test_a_graph_that_does_not_run_is_an_error(tmp_path: Path, example) -> None:  # type: ignore[no-untyped-def]
    zeros = np.zeros((1, 2), np.float32)
    recorded = replace(example, cases={"clip_text": Case({"x": zeros}, {"y": zeros})})
    with WeightStore(tmp_path / "w.data") as store:
        save_graph(graph_from_text("g (float[L, 2] z) => (float[L, 2] y) { y = Neg(z) }"), tmp_path / "g.onnx", store)
    with pytest.raises(ExportError, match=r"stage clip_text \(portable\): ONNX Runtime .* does not run g\.onnx"):
        compare_stage(tmp_path / "g.onnx", SPEC, "portable", "fp32", [recorded])


def test_every_stage_has_bounds_for_every_precision() -> None:
    assert {stage for stage, _ in STAGE_TOLERANCES} == set(STAGES)
    for precision, agreement in RESULT_AGREEMENT.items():
        assert 0.9 < agreement.semantic <= agreement.panoptic + 0.1 <= 1.1
        for stage in STAGES:
            tolerance = STAGE_TOLERANCES[stage, precision]
            assert 0 < tolerance.bounds.mean <= tolerance.bounds.max < 1
            assert tolerance.reason
