"""Compares exported graphs with PyTorch: stage by stage on real inputs, then the whole way from pixels to segments.

Real inputs are those that a stage gets when PyTorch segments a picture, because random ones exercise neither the range
of activations nor the thresholds. Two pictures of different sizes tell a symbolic dimension from a constant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.cpu_check import CpuCheck
from export.engine_reference import (
    CHECK_WORDS,
    RecordingBackend,
    References,
    check_sound,
    engine_pictures,
    reference_options,
)
from export.precision import Precision
from export.tolerances import RESULT_AGREEMENT, stage_bounds
from odise_rt.bundle import CONSTANTS_NAME, MANIFEST_NAME, TOKENIZER_NAME, Bundle
from odise_rt.check_picture import landscape
from odise_rt.engine_check import Case, OutputCheck
from odise_rt.errors import ExportError
from odise_rt.options import SegmentOptions
from odise_rt.results import PanopticResult
from odise_rt.segmenter import Segmenter
from odise_rt.specs import STAGES, ModelFacts, StageSpec
from odise_rt.vocabulary import Vocabulary
from training.checkpoints import LoadedCheckpoint
from training.torch_stages import TorchBackend, model_constants, model_facts, torch_segmenter


@dataclass(frozen=True)
class Example:
    """One picture with PyTorch's answer, and what every stage got and gave on the way."""

    pixels: np.ndarray
    vocabulary: Vocabulary
    options: SegmentOptions
    result: PanopticResult
    cases: dict[str, Case]
    """Stage to the inputs of its first call, and what PyTorch made of them."""


@dataclass(frozen=True)
class Comparison:
    """One output of one graph on one example."""

    stage: str
    form: str
    """"portable", or the variant's key."""
    shapes: str
    """Shapes of the inputs, as text."""
    check: OutputCheck


@dataclass(frozen=True)
class ResultComparison:
    """The runtime on a bundle beside the runtime on PyTorch."""

    panoptic: float
    """Share of pixels in the same segment, in [0, 1]."""
    semantic: float
    """Share of pixels with the same class."""
    segments: tuple[int, int]
    """Segments that PyTorch and the bundle found."""
    seconds: dict[str, float]
    """Seconds of the run on the bundle, by step."""
    passed: bool


