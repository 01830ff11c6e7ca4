"""The call in the manner of Hugging Face, held to the code of its own pipeline."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odise_rt import OptionsError, Segmenter, SegmentOptions, Vocabulary, VocabularyError, pipeline
from odise_rt.pipelines import SegmentationPipeline
from tests.odise_rt.fake_bundle import colour_image

WORDS = "red; green; stuff: blue; white"


@pytest.fixture
def segment(label_bundle: Path) -> Iterator[SegmentationPipeline]:
    with pipeline("open-vocabulary-segmentation", bundle=label_bundle, device="cpu", threads=1) as loaded:
        yield loaded


class OnGpu:
    """An array of a GPU that can be iterated over, as torch's and CuPy's can."""

    def __init__(self, array: np.ndarray) -> None:
        pointer = (array.ctypes.data, False)
        self.__cuda_array_interface__ = {"shape": array.shape, "typestr": "|u1", "data": pointer, "version": 3}

    def __iter__(self) -> Iterator[np.ndarray]:
        pytest.fail("the rows of one image are no images")


def test_one_image_on_a_gpu(
    segment: SegmentationPipeline, colours: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, image = [], OnGpu(colours)
    monkeypatch.setattr(
        segment.segmenter,
        "segment",
        lambda image, *_, real=segment.segmenter.segment: given.append(image) or real(colours, *_),
    )
    assert isinstance(segment(image, WORDS), list)
    assert given == [image]


def test_words_are_read_before_the_bundle_is_loaded(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmenter, "load", lambda *_, **__: pytest.fail("gigabytes were loaded first"))
    with pytest.raises(VocabularyError, match="empty"):
        pipeline("image-segmentation", bundle=label_bundle, words=" ; ")


def test_one_image(segment: SegmentationPipeline, segmenter: Segmenter, colours: np.ndarray) -> None:
    found = segment(colours, WORDS)
    expected = segmenter.segment(colours, WORDS)
    assert [f["label"] for f in found] == [s.label for s in expected.segments]
    for entry, s in zip(found, expected.segments, strict=True):
        assert entry["score"] == s.score
        assert isinstance(entry["mask"], Image.Image)
        assert (entry["mask"].mode, entry["mask"].size) == ("L", (96, 64))
        assert np.array_equal(np.asarray(entry["mask"]) == 255, expected.mask(s))


def test_entries_are_those_of_transformers() -> None:
    """The keys that its own pipeline makes, read from its source: importing it needs PyTorch and seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("Requires: the package transformers")
    source = Path(spec.origin).parent / "pipelines/image_segmentation.py"
    appended = [
        {key.value for key in node.args[0].keys if isinstance(key, ast.Constant)}
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "append"
        and node.args
        and isinstance(node.args[0], ast.Dict)
    ]
    assert appended
    assert all(keys == {"score", "label", "mask"} for keys in appended)


def test_batches_and_generators(segment: SegmentationPipeline, tmp_path: Path) -> None:
    images = [colour_image(40 + i, 90) for i in range(3)]
    batch = segment(images, WORDS)
    assert [entries[0]["mask"].size for entries in batch] == [(90, 40), (90, 41), (90, 42)]
    drawn: list[int] = []

    def images_one_by_one() -> Iterator[np.ndarray]:
        for number, image in enumerate(images):
            drawn.append(number)
            yield image

    lazy = segment(images_one_by_one(), WORDS)
    assert drawn == []
    first = next(lazy)
    assert drawn == [0]
    assert [e["label"] for e in first] == [e["label"] for e in batch[0]]
    assert len(list(lazy)) == 2
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    for single in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert [e["label"] for e in segment(single, WORDS)] == [e["label"] for e in batch[0]]
    with Image.open(tmp_path / "a.png") as picture:
        assert len(segment(picture, WORDS)) == len(batch[0])
    assert segment([], WORDS) == []


def test_subtasks(segment: SegmentationPipeline, colours: np.ndarray) -> None:
    semantic = segment(colours, WORDS, subtask="semantic")
    assert {e["label"] for e in semantic} == {"red", "green", "blue", "white"}
    assert all(e["score"] is None for e in semantic)
    assert sum((np.asarray(e["mask"]) == 255).astype(int) for e in semantic).min() == 1, "each pixel has one class"
    instances = segment(colours, WORDS, subtask="instance")
    assert "blue" not in {e["label"] for e in instances}
    assert all(0 <= e["score"] <= 1 for e in instances)


def test_words_and_options(label_bundle: Path, colours: np.ndarray) -> None:
    with pipeline("image-segmentation", model=label_bundle, words="red; green", device="cpu", threads=1) as segment:
        assert {e["label"] for e in segment(colours)} == {"red", "green"}
        assert {e["label"] for e in segment(colours, Vocabulary.parse("blue"))} == {"blue"}
        assert {e["label"] for e in segment(colours, unknown=1.0)} == {"unknown"}
        assert segment(colours, threshold=1.0) == []
        loose = segment(colours, options=SegmentOptions(overlap_threshold=1.0), overlap_mask_area_threshold=0.0)
        assert len(loose) == len(segment(colours, overlap_mask_area_threshold=0.0))


def test_wrong_calls_are_named(label_bundle: Path, segment: SegmentationPipeline, colours: np.ndarray) -> None:
    with pytest.raises(OptionsError, match="open-vocabulary-segmentation"):
        pipeline("image-classification", bundle=label_bundle)
    with pytest.raises(OptionsError, match="no bundle"):
        pipeline("image-segmentation")
    with pytest.raises(OptionsError, match="no words"):
        segment(colours)
    with pytest.raises(OptionsError, match="subtask"):
        segment(colours, WORDS, subtask="depth")  # type: ignore[arg-type]
    with pytest.raises(VocabularyError):
        segment(colours, " ; ")
