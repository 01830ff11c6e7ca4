"""Results in the formats that other tools read, checked with those tools where there are any."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from odise_rt import ImageError, OptionsError, PanopticResult, Segmenter, SegmentOptions, Vocabulary, rle
from odise_rt.files import atomic_writer, write_json
from odise_rt.results import Instance, category_ids, coco_categories

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@pytest.fixture
def result(segmenter: Segmenter, colours: np.ndarray) -> PanopticResult:
    options = SegmentOptions(outputs=("semantic", "instance"))
    return segmenter.segment(colours, "red; green; stuff: blue; white", options)


# ---- run-length encoding ---------------------------------------------------------------------------------------------


@given(MASKS)
def test_rle_is_that_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = rle.encode(mask)
    assert ours == {"size": list(mask.shape), "counts": theirs["counts"].decode()}


@given(MASKS)
def test_rle_and_back(mask: np.ndarray) -> None:
    assert np.array_equal(rle.decode(rle.encode(mask)), mask)
    runs = rle.run_lengths(mask)
    assert runs.sum() == mask.size
    assert np.array_equal(rle.decode({"size": mask.shape, "counts": runs.tolist()}), mask)


@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 3)))
def test_rle_of_labels_is_that_of_their_masks(labels: np.ndarray) -> None:
    assert list(rle.encode_labels(labels, range(5))) == [rle.encode(labels == value) for value in range(5)]


def test_rle_of_large_runs_is_that_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((3000, 2000), bool)
    mask[5:2900, 3:1999] = True
    mask[100] = False
    assert rle.encode(mask)["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert rle.encode(np.zeros((0, 5), bool)) == {"size": [0, 5], "counts": "0"}


def test_rle_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 x 4"):
        rle.decode({"size": [3, 4], "counts": [5, 2]})


# ---- the result ------------------------------------------------------------------------------------------------------


def test_dict_is_json_and_complete(result: PanopticResult) -> None:
    plain = result.to_dict(rle_masks=True, explain=True)
    data = json.loads(json.dumps(plain))
    assert data == plain, "it has lists where JSON has them"
    fields = {"id", "label", "class_index", "score", "area", "box", "isthing", "unknown", "candidates", "rle"}
    assert all(entry.keys() == fields for entry in data["segments"])
    assert (data["height"], data["width"]) == result.size
    assert [s["label"] for s in data["segments"]] == [s.label for s in result.segments]
    for segment, entry in zip(result.segments, data["segments"], strict=True):
        assert np.array_equal(rle.decode(entry["rle"]), result.mask(segment))
    assert result.instances is not None
    for instance, entry in zip(result.instances, data["instances"], strict=True):
        assert np.array_equal(rle.decode(entry["rle"]), instance.mask)
    assert result.semantic_map is not None
    assert sum(entry["area"] for entry in data["semantic"]) == result.semantic_map.size
    for entry in data["semantic"]:
        assert np.array_equal(rle.decode(entry["rle"]), result.semantic_map == entry["class_index"])
        assert entry["label"] == result.vocabulary[entry["class_index"]].name
    assert data["facts"]["device"] == "cpu"
    alone = PanopticResult(result.segment_map, result.segments, result.vocabulary, result.facts).to_dict()
    assert set(alone) == {"height", "width", "segments", "facts"}


def test_mask_of_an_instance_by_hand() -> None:
    bits = np.packbits(np.array([[1, 0], [1, 1], [0, 1]], bool))
    instance = Instance("cat", 0, 0.9, 4, (2, 1, 4, 4), (4, 5), bits)
    assert instance.mask.astype(int).tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]


def test_dict_without_masks_has_none(result: PanopticResult) -> None:
    data = result.to_dict()
    assert all("rle" not in entry for key in ("segments", "instances", "semantic") for entry in data[key])
    assert data["segments"] == [segment.to_dict() for segment in result.segments], "without candidates, too"


def test_png_holds_the_ids(result: PanopticResult, tmp_path: Path) -> None:
    (tmp_path / "map.png").write_bytes(b"of an earlier run")
    result.save_png(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "RGB"
        coded = np.asarray(image).astype(int)
    assert np.array_equal(coded[..., 0] + 256 * coded[..., 1] + 65536 * coded[..., 2], result.segment_map)


def test_png_holds_ids_beyond_a_byte(result: PanopticResult) -> None:
    big = PanopticResult(np.array([[0, 255, 256, 70_000]], np.int32), (), result.vocabulary, result.facts)
    assert np.asarray(big.to_png())[0].tolist() == [[0, 0, 0], [255, 0, 0], [0, 1, 0], [112, 17, 1]]


@pytest.mark.parametrize("kind", ["<i4", ">i4", "<i8", "u1"])
def test_id_png_of_any_map_needs_little_memory(kind: str) -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 24, (500, 800)).astype(kind)
    for segment_map in (ids, ids[:, ::-2].T):
        values = segment_map.astype(np.int64)
        coded = np.stack([values & 255, values >> 8 & 255, values >> 16], axis=-1)
        result = PanopticResult(segment_map, (), Vocabulary.parse("red"), None)
        assert np.array_equal(np.asarray(result.to_png()), coded)
    result = PanopticResult(ids, (), Vocabulary.parse("red"), None)
    tracemalloc.start()
    try:
        result.to_png()
        assert tracemalloc.get_traced_memory()[1] < 2 * 4 * ids.size
    finally:
        tracemalloc.stop()


def test_coco_panoptic(result: PanopticResult) -> None:
    coco = result.to_coco_panoptic(image_id=7, file_name="7.png")
    annotation = coco["annotation"]
    assert (annotation["image_id"], annotation["file_name"]) == (7, "7.png")
    names = {c["id"]: c for c in coco["categories"]}
    ids = np.asarray(coco["png"]).astype(int) @ [1, 256, 65536]
    assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(ids)) - {0}
    for info, segment in zip(annotation["segments_info"], result.segments, strict=True):
        assert names[info["category_id"]]["name"] == segment.label
        assert info["category_id"] == result.category_id(segment.class_index)
        assert names[info["category_id"]]["isthing"] == info["isthing"] == int(segment.isthing)
        left, top, width, height = info["bbox"]
        assert (left, top, left + width, top + height) == segment.box
        assert info["area"] == (ids == info["id"]).sum()
        assert info["iscrowd"] == 0
    json.dumps({k: v for k, v in coco.items() if k != "png"})


def test_category_ids_are_the_data_sets_where_it_has_them() -> None:
    assert category_ids(Vocabulary.builtin("coco"))[-1:] == (200,)
    assert category_ids(Vocabulary.parse("cat; dog")) == (1, 2)
    assert category_ids(Vocabulary.parse("cat") + Vocabulary.builtin("ade20k"))[:2] == (1, 2)
    categories = json.dumps(coco_categories(Vocabulary.parse("stuff: cat")))
    assert categories == '[{"id": 1, "name": "cat", "supercategory": "cat", "isthing": 0}]', "a number, not false"


def test_huggingface_form(result: PanopticResult) -> None:
    for entry, segment in zip(result.to_huggingface(), result.segments, strict=True):
        assert set(entry) == {"score", "label", "mask"}
        assert entry["mask"].mode == "L"
        assert entry["mask"].size == (result.size[1], result.size[0])
        mask = np.asarray(entry["mask"])
        assert np.array_equal(mask == 255, result.mask(segment))
        assert set(np.unique(mask)) <= {0, 255}


def test_rle_list(result: PanopticResult) -> None:
    for entry, segment in zip(result.to_rle(), result.segments, strict=True):
        assert (entry["segment_id"], entry["label"]) == (segment.id, segment.label)
        assert np.array_equal(rle.decode(entry["segmentation"]), result.mask(segment))


@pytest.mark.parametrize("segment", [None, "1", 1.5, -1])
def test_what_is_no_segment_is_refused(result: PanopticResult, segment: Any) -> None:
    with pytest.raises(OptionsError, match="there is no segment"):
        result.mask(segment)


@pytest.mark.parametrize("index", [-1, 99, None])
def test_what_is_no_class_has_no_category(result: PanopticResult, index: Any) -> None:
    assert result.category_id(0) == 1
    with pytest.raises(OptionsError, match="there is no class"):
        result.category_id(index)


def test_unknown_segment_is_refused(result: PanopticResult) -> None:
    for identifier in (0, len(result.segments) + 1):
        with pytest.raises(OptionsError, match="there is no segment"):
            result.mask(identifier)


def test_overlay_wants_the_image_of_the_result(result: PanopticResult, colours: np.ndarray) -> None:
    for wrong in (colours[:-1], np.concatenate([colours, colours])):
        with pytest.raises(ImageError, match="pass the image that was segmented") as caught:
            result.overlay(wrong)
        assert "max_pixels" not in str(caught.value)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "none/a.png", None, 3, "nul\0l"])
def test_png_needs_a_place(result: PanopticResult, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionsError, match=r"cannot write|expected a path"):
        result.save_png(place)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionsError, match="cannot write"):
        result.save_png("pipe")
    assert (tmp_path / "pipe").is_fifo(), "not replaced by a file"


def test_colours_that_do_not_fit(result: PanopticResult, colours: np.ndarray) -> None:
    count = len(result.segments)
    white: Any = np.full((count, 3), 255)
    assert result.overlay(colours, colours=white) == result.overlay(colours, colours=[(255, 255, 255)] * count)
    dark: list[Any] = [(1, 2, 3)] * count
    for wrong in ([], dark[1:], [*dark, (1, 2, 3)], [(1, 2), *dark[1:]], [None, *dark[1:]], "red", 3):
        with pytest.raises(OptionsError, match=f"{count} segments"):
            result.overlay(colours, colours=wrong)
    for value in (-1, 256, float("nan"), "red", None):
        with pytest.raises(OptionsError, match="from 0 to 255"):
            result.overlay(colours, colours=[(value, 0, 0), *dark[1:]])


def test_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"name": "naïve"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "naïve"}

    def interrupted() -> None:
        with atomic_writer(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "naïve"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "ours", [])
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_overlay_shows_segments_labels_and_legend(result: PanopticResult, colours: np.ndarray) -> None:
    from odise_rt.visualize import MIN_LONG_EDGE, segment_colours

    bare, full = result.overlay(colours, legend=False), result.overlay(colours)
    factor = -(-MIN_LONG_EDGE // max(result.size))
    assert bare.size == (result.size[1] * factor, result.size[0] * factor)
    assert full.height == bare.height
    assert full.width > bare.width
    # Every segment's colour is in the legend, on white.
    column = np.asarray(full)[:, bare.width :].reshape(-1, 3)
    present = {tuple(c) for c in column}
    assert (255, 255, 255) in present
    assert set(segment_colours(result)) <= present
    # Inside a segment the picture is a mix of image and colour.
    pixel = np.asarray(bare)[60 * factor, 4 * factor]
    colour = segment_colours(result)[int(result.segment_map[60, 4]) - 1]
    np.testing.assert_allclose(pixel, (np.array([255, 0, 0]) + colour) / 2, atol=1)


def test_colours_are_distinct_and_stable() -> None:
    from odise_rt.visualize import class_colour

    colours = [class_colour(i) for i in range(40)]
    assert len(set(colours)) == 40
    assert class_colour(3) == class_colour(3, 0)
    assert len({class_colour(3, v) for v in range(4)}) == 4


def test_labels_lie_inside_their_segments() -> None:
    from odise_rt.visualize import label_places

    rng = np.random.default_rng(0)
    segment_map = np.zeros((300, 500), np.int32)
    segment_map[20:280, 30:200] = 1
    segment_map[50:200, 60:150] = 2  # inside the first, which becomes a frame
    segment_map[10, 300:302] = 3  # two pixels, below the grid
    segment_map[250:, 300:] = 4
    segment_map[rng.integers(0, 300, 50), rng.integers(400, 500, 50)] = 5
    for identifier, place in enumerate(label_places(segment_map, 6), 1):
        if identifier == 6:
            assert place is None
        else:
            assert place is not None
            assert segment_map[place] == identifier


@pytest.mark.parametrize("label", ["a", "a class with a very long name indeed " * 4, "😀", "日本語", "\u200d", "naïve"])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (40, 40)])
def test_any_label_and_size_can_be_drawn(result: PanopticResult, label: str, size: tuple[int, int]) -> None:
    from dataclasses import replace

    segment = replace(result.segments[0], id=1, label=label, area=size[0] * size[1])
    drawn = PanopticResult(np.ones(size, np.int32), (segment,), result.vocabulary, result.facts)
    picture = drawn.overlay(np.zeros((*size, 3), np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert picture.width > size[1]


def test_many_segments_do_not_overflow_the_legend(result: PanopticResult) -> None:
    from dataclasses import replace

    segment_map = np.arange(1, 401, dtype=np.int32).reshape(20, 20)
    segments: Any = tuple(replace(result.segments[0], id=i, area=1) for i in range(1, 401))
    picture = PanopticResult(segment_map, segments, result.vocabulary, result.facts).overlay(
        np.zeros((20, 20, 3), np.uint8)
    )
    assert picture.height == 640


def test_empty_result_can_be_drawn(result: PanopticResult, colours: np.ndarray) -> None:
    empty = PanopticResult(np.zeros_like(result.segment_map), (), result.vocabulary, result.facts)
    picture = np.asarray(empty.overlay(colours, legend=False))
    assert picture[2, 2].tolist() == colours[0, 0].tolist()