def example_pictures(facts: ModelFacts, photo: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures: one window exactly, and an odd size with two smaller windows that need resizing and padding.

    Args:
        facts: of the model; they decide the sizes.
        photo: takes the place of the drawing in the first picture, in whatever size it has.
    """
    window, divisor = facts.window, facts.size_divisor
    low = max(window - divisor, divisor)
    return (
        landscape(window, window) if photo is None else photo,
        landscape(low - divisor // 4, low + divisor - divisor // 8, seed=1),
    )


def run_example(loaded: LoadedCheckpoint, pixels: np.ndarray, words: str) -> Example:
    """Segment a picture in PyTorch and record every stage.

    Args:
        loaded: the model.
        pixels: uint8 ``(h, w, 3)``; the network sees it at its own size if it is smaller than the model's test size.
        words: in the syntax of :meth:`Vocabulary.parse`.

    Raises:
        ExportError: PyTorch itself gives NaN, infinities or only zeros, with which nothing can be compared.
    """
    check_sound("the model's constants", model_constants(loaded.model))
    facts = model_facts(loaded.model)
    edge = min(pixels.shape[:2])
    # Without an overlap threshold most pixels get a segment even from a model that was never trained.
    options = SegmentOptions(
        outputs=("panoptic", "semantic"),
        overlap_threshold=0.0,
        short_edge=min(edge, facts.test_short_edge),
        windows_per_batch=2,
    )
    vocabulary = Vocabulary.parse(words)
    backend = RecordingBackend(TorchBackend(loaded.model))
    with torch_segmenter(loaded.model, loaded.tokenizer_json, loaded.training_vocabulary, backend) as segmenter:
        result = segmenter.segment(pixels, vocabulary, options)
    return Example(pixels, vocabulary, options, result, backend.cases)


def engine_references(loaded: LoadedCheckpoint, largest_batch: int) -> References:
    """What PyTorch makes of the pictures that engines are compared on.

    Args:
        loaded: the model.
        largest_batch: of windows that the engines take.
    """
    cases: dict[str, list[Case]] = {name: [] for name in STAGES}
    for pixels, words in zip(engine_pictures(model_facts(loaded.model)), CHECK_WORDS, strict=True):
        backend = RecordingBackend(TorchBackend(loaded.model))
        with torch_segmenter(loaded.model, loaded.tokenizer_json, loaded.training_vocabulary, backend) as segmenter:
            segmenter.segment(pixels, Vocabulary.parse(words), reference_options(pixels, largest_batch))
        for name, case in backend.cases.items():
            cases[name].append(case)
    return References(f"PyTorch {torch.__version__}", cases)


def compare_stage(
    graph: Path, spec: StageSpec, form: str, precision: Precision, examples: list[Example], threads: int | None = None
) -> list[Comparison]:
    """Run one graph in ONNX Runtime on the CPU beside what PyTorch gave.

    Args:
        graph: its file.
        spec: of the stage.
        form: for the report.
        precision: chooses the tolerance.
        examples: from :func:`run_example`.
        threads: inside an operator; ``None``: all usable cores.

    Raises:
        ExportError: ONNX Runtime refuses the graph or fails to run it, or an output has another shape.
    """
    cases = [example.cases[spec.name] for example in examples]
    check = CpuCheck(spec, cases, stage_bounds(spec.name, precision), graph.parent, threads)
    checks = check.file(graph, f"stage {spec.name} ({form})")
    shapes = [", ".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in case.inputs.items()) for case in cases]
    return [Comparison(spec.name, form, shapes[check.case], check) for check in checks]


def check_written(bundle: Bundle, loaded: LoadedCheckpoint) -> None:
    """Refuse a bundle that gives back other constants, facts or words, or another tokenizer, than went into it.

    They are compared exactly: a scale or weight that is a little off moves too few pixels to be seen end to end.

    Args:
        bundle: opened.
        loaded: the model that it was made of.

    Raises:
        ExportError: naming what differs.
    """
    constants, facts = bundle.constants(), model_facts(loaded.model)
    differing = [
        f"{name} in {CONSTANTS_NAME}"
        for name, expected in model_constants(loaded.model).items()
        if not np.array_equal(constants[name], expected)
    ]
    for field in dataclasses.fields(facts):
        found, expected = getattr(bundle.facts, field.name), getattr(facts, field.name)
        if found != expected:
            differing.append(f"{field.name} in {MANIFEST_NAME} ({found!r}, expected {expected!r})")
    wrong_words = bundle.training_vocabulary ^ frozenset(loaded.training_vocabulary)
    if wrong_words:
        example = min(wrong_words)
        differing.append(f"training_vocabulary in {MANIFEST_NAME} ({len(wrong_words)} words, e.g. {example!r})")
    if bundle.tokenizer_path.read_bytes() != loaded.tokenizer_json.encode():
        differing.append(TOKENIZER_NAME)
    if differing:
        raise ExportError(
            f"not exported, the bundle does not give back what the model has: {'; '.join(differing)}. Nothing that you "
            "gave causes this: please report it"
        )


def compare_results(
    bundle: Bundle, precision: Precision, example: Example, threads: int | None = None
) -> ResultComparison:
    """Segment the example's picture with the runtime on a bundle, as a user would.

    Args:
        bundle: opened.
        precision: chooses the bounds.
        example: from :func:`run_example`.
        threads: inside an operator; ``None``: the runtime's choice.
    """
    # One graph in memory at a time: the PyTorch model is there as well.
    with Segmenter.load(bundle, device="cpu", threads=threads, low_memory=True, disk_cache=False) as segmenter:
        found = segmenter.segment(example.pixels, example.vocabulary, example.options)
    expected = example.result
    assert found.semantic_map is not None
    assert expected.semantic_map is not None
    panoptic = panoptic_agreement(expected, found)
    semantic = float((found.semantic_map == expected.semantic_map).mean())
    bounds = RESULT_AGREEMENT[precision]
    passed = panoptic >= bounds.panoptic and semantic >= bounds.semantic
    segments = (len(expected.segments), len(found.segments))
    return ResultComparison(panoptic, semantic, segments, dict(found.facts.seconds), passed)


def panoptic_agreement(expected: PanopticResult, found: PanopticResult) -> float:
    """Share of pixels in the same segment: same class, and the segment that overlaps most, each taken once."""
    ours, theirs = found.segment_map.ravel(), expected.segment_map.ravel()
    pairs, counts = np.unique(np.stack([theirs, ours]), axis=1, return_counts=True)
    our_class = {segment.id: segment.class_index for segment in found.segments} | {0: -1}
    their_class = {segment.id: segment.class_index for segment in expected.segments} | {0: -1}
    agreeing, taken_theirs, taken_ours = 0, set(), set()
    for index in np.argsort(-counts, kind="stable"):
        their_id, our_id = int(pairs[0, index]), int(pairs[1, index])
        same = their_class[their_id] == our_class[our_id]
        if same and their_id not in taken_theirs and our_id not in taken_ours:
            taken_theirs.add(their_id)
            taken_ours.add(our_id)
            agreeing += int(counts[index])
    return agreeing / ours.size
