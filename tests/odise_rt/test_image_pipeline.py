"""Pixels to segments on a GPU made of host memory: engines are ONNX Runtime, kernels their own source on the CPU."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt import BackendError, Bundle, ImageError, PanopticResult, Segmenter, SegmentOptions, Vocabulary
from odise_rt.backends import ort
from odise_rt.backends.device import CudaSession
from odise_rt.backends.image_pipeline import MAX_SHAPES, MAX_SIZES, MAX_SPARE, MAX_WORDS, DeviceMasks
from odise_rt.backends.ort import OrtBackend
from odise_rt.backends.window_batching import WindowBatching
from odise_rt.errors import ImageTooLargeError
from odise_rt.kernels.native import FOLDER_VARIABLE
from odise_rt.naming import HostMasks
from odise_rt.specs import STAGES
from tests.odise_rt import fake_driver
from tests.odise_rt.engine_bundle import example, write_engine, write_engines
from tests.odise_rt.fake_bundle import colour_image, write_bundle
from tests.odise_rt.fake_gpu import GPU, Calls
from tests.odise_rt.kernels.compiled import Compiled
from tests.odise_rt.kernels.emulated import Emulation

WORDS = "red, crimson; green; blue; white; stuff: sky"
RUNS = range(3)
"""Directly, while it is captured, and from the graph."""
ALLOCATIONS = ("allocate", "pin", "free", "context", "capture")

pytestmark = pytest.mark.usefixtures("fresh_machine")


@pytest.fixture
def gpu(install_gpu: Callable[..., Calls], emulation: Emulation, tmp_path: Path) -> Calls:
    folder = tmp_path / "kernels"
    folder.mkdir()
    return install_gpu(emulation, folder)


@pytest.fixture
def bundle(new_bundle: Callable[[], Path]) -> Bundle:
    opened = Bundle.open(new_bundle())
    write_engines(opened, verified_on=GPU)
    return opened


def on(bundle: Bundle, device: str, **changes: Any) -> Segmenter:
    return Segmenter.load(bundle.root, device=device, threads=1, **changes)  # type: ignore[arg-type]


class OnGpu:
    """An array that says it lies on the GPU."""

    def __init__(self, array: np.ndarray, strides: Any = None) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (array.ctypes.data, False), "strides": strides,
            "version": 3,
        }  # fmt: skip


# One window; side by side; overlapping; fewer windows at a time than there are; a padded canvas; shrunk; one line.
CASES = [
    ((64, 64), SegmentOptions(short_edge=64)),
    ((64, 128), SegmentOptions(short_edge=64)),
    ((80, 120), SegmentOptions(short_edge=80)),
    ((80, 150), SegmentOptions(short_edge=80, windows_per_batch=4)),
    ((80, 150), SegmentOptions(short_edge=80, windows_per_batch=1)),
    ((50, 71), SegmentOptions(short_edge=50)),
    ((301, 417), SegmentOptions(short_edge=70)),
    ((40, 60), SegmentOptions(short_edge=90)),
    ((1, 200), SegmentOptions(short_edge=32)),
]


@pytest.mark.parametrize(("size", "options"), CASES)
def test_every_number_is_the_one_of_the_path_through_host_memory(
    bundle: Bundle, gpu: Calls, size: tuple[int, int], options: SegmentOptions
) -> None:
    image = colour_image(*size)
    with on(bundle, "cpu") as segmenter:
        expected = segmenter.find_masks(image, options)
        picture = segmenter.segment(image, WORDS, options)
    with on(bundle, "cuda") as segmenter:
        for _ in RUNS:
            found = segmenter.find_masks(image, options)
            assert isinstance(found.masks, DeviceMasks)
            assert np.array_equal(found.mask_logits, expected.mask_logits)
            assert np.array_equal(found.embeddings.mask, expected.embeddings.mask)
            assert np.array_equal(found.embeddings.clip, expected.embeddings.clip)
        assert (found.windows, found.network_size, found.original_size, found.window_side) == (
            expected.windows,
            expected.network_size,
            expected.original_size,
            expected.window_side,
        )
        later = segmenter.name_masks(found, WORDS, options)
        for _ in RUNS:
            result = segmenter.segment(image, WORDS, options)
            assert_same(result, picture)
    assert np.array_equal(later.segment_map, result.segment_map)
    assert later.segments == result.segments
    assert list(result.facts.seconds) == ["words", "preprocess", "pixels_to_segments", "panoptic", "total"]
    assert list(later.facts.seconds) == ["preprocess", "network", "words", "name_masks", "panoptic", "total"]
    assert {s.stage for s in result.facts.stages} >= set(STAGES) - {"clip_text"}


def assert_same(found: PanopticResult, expected: PanopticResult) -> None:
    """Merged and summed in another order of rounding; everything else must be the same."""
    assert (found.segment_map != expected.segment_map).mean() < 2e-3
    assert len(found.segments) == len(expected.segments)
    for ours, other in zip(found.segments, expected.segments, strict=True):
        assert (ours.id, ours.label, ours.isthing, ours.unknown) == (
            other.id,
            other.label,
            other.isthing,
            other.unknown,
        )
        assert ours.score == pytest.approx(other.score, rel=1e-4)
        assert ours.area == pytest.approx(other.area, rel=2e-3, abs=2)
        assert ours.box == pytest.approx(other.box, abs=1)
        assert [c.label for c in ours.candidates] == [c.label for c in other.candidates]
        for mine, theirs in zip(ours.candidates, other.candidates, strict=True):
            assert (mine.score, mine.mask_score, mine.clip_score) == pytest.approx(
                (theirs.score, theirs.mask_score, theirs.clip_score), rel=1e-4, abs=1e-8
            )


@pytest.mark.skipif(fake_driver.why_not() is not None, reason=str(fake_driver.why_not()))
@pytest.mark.parametrize("variant", ["label", "caption"])
def test_the_compiled_kernels_make_the_same_picture(
    install_gpu: Callable[..., Calls], compiled_for: Callable[[int], Compiled], tmp_path: Path, variant: str
) -> None:
    """As nvcc makes them, with what cuda-core tells the driver to launch: grids, shared memory and every argument."""
    opened = Bundle.open(write_bundle(tmp_path / "bundle", variant))
    write_engines(opened, verified_on=GPU)
    folder = tmp_path / "kernels"
    folder.mkdir()
    image, options = colour_image(80, 150), SegmentOptions(short_edge=70, windows_per_batch=4, unknown=0.3)
    with on(opened, "cpu") as segmenter:
        masks, picture = segmenter.find_masks(image, options), segmenter.segment(image, WORDS, options)
    install_gpu(compiled_for(90).kernels, folder)
    with on(opened, "cuda") as segmenter:
        assert np.array_equal(segmenter.find_masks(image, options).mask_logits, masks.mask_logits)
        for _ in RUNS:
            assert_same(segmenter.segment(image, WORDS, options), picture)
    driver = fake_driver.installed()
    assert driver is not None
    assert len({launched.kernel for launched in driver.launched}) >= 8, "from pixels to segments"


@pytest.mark.parametrize("variant", ["label", "caption"])
@pytest.mark.parametrize(
    "options",
    [
        SegmentOptions(unknown=0.9),
        SegmentOptions(unknown=0.0, explain=0),
        SegmentOptions(object_mask_threshold=0.95, overlap_threshold=0.0, explain=2),
        SegmentOptions(clip_weight_seen=1.0, clip_weight_unseen=0.0),
    ],
)
def test_masks_are_named_by_the_same_rules(tmp_path: Path, gpu: Calls, variant: str, options: SegmentOptions) -> None:
    opened = Bundle.open(write_bundle(tmp_path / variant, variant))
    write_engines(opened, verified_on=GPU)
    image = colour_image(80, 120)
    with on(opened, "cpu") as segmenter:
        expected = segmenter.segment(image, WORDS, options)
    with on(opened, "cuda") as segmenter:
        assert_same(segmenter.segment(image, WORDS, options), expected)


def test_words_too_many_to_remember_are_uploaded_once(bundle: Bundle, gpu: Calls, tmp_path: Path) -> None:
    image, vocabularies = colour_image(), (WORDS, "sky; red")
    with on(bundle, "cuda", cache_dir=tmp_path / "words") as segmenter:
        memory = segmenter._embedder._memory
        memory._max_bytes = 0  # those of the other vocabulary are read from the disk again
        for words in vocabularies * 2:
            segmenter.segment(image, words)
        arrays = [segmenter._embedder.embed(Vocabulary.parse(words)).mask_text for words in vocabularies * 2]
        assert arrays[0] is not arrays[2]
        before = len(gpu.log)
        for words in vocabularies:
            segmenter.segment(image, words)
        assert [entry for entry in gpu.log[before:] if entry.startswith(ALLOCATIONS)] == []


def test_vocabularies_take_turns_on_the_gpu(bundle: Bundle, gpu: Calls) -> None:
    vocabularies = ["red; green; blue", "blue, sky; car", "white; red", "crimson; sky"]
    image = colour_image()
    with on(bundle, "cpu") as segmenter:
        expected = [segmenter.segment(image, words) for words in vocabularies]
    with on(bundle, "cuda") as segmenter:
        pipeline = segmenter._pipeline
        assert pipeline is not None
        levels = []
        for _ in range(3):
            for words, picture in zip(vocabularies, expected, strict=True):
                assert_same(segmenter.segment(image, words), picture)
            levels.append(gpu.device_bytes)
        assert len(set(levels)) == 1, "what goes is released"
        assert len(pipeline._words) == len(pipeline._namings) == MAX_WORDS
        assert gpu.count("capture") == 1, "the networks, once; words that always change are named behind them"
        for _ in RUNS:
            segmenter.segment(image, vocabularies[-1])
            segmenter.segment(image, vocabularies[-2])
        assert gpu.count("capture") == 3, "both are still there"
        for _ in RUNS:
            segmenter.segment(image, vocabularies[0])
            segmenter.segment(image, vocabularies[-2])
        assert gpu.count("capture") == 4, "the one that was not used lately went"
        for _ in RUNS:  # what lists are made has a graph of its own; thresholds and weights do not
            segmenter.segment(image, vocabularies[-2], SegmentOptions(explain=1))
        assert gpu.count("capture") == 5
    assert gpu.device_bytes == 0


def test_the_caption_variant_has_object_logits(tmp_path: Path, gpu: Calls) -> None:
    opened = Bundle.open(write_bundle(tmp_path / "caption", "caption"))
    write_engines(opened, verified_on=GPU)
    with on(opened, "cpu") as segmenter:
        expected = segmenter.find_masks(colour_image()).embeddings.object_logits
    with on(opened, "cuda") as segmenter:
        found = segmenter.find_masks(colour_image()).embeddings.object_logits
    assert expected is not None
    assert np.array_equal(found, expected)


def test_thresholds_and_weights_change_between_runs_of_a_graph(bundle: Bundle, gpu: Calls) -> None:
    image = colour_image(80, 120)
    rules = [
        SegmentOptions(),
        SegmentOptions(object_mask_threshold=0.95),
        SegmentOptions(overlap_threshold=0.0),
        SegmentOptions(clip_weight_seen=1.0, clip_weight_unseen=1.0),
        SegmentOptions(clip_weight_seen=0.0),
    ]
    with on(bundle, "cpu") as segmenter:
        expected = [segmenter.segment(image, WORDS, options) for options in rules]
    assert len({len(result.segments) for result in expected}) > 1, "the rules matter"
    with on(bundle, "cuda") as segmenter:
        for _ in RUNS:
            segmenter.segment(image, WORDS)
            proposals = segmenter.find_masks(image)
            segmenter.name_masks(proposals, WORDS)
        before = len(gpu.log)
        for options, picture in zip(rules, expected, strict=True):
            assert_same(segmenter.segment(image, WORDS, options), picture)
            assert_same(segmenter.name_masks(proposals, WORDS, options), picture)
        assert [entry for entry in gpu.log[before:] if entry.startswith(ALLOCATIONS)] == []


SMALL = 8 + 3 * 6 * 4 + 5 * 6 * 4 + 6 * 5 * 4 + 6 * 5 * 3 * 4
"""Bytes: numbers of segments and of broken masks; query, class and score of each; boxes and areas; five best classes of
each mask."""


def test_only_the_result_crosses_back(bundle: Bundle, gpu: Calls) -> None:
    image, options = colour_image(80, 150), SegmentOptions(short_edge=80)
    with on(bundle, "cuda") as segmenter:
        pipeline = segmenter._pipeline
        assert pipeline is not None
        for _ in range(2):
            segmenter.segment(image, WORDS, options)
        (naming,) = pipeline._namings.values()
        copied = {array.nbytes for array, _ in naming._to_host}
        before = len(gpu.log)
        segmenter.segment(image, WORDS, options)
        after = gpu.log[before:]
    # The pixels go in; everything else is inside the graph, and ends with the segment map and a few hundred bytes.
    assert after == [f"copy {80 * 150 * 3}", "launch"]
    (small,) = copied - {80 * 150 * 4}
    assert SMALL <= small <= SMALL + 7 * 16


def test_named_later_only_the_embeddings_go_there(bundle: Bundle, gpu: Calls) -> None:
    image, options = colour_image(80, 150), SegmentOptions(short_edge=80)
    with on(bundle, "cuda") as segmenter:
        proposals = segmenter.find_masks(image, options)
        segmenter.name_masks(proposals, WORDS, options)
        before = len(gpu.log)
        segmenter.name_masks(proposals, WORDS, options)
        after = gpu.log[before:]
    assert [entry for entry in after if entry.startswith(ALLOCATIONS)] == []
    copies = [int(entry.split()[1]) for entry in after if entry.startswith("copy")]
    assert copies[:2] == [6 * 5 * 4, 6 * 8 * 4]
    assert len(copies) == 5, "and the rules; the segment map and the small results come back"
    assert copies.count(80 * 150 * 4) == 1
    assert [entry.split("odise_")[1] for entry in after if entry.startswith("kernel")] == [
        "name_cosines", "name_cosines", "name_classes", "merge_prepare", "merge_f32", "name_choose", "name_paint",
    ]  # fmt: skip


def test_sizes_are_kept_within_a_bound_and_nothing_is_left(bundle: Bundle, gpu: Calls) -> None:
    with on(bundle, "cuda") as segmenter:
        pipeline = segmenter._pipeline
        assert pipeline is not None
        for long_edge in (32, 64, 96, 128, 160, 192, 32, 64):
            segmenter.segment(colour_image(32, long_edge), WORDS, SegmentOptions(short_edge=32))
        assert len(pipeline._canvases) == MAX_SHAPES
        assert {plan.canvas for plan in pipeline._plans.values()} == set(pipeline._canvases.values())
        for side in range(40, 40 + MAX_SIZES + 3):
            segmenter.segment(colour_image(side, 64), WORDS, SegmentOptions(short_edge=32))
        assert len(pipeline._plans) == len(pipeline._namings) == MAX_SIZES
        held = segmenter.find_masks(colour_image())
    assert gpu.device_bytes == 0
    with pytest.raises(BackendError, match="the segmenter is closed"):
        held.masks.array()
    pipeline.close()
    with pytest.raises(BackendError, match="closed"):
        segmenter.find_masks(colour_image())


def test_images_of_many_sizes_share_engines_and_buffers(bundle: Bundle, gpu: Calls) -> None:
    """As photographs of a folder do, which differ by a few lines."""
    images = [colour_image(height, 64) for height in (61, 62, 63, 64)]
    options = SegmentOptions(short_edge=61)
    with on(bundle, "cpu") as segmenter:
        expected = [segmenter.segment(image, WORDS, options) for image in images]
    with on(bundle, "cuda") as segmenter:
        pipeline = segmenter._pipeline
        assert pipeline is not None
        contexts = []
        for _ in RUNS:
            for image, picture in zip(images, expected, strict=True):
                assert_same(segmenter.segment(image, WORDS, options), picture)
                contexts.append(gpu.count("context"))
        assert (len(pipeline._canvases), len(pipeline._plans)) == (1, len(images))
        assert contexts[:4] == [4, 5, 6, 7], "clip_mask alone wants to know the size without padding"
        assert contexts[-1] == 7


def test_a_size_or_words_that_come_once_are_not_captured(bundle: Bundle, gpu: Calls) -> None:
    vocabularies, options = (WORDS, "sky; red", "green"), SegmentOptions(short_edge=60)
    captures = []
    with on(bundle, "cuda") as segmenter:
        for words in vocabularies:
            segmenter.prepare(words)
        before = gpu.count("capture")
        for words in vocabularies:
            executed = gpu.count("execute")
            for height in (61, 62):
                segmenter.segment(colour_image(height, 64), words, options)
            captures.append(gpu.count("capture") - before)
    assert captures == [0, 2, 2], "the networks of both sizes, when they came again with other words"
    assert gpu.count("execute") == executed, "and from then on their graphs"


def test_pinned_memory_is_lent_again(bundle: Bundle, gpu: Calls) -> None:
    """Words that change from image to image need no new one."""
    with on(bundle, "cuda") as segmenter:
        vocabularies = ["red; green", "blue; sky", "white; car", "crimson; red"]
        for words in vocabularies:
            segmenter.segment(colour_image(), words)
        before = gpu.log.copy()
        for words in vocabularies:
            segmenter.segment(colour_image(), words)
        assert [entry for entry in gpu.log[len(before) :] if entry.startswith("pin")] == []


def test_masks_outlive_the_next_image_and_their_buffers_come_back(bundle: Bundle, gpu: Calls) -> None:
    first = colour_image()
    second = np.ascontiguousarray(first[:, ::-1])
    with on(bundle, "cpu") as segmenter:
        expected = segmenter.find_masks(first).mask_logits
    with on(bundle, "cuda") as segmenter:
        held = segmenter.find_masks(first)
        segmenter.find_masks(second)
        assert np.array_equal(held.mask_logits, expected)
        del held
        gc.collect()
        level = gpu.device_bytes
        for _ in range(5):
            segmenter.find_masks(first)
            gc.collect()
        assert gpu.device_bytes == level
        many = [segmenter.find_masks(first) for _ in range(9)]
        del many
        gc.collect()
        segmenter.find_masks(first)
        gc.collect()
        assert segmenter._pipeline is not None
        assert len(segmenter._pipeline._spare) == MAX_SPARE + 1, "the last image's own, too"


def test_an_image_on_the_gpu_is_read_there(bundle: Bundle, gpu: Calls) -> None:
    image = colour_image(80, 120)
    with on(bundle, "cuda") as segmenter:
        expected = segmenter.segment(image, WORDS)
        found = segmenter.segment(OnGpu(image), WORDS)
        assert np.array_equal(found.segment_map, expected.segment_map)
        for broken, message in [
            (OnGpu(image.astype(np.float32)), r"float32 \(80, 120, 3\): expected uint8"),
            (OnGpu(image[:, :, 0].copy()), "expected uint8"),
            (OnGpu(np.zeros((0, 4, 3), np.uint8)), "expected uint8"),
        ]:
            with pytest.raises(ImageError, match=message):
                segmenter.segment(broken, WORDS)
        with pytest.raises(BackendError, match="C-contiguous"):
            segmenter.segment(OnGpu(image, strides=(720, 6, 1)), WORDS)
        with pytest.raises(ImageTooLargeError, match="120 x 80"):
            segmenter.segment(OnGpu(image), WORDS, SegmentOptions(max_pixels=1000))
        with pytest.raises(ImageTooLargeError, match=r"65536 x 1 pixels, at most 65,535 .* along an edge"):
            segmenter.segment(OnGpu(np.zeros((1, 65_536, 3), np.uint8)), WORDS)
    with on(bundle, "cpu") as segmenter, pytest.raises(ImageError, match="passes images through host memory"):
        segmenter.segment(OnGpu(image), WORDS)


def test_semantic_and_instances_read_the_masks_once(bundle: Bundle, gpu: Calls) -> None:
    options = SegmentOptions(outputs=("semantic", "instance"))
    with on(bundle, "cpu") as segmenter:
        expected = segmenter.segment(colour_image(), WORDS, options)
    with on(bundle, "cuda") as segmenter:
        found = segmenter.segment(colour_image(), WORDS, options)
        assert sum(entry == f"copy {6 * 16 * 24 * 4}" for entry in gpu.log) == 2, "kept once, read once"
    assert np.array_equal(found.semantic_map, expected.semantic_map)
    assert found.instances
    assert expected.instances
    assert [(i.label, i.area) for i in found.instances] == [(i.label, i.area) for i in expected.instances]
    assert [i.score for i in found.instances] == pytest.approx([i.score for i in expected.instances], rel=1e-5)


def test_fewer_windows_at_a_time_when_the_gpu_is_full(bundle: Bundle, gpu: Calls) -> None:
    image, options = colour_image(64, 256), SegmentOptions(short_edge=64, long_edge=256)
    with on(bundle, "cuda") as segmenter:
        whole = segmenter.segment(image, WORDS, options)
        needed = gpu.device_bytes
    assert (whole.facts.windows_per_batch, whole.facts.notes) == (4, ())
    gpu.limit = needed - 1_000_000  # scratch memory is what the windows of a batch cost
    with on(bundle, "cuda") as segmenter:
        fewer = segmenter.segment(image, WORDS, options)
        assert fewer.facts.windows_per_batch == 2
        assert fewer.facts.notes == ("out of memory with 4 windows at a time: ran 2 at a time",)
        with pytest.raises(BackendError, match="out of memory"):
            segmenter.segment(image, WORDS, SegmentOptions(short_edge=64, long_edge=256, windows_per_batch=4))
        tried = gpu.count("context")
        for _ in RUNS:
            again = segmenter.segment(image, WORDS, options)
            assert np.array_equal(again.segment_map, fewer.segment_map)
            assert again.facts.notes == fewer.facts.notes
        assert gpu.count("context") <= tried + 6, "two batches of two networks, and two more: four are not tried again"
    assert np.array_equal(fewer.segment_map, whole.segment_map)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("output", ["mask_embedding", "mask_clip_embedding"])
def test_embeddings_that_are_not_numbers_are_one_error(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch, device: str, output: str
) -> None:
    def spoil(name: str, array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if name == output:
            array[0, 2, 1] = np.nan
        return array

    with on(bundle, device) as segmenter:
        segmenter.segment(colour_image(), WORDS)
        if device == "cuda":
            gpu.corrupt = spoil
        else:
            run = ort.OrtStage.run
            monkeypatch.setattr(
                ort.OrtStage, "run", lambda self, inputs: {n: spoil(n, a) for n, a in run(self, inputs).items()}
            )
        for call in (lambda: segmenter.segment(colour_image(), WORDS), lambda: segmenter.find_masks(colour_image())):
            with pytest.raises(BackendError, match=r"gave 1 of 6 masks embeddings that are NaN or infinite.*fp32"):
                call()


def test_other_sizes_are_forgotten_before_an_image_is_refused(
    bundle: Bundle, gpu: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "odise_rt")
    options = SegmentOptions(windows_per_batch=1)
    with on(bundle, "cuda") as segmenter:
        segmenter.segment(colour_image(64, 128), WORDS, options)
        alone = gpu.device_bytes
    with on(bundle, "cuda") as segmenter:
        segmenter.segment(colour_image(64, 64), WORDS)
        gpu.limit = alone + 10_000
        segmenter.segment(colour_image(64, 128), WORDS, options)
    assert "forgetting 2 other sizes of images and results" in caplog.text
    if fake_driver.why_not() is None:
        assert gpu.count("trim") > 0, "what the pool keeps, engines cannot have"


def test_threads_take_turns(bundle: Bundle, gpu: Calls) -> None:
    images = [np.roll(colour_image(64, 64 + 16 * (i % 3)), i, axis=1) for i in range(12)]
    with on(bundle, "cpu") as segmenter:
        expected = [segmenter.segment(image, WORDS).segment_map for image in images]
    found: dict[int, np.ndarray] = {}
    with on(bundle, "cuda") as segmenter:

        def work(offset: int) -> None:
            for index in range(offset, len(images), 3):
                found[index] = segmenter.segment(images[index], WORDS).segment_map

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((found[i] != expected[i]).mean() < 2e-3 for i in range(len(images)))


def test_a_failed_first_run_is_done_again(bundle: Bundle, gpu: Calls) -> None:
    def fail(name: str, array: np.ndarray) -> np.ndarray:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    with on(bundle, "cuda") as segmenter:
        segmenter.prepare(WORDS)
        right, gpu.corrupt = gpu.corrupt, fail
        with pytest.raises(BackendError, match="segmenting an image: CUDA_ERROR_ILLEGAL_ADDRESS"):
            segmenter.segment(colour_image(), WORDS)
        gpu.corrupt = right
        assert segmenter.segment(colour_image(), WORDS).segments


@pytest.mark.parametrize(
    ("changes", "folder", "reason"),
    [
        ({}, "/not/built", "the CUDA kernels are not built"),
        ({"low_memory": True}, None, None),
        ({"stay_on_gpu": False}, None, None),
        ({"window_batching": WindowBatching()}, None, None),
    ],
)
def test_where_the_pipeline_cannot_be_images_pass_through_host_memory(
    bundle: Bundle,
    gpu: Calls,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    folder: str | None,
    reason: str | None,
) -> None:
    caplog.set_level(logging.WARNING, "odise_rt")
    if folder is not None:
        monkeypatch.setenv(FOLDER_VARIABLE, folder)
    with on(bundle, "cuda", **changes) as segmenter:
        assert isinstance(segmenter.find_masks(colour_image()).masks, HostMasks)
        with pytest.raises(ImageError, match=r"passes images through host memory \(cuda\)"):
            segmenter.find_masks(OnGpu(colour_image()))
    assert reason is None or f"images pass through host memory between stages: {reason}" in caplog.text


@pytest.fixture
def ort_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ONNX Runtime's CPU provider in the place of CUDA's, with its arrays where the stand-in's GPU has them."""
    monkeypatch.setitem(ort.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(ort, "_ARRAYS_ON_GPU", "cpu")
    monkeypatch.setattr(ort.OrtBackend, "_providers", lambda self, channels_last: ["CPUExecutionProvider"])
    ort.working_provider.cache_clear()
    yield
    ort.working_provider.cache_clear()


@pytest.mark.usefixtures("ort_on_gpu")
@pytest.mark.parametrize("engines", [(), ("unet_tap",), ("mask_decoder", "clip_mask")])
@pytest.mark.parametrize(("size", "options"), CASES[2:6])
def test_onnxruntime_on_the_same_stream(
    new_bundle: Callable[[], Path], gpu: Calls, engines: tuple[str, ...], size: tuple[int, int], options: SegmentOptions
) -> None:
    opened = Bundle.open(new_bundle())
    for stage in engines:
        write_engine(opened, stage, verified_on=GPU)
    image = colour_image(*size)
    with on(opened, "cpu") as segmenter:
        expected = segmenter.find_masks(image, options)
    with on(opened, "cuda") as segmenter:
        for _ in range(3):
            found = segmenter.find_masks(image, options)
            assert isinstance(found.masks, DeviceMasks)
            assert np.array_equal(found.mask_logits, expected.mask_logits)
            assert np.array_equal(found.embeddings.clip, expected.embeddings.clip)
        assert segmenter.segment(image, WORDS, options).segments
        assert gpu.count("capture") == 0, "ONNX Runtime allocates while it runs"
    assert gpu.device_bytes == 0
    assert gpu.count("close stream") == 1


@pytest.mark.usefixtures("ort_on_gpu")
def test_onnxruntime_waits_until_others_are_done_with_the_stream(new_bundle: Callable[[], Path], gpu: Calls) -> None:
    """What it puts there while another thread captures would be part of that graph."""
    opened = Bundle.open(new_bundle())
    spec = opened.stages["clip_image"].spec
    with CudaSession() as session:
        session.retain()
        stage = OrtBackend("cuda", 1, gpu_session=session).load(opened, "clip_image")
        done = threading.Event()
        thread = threading.Thread(target=lambda: (stage.run(example(spec)), done.set()))
        with session.use("capturing"):
            thread.start()
            assert not done.wait(0.3)
        thread.join()
        assert done.is_set()
        stage.close()


@pytest.mark.usefixtures("ort_on_gpu")
def test_onnxruntime_without_cuda_core_keeps_images_on_the_host(
    new_bundle: Callable[[], Path], gpu: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "odise_rt")
    opened = Bundle.open(new_bundle())
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with on(opened, "cuda") as segmenter:
        assert isinstance(segmenter.find_masks(colour_image()).masks, HostMasks)
    assert "between stages: running engines on a GPU needs cuda-core" in caplog.text


@pytest.mark.usefixtures("ort_on_gpu")
def test_a_stage_of_onnxruntime_holds_the_session_and_refuses_what_does_not_fit(
    new_bundle: Callable[[], Path], gpu: Calls
) -> None:
    opened = Bundle.open(new_bundle())
    with CudaSession() as session:
        session.retain()
        stage = OrtBackend("cuda", 1, gpu_session=session).load(opened, "clip_image")
        session.release()
        assert not session.is_closed
        with pytest.raises(BackendError, match=r"input windows is float32 \(1, 3, 64\)"):
            stage.bind({"windows": np.zeros((1, 3, 64), np.float32)})
        bound = stage.bind({"windows": np.zeros((1, 3, 64, 64), np.float32)})
        with pytest.raises(BackendError, match="stage clip_image failed on"):
            bound.enqueue()  # nothing was placed
        stage.close()
        stage.close()
        assert session.is_closed
        with pytest.raises(BackendError, match="stage clip_image is closed"):
            stage.bind({})
        with pytest.raises(BackendError, match="the GPU was released before stage clip_image was loaded"):
            OrtBackend("cuda", 1, gpu_session=session).load(opened, "clip_image")
