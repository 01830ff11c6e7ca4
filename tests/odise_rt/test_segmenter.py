"""End to end on the colour bundle: what goes in, what comes out, and what is recorded."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt import (
    BackendError,
    BundleError,
    ImageError,
    InputError,
    OptionsError,
    OutOfMemoryError,
    PanopticResult,
    Segmenter,
    SegmentOptions,
    Vocabulary,
    VocabularyError,
)
from odise_rt.backends.pool import StagePool
from tests.odise_rt.fake_bundle import colour_image

WORDS = "red, crimson; green; blue; white; stuff: sky"


def labels(result: PanopticResult) -> set[str]:
    return {s.label for s in result.segments}


@pytest.mark.parametrize("variant", ["label", "caption"])
def test_every_colour_becomes_a_named_segment(variant: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(f"{variant}_bundle")
    image = colour_image()
    with Segmenter.load(bundle, device="cpu", threads=1) as segmenter:
        result = segmenter.segment(image, WORDS)
    assert labels(result) == {"red", "green", "blue", "white"}
    assert result.segment_map.shape == image.shape[:2]
    assert result.segment_map.dtype == np.int32
    # Pixels well inside an area carry its name.
    by_id = {s.id: s.label for s in result.segments}
    for y, x, name in [(60, 4, "red"), (30, 48, "green"), (30, 85, "blue"), (24, 16, "white")]:
        assert by_id[int(result.segment_map[y, x])] == name
    for segment in result.segments:
        mask = result.mask(segment)
        left, top, right, bottom = segment.box
        assert segment.area == mask.sum()
        assert mask[top:bottom, left:right].sum() == segment.area
        assert segment.score > 0.5
        assert segment.isthing


def test_words_that_are_not_there_are_not_found(segmenter: Segmenter, colours: np.ndarray) -> None:
    colours[:] = (0, 0, 255)
    assert labels(segmenter.segment(colours, WORDS)) == {"blue"}


def test_result_has_the_size_of_the_image_whatever_the_network_sees(segmenter: Segmenter) -> None:
    for height, width in [(31, 47), (64, 64), (200, 77), (64, 500), (1, 1), (3, 900)]:
        result = segmenter.segment(colour_image(max(height, 8), max(width, 8))[:height, :width], WORDS)
        assert result.segment_map.shape == (height, width)


def test_many_windows_agree_with_few_at_a_time(segmenter: Segmenter) -> None:
    image = colour_image(150, 400)
    whole = segmenter.segment(image, WORDS, SegmentOptions(short_edge=150, long_edge=400))
    one = segmenter.segment(image, WORDS, SegmentOptions(short_edge=150, long_edge=400, windows_per_batch=1))
    assert whole.facts.windows == 3 * 7
    assert np.array_equal(whole.segment_map, one.segment_map)
    assert whole.segments == one.segments


def test_a_list_gives_a_list_and_every_kind_of_image_agrees(
    segmenter: Segmenter, colours: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    picture = Image.fromarray(colours)
    picture.save(path)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    images = [colours, picture, path, str(path), encoded.getvalue(), io.BytesIO(encoded.getvalue())]
    results = segmenter.segment(images, WORDS)
    assert len(results) == len(images)
    for result in results[1:]:
        assert np.array_equal(result.segment_map, results[0].segment_map)
        assert result.segments == results[0].segments
    assert segmenter.segment([], WORDS) == []
    assert [r.segments for r in segmenter.segment((colours, picture), WORDS)] == [results[0].segments] * 2


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_segmenter_cannot_be_sent_elsewhere(segmenter: Segmenter, send: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=r"call Segmenter.load in each process"):
        send(segmenter)


def test_window_batching_of_another_kind_is_refused(label_bundle: Path) -> None:
    with pytest.raises(OptionsError, match="window_batching is 3: expected a WindowBatching"):
        Segmenter.load(label_bundle, "cpu", window_batching=3)  # type: ignore[arg-type]


def test_words_and_options_are_checked_before_the_first_image_of_many(
    segmenter: Segmenter, colours: np.ndarray
) -> None:
    with pytest.raises(VocabularyError, match="empty"):
        segmenter.segment_many([colours], " ; ")
    with pytest.raises(VocabularyError, match="a class 'unknown'"):
        segmenter.segment_many([colours], "unknown", SegmentOptions(unknown=0.5))
    with pytest.raises(OptionsError, match="SegmentOptions"):
        segmenter.segment_many([colours], WORDS, {"explain": 0})  # type: ignore[arg-type]
    for single in (colours, "photo.jpg", Path("photo.jpg"), b"bytes", Image.fromarray(colours), io.BytesIO(), None, 3):
        with pytest.raises(InputError, match=f"came as {type(single).__name__}: expected a list"):
            segmenter.segment_many(single, WORDS)  # type: ignore[arg-type]
    asked = iter([colours] * 3)
    found = segmenter.segment_many(asked, WORDS)
    assert labels(next(found)) == {"red", "green", "blue", "white"}
    assert len(list(asked)) == 2, "one image at a time"


def test_masks_are_found_once_and_named_often(segmenter: Segmenter, colours: np.ndarray) -> None:
    masks = segmenter.find_masks(colours)
    for words in ("red", "green; blue", WORDS):
        ours = segmenter.name_masks(masks, words)
        whole = segmenter.segment(colours, words)
        assert np.array_equal(ours.segment_map, whole.segment_map)
        assert ours.segments == whole.segments


def test_two_threads_agree_with_one(segmenter: Segmenter) -> None:
    images = [colour_image(40 + 3 * i, 90 + 7 * i) for i in range(6)]
    vocabularies = [WORDS, "red; blue", "green; white; car", "crimson; sky"]
    jobs = [(image, words) for image in images for words in vocabularies]
    alone = [segmenter.segment(image, words).segment_map for image, words in jobs]
    shared: dict[int, np.ndarray] = {}
    failures: list[BaseException] = []

    def work(indices: range) -> None:
        try:
            for i in indices:
                shared[i] = segmenter.segment(*jobs[i]).segment_map
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(range(start, len(jobs), 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(np.array_equal(shared[i], alone[i]) for i in range(len(jobs)))


def test_a_call_changes_nothing_the_caller_gave(segmenter: Segmenter, colours: np.ndarray) -> None:
    before = colours.copy()
    colours.setflags(write=False)
    segmenter.segment(colours, WORDS, SegmentOptions(outputs=("semantic", "instance")))
    assert np.array_equal(before, colours)


def test_semantic_and_instances_come_when_asked_for(segmenter: Segmenter, colours: np.ndarray) -> None:
    plain = segmenter.segment(colours, WORDS)
    assert plain.semantic_map is None
    assert plain.instances is None
    result = segmenter.segment(colours, WORDS, SegmentOptions(outputs=("semantic", "instance")))
    assert result.semantic_map is not None
    assert result.instances is not None
    names = result.vocabulary.names
    assert [names[result.semantic_map[y, x]] for y, x in [(60, 4), (30, 48), (30, 85), (24, 16)]] == [
        "red",
        "green",
        "blue",
        "white",
    ]
    assert [i.score for i in result.instances] == sorted((i.score for i in result.instances), reverse=True)
    best = {i.label: i for i in reversed(result.instances)}
    assert "sky" not in best, "stuff classes are no instances"
    red = best["red"]
    assert red.mask.sum() == red.area
    assert red.mask[60, 4]
    assert not red.mask[24, 16]


def test_seen_and_unseen_classes_get_their_own_weight(segmenter: Segmenter, colours: np.ndarray) -> None:
    """ "red" was seen in training and "blue" was not: each answers to its own weight only."""
    masks = segmenter.find_masks(colours)

    def scores(seen: float, unseen: float) -> dict[str, float]:
        options = SegmentOptions(clip_weight_seen=seen, clip_weight_unseen=unseen)
        return {s.label: s.score for s in segmenter.name_masks(masks, "red; blue", options).segments}

    base = scores(0.5, 0.5)
    assert scores(0.5, 0.9)["red"] != pytest.approx(scores(0.9, 0.5)["red"], abs=1e-6)
    assert segmenter.segment(colours, "red; blue").facts.seen_classes == 1
    assert base.keys() == {"red", "blue"}


def test_thresholds_do_what_they_say(segmenter: Segmenter, colours: np.ndarray) -> None:
    masks = segmenter.find_masks(colours)
    assert not segmenter.name_masks(masks, WORDS, SegmentOptions(object_mask_threshold=1.0)).segments
    strict = segmenter.name_masks(masks, WORDS, SegmentOptions(overlap_threshold=1.0))
    loose = segmenter.name_masks(masks, WORDS, SegmentOptions(overlap_threshold=0.0))
    assert len(strict.segments) <= len(loose.segments)


def test_facts_say_what_ran_on_what(segmenter: Segmenter, colours: np.ndarray) -> None:
    facts = segmenter.segment(colours, WORDS).facts
    assert facts.device == "cpu"
    assert {s.stage for s in facts.stages} == {"clip_image", "unet_tap", "mask_decoder", "clip_mask", "clip_text"}
    assert {s.provider for s in facts.stages} == {"CPUExecutionProvider"}
    assert facts.window_side == 64
    assert facts.words == 6
    assert facts.options["overlap_threshold"] == 0.8
    steps = {"preprocess", "clip_image", "unet_tap", "stitch", "mask_decoder", "clip_mask", "words", "classify"}
    assert steps | {"panoptic", "total"} == set(facts.seconds)
    assert facts.seconds["total"] == pytest.approx(sum(v for k, v in facts.seconds.items() if k != "total"))


def test_low_memory_gives_the_same_and_keeps_nothing(
    label_bundle: Path, segmenter: Segmenter, colours: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with Segmenter.load(label_bundle, device="cpu", threads=1, low_memory=True) as low:
        with caplog.at_level(logging.INFO, logger="odise_rt"):
            first = low.segment(colours, WORDS)
            second = low.segment(colours, WORDS)
        assert np.array_equal(first.segment_map, segmenter.segment(colours, WORDS).segment_map)
        assert np.array_equal(first.segment_map, second.segment_map)
    loads = [r for r in caplog.records if "loaded in" in r.getMessage() and "unet_tap" in r.getMessage()]
    assert len(loads) == 2


def test_text_encoder_is_released_after_use(segmenter: Segmenter, colours: np.ndarray) -> None:
    segmenter.segment(colours, WORDS)
    assert segmenter._stages._slots["clip_text"].stage is None
    assert segmenter._stages._slots["unet_tap"].stage is not None


def test_closed_segmenter_says_so(label_bundle: Path, colours: np.ndarray) -> None:
    segmenter = Segmenter.load(label_bundle, device="cpu", threads=1)
    segmenter.close()
    segmenter.close()
    with pytest.raises(BackendError, match="closed"):
        segmenter.segment(colours, WORDS)


def test_a_load_that_fails_keeps_nothing(new_bundle: Callable[[], Path], open_stages: list[str]) -> None:
    root = new_bundle()
    (root / "onnx" / "mask_decoder.onnx").write_bytes(b"\x08\x09")  # a version, and no graph
    with pytest.raises(BackendError, match="mask_decoder"):
        Segmenter.load(root, device="cpu", threads=1, verify=False)
    assert open_stages == []


@pytest.mark.parametrize("file", ["tokenizer.json", "constants.npz"])
def test_small_files_are_checked_before_graphs_are_loaded(
    file: str, new_bundle: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_bundle()
    (root / file).write_bytes(b"{}")
    monkeypatch.setattr(StagePool, "load", lambda *_: pytest.fail("gigabytes were loaded first"))
    with pytest.raises(BundleError, match=file):
        Segmenter.load(root, device="cpu", threads=1, verify=False)


def test_wrong_arguments_are_named(segmenter: Segmenter, label_bundle: Path, colours: np.ndarray) -> None:
    with pytest.raises(VocabularyError, match="empty"):
        segmenter.segment(colours, " ; ,")
    with pytest.raises(VocabularyError, match="from_lists"):
        segmenter.segment(colours, ["red", "blue"])  # type: ignore[call-overload]
    with pytest.raises(OptionsError, match="SegmentOptions"):
        segmenter.segment(colours, WORDS, {"overlap_threshold": 0.5})  # type: ignore[call-overload]
    with pytest.raises(InputError, match="find_masks"):
        segmenter.name_masks(None, WORDS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="find_masks"):
        segmenter.classify_masks(colours, WORDS)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="cannot read the image"):
        segmenter.find_masks("x" * 5000)
    with pytest.raises(OptionsError, match="cache_dir"):
        Segmenter.load(label_bundle, cache_dir=3)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="auto, cpu, cuda"):
        Segmenter.load(label_bundle, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="threads"):
        Segmenter.load(label_bundle, threads=0)


@pytest.mark.parametrize("part", ["load_image", "prepare", "MaskResizer", "semantic_map", "find_instances"])
def test_lack_of_memory_on_the_host_is_typed(
    segmenter: Segmenter, colours: np.ndarray, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(f"odise_rt.segmenter.{part}", fail)
    options = SegmentOptions(outputs=("panoptic", "semantic", "instance"))
    for images in (colours, [colours]):  # one image, and a list
        with pytest.raises(OutOfMemoryError, match=r"on the host .* \(Unable to allocate 3 GiB\): free memory"):
            segmenter.segment(images, "red", options)


def test_cuda_is_refused_where_it_does_not_work(label_bundle: Path) -> None:
    from odise_rt.backends.ort import working_provider

    if working_provider("cuda") is None:
        pytest.skip("Requires: a machine without a working CUDA provider")
    with pytest.raises(BackendError, match="doctor"):
        Segmenter.load(label_bundle, device="cuda")


def test_auto_says_why_it_chose_the_cpu(
    label_bundle: Path, colours: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, logger="odise_rt"),
        Segmenter.load(label_bundle, device="auto", threads=1) as segmenter,
    ):
        device = segmenter.segment(colours, "red").facts.device
    assert device == segmenter.device
    assert "using the CPU, because" in caplog.text or device == "cuda"


@pytest.mark.parametrize("words", ["😀", "naïve café; 日本語", "x" * 900, "a, " * 2000 + "red"])
def test_unusual_words_work(segmenter: Segmenter, colours: np.ndarray, words: str) -> None:
    result = segmenter.segment(colours, Vocabulary.parse(words))
    assert result.segment_map.shape == colours.shape[:2]


def test_ten_thousand_words(segmenter: Segmenter, colours: np.ndarray) -> None:
    words = Vocabulary.from_lists([f"thing number {i}" for i in range(9_996)] + ["red", "green", "blue", "white"])
    assert labels(segmenter.segment(colours, words)) == {"red", "green", "blue", "white"}
