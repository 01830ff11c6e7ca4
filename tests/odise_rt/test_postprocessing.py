"""The fast merges against the slow and obvious ones, and what must hold for any masks."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odise_rt import postprocessing
from odise_rt.postprocessing import (
    BLOCK,
    MaskResizer,
    boxes_and_areas,
    find_instances,
    merge_panoptic,
    semantic_map,
    sigmoid,
)
from tests.odise_rt import reference_merge


@dataclass
class Case:
    logits: np.ndarray
    probabilities: np.ndarray
    isthing: np.ndarray
    network_size: tuple[int, int]
    size: tuple[int, int]

    @property
    def resizer(self) -> MaskResizer:
        return MaskResizer((self.logits.shape[1], self.logits.shape[2]), self.network_size, self.size)

    @property
    def enlarged(self) -> np.ndarray:
        return reference_merge.enlarge(self.logits, self.network_size, self.size)


def blobs(rng: np.random.Generator, queries: int, height: int, width: int, noise: float) -> np.ndarray:
    """Mask logits like a network's: positive in an ellipse, strongly negative away from it."""
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(queries):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(1, height / 2 + 1), rng.uniform(1, width / 2 + 1)
        distance = np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
        masks.append(np.clip(6 * (1 - distance), -15, 8) + rng.normal(size=(height, width)) * noise)
    return np.stack(masks).astype(np.float32)


def make_case(seed: int, noise: float = 0.3) -> Case:
    rng = np.random.default_rng(seed)
    cells = rng.integers(3, 5 * BLOCK, 2)
    queries, classes = int(rng.integers(1, 12)), int(rng.integers(1, 7))
    network_size = tuple(int(rng.integers(4 * c - 11, 4 * c + 1)) for c in cells)
    size = network_size if seed % 3 == 0 else tuple(int(v) for v in rng.integers(5, 150, 2))
    probabilities = rng.dirichlet(np.full(classes + 1, 0.4), queries).astype(np.float32)
    return Case(
        blobs(rng, queries, int(cells[0]), int(cells[1]), noise),
        probabilities,
        rng.random(classes) < 0.5,
        (network_size[0], network_size[1]),
        (size[0], size[1]),
    )


# ---- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_three_resizes_are_one(seed: int) -> None:
    case = make_case(seed)
    whole = case.resizer(case.logits, slice(0, case.size[0]), slice(0, case.size[1]))
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, case.enlarged, atol=1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_part_is_that_part_of_the_whole(seed: int) -> None:
    case = make_case(seed)
    rng = np.random.default_rng(seed)
    height, width = case.size
    whole = case.resizer(case.logits[0], slice(0, height), slice(0, width))
    top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
    rows, columns = slice(top, int(rng.integers(top, height)) + 1), slice(left, int(rng.integers(left, width)) + 1)
    np.testing.assert_allclose(case.resizer(case.logits[0], rows, columns), whole[rows, columns], atol=1e-6)


def test_extreme_sizes() -> None:
    """A tiny result of a large canvas, a large one of a tiny canvas, and one pixel."""
    logits = np.random.default_rng(0).standard_normal((1, 40, 6)).astype(np.float32)
    for network_size, size in [((157, 21), (2, 3)), ((160, 24), (700, 300)), ((1, 1), (1, 1)), ((160, 1), (9, 1))]:
        resizer = MaskResizer((40, 6), network_size, size)
        ours = resizer(logits[0], slice(0, size[0]), slice(0, size[1]))
        np.testing.assert_allclose(ours, reference_merge.enlarge(logits, network_size, size)[0], atol=1e-5)


def test_sigmoid_is_exact_enough_everywhere() -> None:
    x = np.array([-200, -90, -20, -1e-3, 0, 1, 20, 90, 200], np.float32)
    expected = reference_merge.sigmoid(x.astype(np.float64).clip(-700))
    np.testing.assert_allclose(sigmoid(x), expected, rtol=1e-6, atol=1e-38)


# ---- panoptic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.8])
@pytest.mark.parametrize("seed", range(25))
def test_panoptic_agrees_with_the_reference(seed: int, overlap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", 1 + 37 * seed**2)  # from a row at a time to the whole image
    case = make_case(seed, noise=0.3 if seed % 2 else 3.0)
    expected, segments = reference_merge.panoptic(case.enlarged, case.probabilities, case.isthing, 0.0, overlap)
    ours, found = merge_panoptic(case.logits, case.probabilities, case.isthing, case.resizer, 0.0, overlap)
    # float32 against float64: pixels on a border may fall to either side.
    assert (ours == expected).mean() >= 0.999
    assert [(s.id, s.class_index) for s in found] == segments


def test_pruning_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing every mask everywhere gives the same map, bit for bit."""
    for seed in range(10):
        case = make_case(seed)
        arguments = (case.logits, case.probabilities, case.isthing, case.resizer, 0.0, 0.8)
        pruned = merge_panoptic(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(
                postprocessing, "_region", lambda matters, resizer, band: (band, slice(0, resizer.original_size[1]))
            )
            full = merge_panoptic(*arguments)
        assert np.array_equal(pruned[0], full[0])
        assert pruned[1] == full[1]


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_masks(seed: int, threshold: float, overlap: float) -> None:
    case = make_case(seed)
    segment_map, segments = merge_panoptic(
        case.logits, case.probabilities, case.isthing, case.resizer, threshold, overlap
    )
    assert segment_map.shape == case.size
    assert [s.id for s in segments] == list(range(1, len(segments) + 1))
    assert set(np.unique(segment_map)) <= {0, *(s.id for s in segments)}
    stuff = [s.class_index for s in segments if not s.isthing]
    assert len(stuff) == len(set(stuff)), "stuff segments of a class are joined"
    for segment in segments:
        mask = segment_map == segment.id
        assert mask.sum() == segment.area > 0
        left, top, right, bottom = segment.box
        assert mask[top:bottom, left:right].sum() == segment.area
        assert mask[top].any()
        assert mask[bottom - 1].any()
        assert mask[:, left].any()
        assert mask[:, right - 1].any()
        assert segment.score > threshold
        assert segment.isthing == case.isthing[segment.class_index]


def simple_case(logits: list[np.ndarray], probabilities: list[list[float]], isthing: list[bool]) -> Case:
    stacked = np.stack(logits).astype(np.float32)
    size = (4 * stacked.shape[1], 4 * stacked.shape[2])
    return Case(stacked, np.array(probabilities, np.float32), np.array(isthing), size, size)


FULL, EMPTY = np.full((4, 4), 9.0), np.full((4, 4), -9.0)
LEFT = np.where(np.arange(4) < 2, 9.0, -9.0) * np.ones((4, 1))


def merge(case: Case, threshold: float = 0.0, overlap: float = 0.8) -> tuple[np.ndarray, list[tuple[int, bool]]]:
    segment_map, found = merge_panoptic(case.logits, case.probabilities, case.isthing, case.resizer, threshold, overlap)
    return segment_map, [(s.class_index, s.isthing) for s in found]


def test_no_object_masks_take_no_part() -> None:
    segment_map, found = merge(simple_case([FULL, LEFT], [[0.1, 0.9], [0.2, 0.8]], [True]))
    assert not segment_map.any()
    assert found == []


def test_empty_mask_makes_no_segment() -> None:
    assert merge(simple_case([EMPTY], [[0.9, 0.1]], [True]), overlap=0.0)[1] == []


def test_a_mask_takes_part_above_the_threshold_and_not_at_it() -> None:
    case = simple_case([FULL], [[0.75, 0.25]], [True])
    assert merge(case, threshold=0.74)[1] == [(0, True)]
    assert merge(case, threshold=0.75)[1] == []


def test_a_single_pixel_is_a_segment() -> None:
    logits = np.full((1, 4, 4), -9.0, np.float32)
    logits[0, 2, 1] = 9
    resizer = MaskResizer((4, 4), (16, 16), (4, 4))
    segment_map, found = merge_panoptic(logits, np.array([[0.9, 0.1]]), np.array([True]), resizer, 0.0, 0.8)
    assert [(s.area, s.box) for s in found] == [(1, (1, 2, 2, 3))]
    assert segment_map.sum() == segment_map[2, 1] == 1


def test_a_probability_of_exactly_one_half_is_inside() -> None:
    segment_map, found = merge(simple_case([np.zeros((4, 4))], [[0.9, 0.1]], [True]))
    assert (segment_map == 1).all()
    assert found == [(0, True)]


def test_a_mask_that_keeps_exactly_the_overlap_threshold_is_a_segment() -> None:
    probabilities = np.array([[0.6, 0.2, 0.2], [0.2, 0.7, 0.1]], np.float32)
    resizer = MaskResizer((4, 4), (16, 16), (4, 4))
    logits, isthing = np.stack([FULL, LEFT]).astype(np.float32), np.array([True, True])
    for threshold, classes in [(0.5, [0, 1]), (float(np.nextafter(0.5, 1)), [1])]:
        _, found = merge_panoptic(logits, probabilities, isthing, resizer, 0.0, threshold)
        assert [s.class_index for s in found] == classes


def test_where_a_mask_is_nan_others_count_as_owners() -> None:
    """Nothing is sure in a block with NaN: an unsure mask owns its pixels, which count for its overlap."""
    better, unsure = np.full((48, 48), 9.0), np.full((48, 48), -0.5)
    better[:16, :16] = np.nan
    better[::8, ::8] = 9  # a number in every block
    better[40:, 40:] = -9
    unsure[32:, 32:] = 9
    case = simple_case([better, unsure], [[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]], [True, True])
    assert [c for c, _ in merge(case, overlap=1.0)[1]] == [0, 1]


def test_a_mask_that_is_nan_in_some_cells_keeps_the_rest() -> None:
    """A row in one block, and another block whole."""
    logits = np.full((4 * BLOCK, BLOCK), 9.0)
    logits[4] = logits[2 * BLOCK : 3 * BLOCK] = np.nan
    case = simple_case([logits], [[0.9, 0.1]], [True])
    lost = np.isnan(case.resizer(case.logits[0], slice(0, case.size[0]), slice(0, case.size[1])))
    assert 0.25 < lost.mean() < 0.4
    segment_map, found = merge(case)
    assert np.array_equal(segment_map == 0, lost)
    assert found == [(0, True)]


def test_full_mask_takes_everything() -> None:
    segment_map, found = merge(simple_case([FULL], [[0.9, 0.1]], [True]))
    assert (segment_map == 1).all()
    assert found == [(0, True)]


def test_of_two_equal_masks_the_first_wins_and_the_second_is_dropped() -> None:
    case = simple_case([FULL, FULL], [[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], [True, True])
    assert merge(case)[1] == [(0, True)]


def test_things_stay_apart_and_stuff_is_joined() -> None:
    logits, scores = [LEFT, -LEFT], [[0.9, 0.1], [0.8, 0.2]]
    things, found = merge(simple_case(logits, scores, [True]))
    assert found == [(0, True), (0, True)]
    assert set(np.unique(things)) >= {1, 2}
    stuff, found = merge(simple_case(logits, scores, [False]))
    assert found == [(0, False)]
    assert (stuff == 1).mean() > 0.99


def test_occluded_mask_is_dropped_by_the_overlap_threshold() -> None:
    case = simple_case([FULL, LEFT], [[0.6, 0.2, 0.2], [0.2, 0.7, 0.1]], [True, True])
    assert [c for c, _ in merge(case, overlap=0.8)[1]] == [1]
    assert [c for c, _ in merge(case, overlap=0.4)[1]] == [0, 1]


def test_unsure_mask_takes_pixels_from_a_surer_but_worse_one() -> None:
    """A mask below one half wins by its score; nobody then gets the pixels, and the other mask is dropped."""
    unsure, sure = np.full((40, 40), -0.2), np.full((40, 40), 0.3)
    segment_map, found = merge(simple_case([unsure, sure], [[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]], [True, True]), overlap=0)
    assert found == []
    assert not segment_map.any()


@pytest.mark.parametrize("across", [False, True])
def test_a_mask_that_wins_on_the_border_of_two_blocks_alone(across: bool) -> None:
    """Inside each block another mask is better; between them both fade, and the unsure one takes the pixels."""
    unsure = np.full((2 * BLOCK, 2 * BLOCK), -0.1)
    first = np.where(np.arange(2 * BLOCK) < BLOCK, 9.0, -8.0)[:, None] * np.ones(2 * BLOCK)
    logits = [unsure, first, first[::-1]]
    scores = [[1.0, 0.0, 0.0], [0.1, 0.5, 0.4], [0.1, 0.5, 0.4]]
    case = simple_case([mask.T if across else mask for mask in logits], scores, [True, True])
    expected, _ = reference_merge.panoptic(case.enlarged, case.probabilities, case.isthing, 0.0, 0.0)
    segment_map, _ = merge(case, overlap=0)
    assert np.array_equal(segment_map, expected)
    assert set(np.unique(segment_map)) == {0, 1, 2}


def test_area_counts_where_a_mask_cannot_win() -> None:
    """A mask hidden behind a better one keeps a quarter of itself, many blocks away from where it is hidden."""
    wide = np.full((16, 128), 9.0)
    better = np.where(np.arange(128) < 96, 9.0, -9.0) * np.ones((16, 1))
    case = simple_case([wide, better], [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], [True, True])
    assert [c for c, _ in merge(case, overlap=0.3)[1]] == [1]
    assert [c for c, _ in merge(case, overlap=0.2)[1]] == [0, 1]


def test_score_of_joined_stuff_is_the_best() -> None:
    case = simple_case([LEFT, -LEFT], [[0.6, 0.4], [0.9, 0.1]], [False])
    _, found = merge_panoptic(case.logits, case.probabilities, case.isthing, case.resizer, 0.0, 0.8)
    assert [s.score for s in found] == [pytest.approx(0.9)]
    assert found[0].query == 1, "the candidates of a joined segment are those of its best mask"


def test_boxes_and_areas_by_hand() -> None:
    segment_map = np.array([[0, 1, 1, 0], [2, 2, 1, 0], [0, 2, 0, 0]], np.int32)
    boxes, areas = boxes_and_areas(segment_map, 3)
    assert boxes == [(1, 0, 3, 2), (0, 1, 2, 3), (0, 0, 0, 0)]
    assert areas == [3, 3, 0]


# ---- semantic and instance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_semantic_agrees_with_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", 1 + 50 * seed**3)
    case = make_case(seed)
    scores = reference_merge.semantic(case.enlarged, case.probabilities)
    ours = semantic_map(case.logits, case.probabilities, case.resizer)
    chosen = np.take_along_axis(scores, ours[None], axis=0)[0]
    np.testing.assert_allclose(chosen, scores.max(axis=0), atol=1e-5)


@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535), (2, 32_768)])
def test_memory_of_a_semantic_map_does_not_depend_on_the_shape(size: tuple[int, int]) -> None:
    logits = np.full((2, 4, 4), 9.0, np.float32)
    rows = np.random.default_rng(0).dirichlet(np.ones(501), 2).astype(np.float32)

    def peak(shape: tuple[int, int]) -> int:
        resizer = MaskResizer((4, 4), (16, 16), shape)
        tracemalloc.start()
        try:
            semantic_map(logits, rows, resizer)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(size) < 1.2 * peak((256, 256))


@pytest.mark.parametrize("seed", range(6))
def test_large_vocabularies_give_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that cannot win are left out, and what is unsure is computed in full: bit for bit the same classes."""
    case = make_case(seed)
    rng = np.random.default_rng(seed)
    classes = 300
    rows = rng.dirichlet(np.full(classes + 1, 0.05 if seed % 2 else 5.0), len(case.logits)).astype(np.float32)
    isthing = rng.random(classes) < 0.5
    whole = semantic_map(case.logits, rows, case.resizer)
    pairs = [find_instances(case.logits, rows, isthing, case.resizer, count) for count in (20, 400)]
    monkeypatch.setattr(postprocessing, "MANY_CLASSES", 100)
    monkeypatch.setattr(postprocessing, "BEST_OF_A_MASK", 3)
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", classes)  # eight unsure pixels at a time
    assert postprocessing._ClassTable(rows[:, :-1]).width < classes, "nothing is left out: the test tests nothing"
    assert np.array_equal(semantic_map(case.logits, rows, case.resizer), whole)
    for count, before in zip((20, 400), pairs, strict=True):
        again = find_instances(case.logits, rows, isthing, case.resizer, count)
        assert [(i.class_index, i.query, i.score) for i in again] == [(i.class_index, i.query, i.score) for i in before]


def test_classes_that_rounding_makes_equal_are_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of a kept class may be rounded to more than the bound, and to no more than that of one left out."""
    rng = np.random.default_rng(0)
    masks = rng.random((3000, 20), np.float32)
    rows = np.repeat(rng.random((20, 1), np.float32), 300, axis=1) / 300
    rows[:, -3:] = np.nextafter(rows[:, -3:], 1)
    monkeypatch.setattr(postprocessing, "MANY_CLASSES", 100)
    monkeypatch.setattr(postprocessing, "BEST_OF_A_MASK", 3)
    table = postprocessing._ClassTable(rows)
    assert table.width < 300, "nothing is left out: the test tests nothing"
    assert np.array_equal(table.best(masks), (masks @ rows).argmax(axis=1))


def test_memory_of_unsure_pixels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them needs a value for every class, so few are computed at a time."""
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", 1 << 12)
    table = postprocessing._ClassTable(np.full((2, 8000), 1 / 8000, np.float32))
    masks = np.ones((1000, 2), np.float32)
    tracemalloc.start()
    try:
        table.best(masks)
        assert tracemalloc.get_traced_memory()[1] < 2e6  # 32 MB for all at once
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(8))
def test_instances_agree_with_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", 1 + 50 * seed**3)
    case = make_case(seed)
    count = 1 + seed * 5
    expected = reference_merge.instances(case.enlarged, case.probabilities, case.isthing, count)
    ours = find_instances(case.logits, case.probabilities, case.isthing, case.resizer, count)
    np.testing.assert_allclose([i.score for i in ours], [e[0] for e in expected], atol=1e-5)
    for instance, (_, label, mask) in zip(ours, expected, strict=True):
        assert instance.class_index == label
        assert abs(instance.area - int(mask.sum())) <= 2
        left, top, right, bottom = instance.box
        bits = np.unpackbits(instance.bits, count=(bottom - top) * (right - left))
        assert int(bits.sum()) == instance.area


def test_an_instance_whose_parts_lie_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of rows see different columns of it, and some see nothing."""
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", 1 << 12)
    logits = np.full((64, 96), -9.0)
    logits[5:9, 70:90] = logits[40:50, 30:40] = logits[44:47, 50:60] = 9
    case = simple_case([logits], [[0.9, 0.1]], [True])
    (found,) = find_instances(case.logits, case.probabilities, case.isthing, case.resizer, 1)
    expected = case.enlarged[0] > 0
    rows, columns = np.flatnonzero(expected.any(axis=1)), np.flatnonzero(expected.any(axis=0))
    left, top, right, bottom = found.box
    assert found.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    inside = np.unpackbits(found.bits, count=(bottom - top) * (right - left)).reshape(bottom - top, right - left)
    assert np.array_equal(inside, expected[top:bottom, left:right])


@pytest.mark.parametrize("beside", [slice(0, 8), slice(72, 96)])
def test_cells_of_exactly_zero_are_outside_of_an_instance(beside: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may belong to it by their bound, and lie beside its box in a band of their own."""
    monkeypatch.setattr(postprocessing, "BAND_PIXELS", 1 << 12)
    logits = np.full((96, 96), -9.0)
    logits[:8, 24:60] = logits[88:, 24:60] = 9
    logits[40:56, beside] = 0
    case = simple_case([logits], [[0.9, 0.1]], [True])
    (found,) = find_instances(case.logits, case.probabilities, case.isthing, case.resizer, 1)
    expected = case.enlarged[0] > 0
    columns = np.flatnonzero(expected.any(axis=0))
    left, top, right, bottom = found.box
    assert (left, right) == (columns[0], columns[-1] + 1)
    assert found.area == expected.sum()
    inside = np.unpackbits(found.bits, count=(bottom - top) * (right - left)).reshape(bottom - top, right - left)
    assert np.array_equal(inside, expected[top:bottom, left:right])


def test_a_pair_of_probability_zero_is_no_instance() -> None:
    case = simple_case([FULL, FULL], [[0.0, 0.9, 0.1], [0.0, 0.0, 1.0]], [True, True])
    found = find_instances(case.logits, case.probabilities, case.isthing, case.resizer, 100)
    assert [(i.class_index, i.query) for i in found] == [(1, 0)]


def test_more_pairs_asked_for_than_there_are() -> None:
    case = simple_case([FULL, EMPTY], [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]], [True, False])
    found = find_instances(case.logits, case.probabilities, case.isthing, case.resizer, 100)
    assert [(i.class_index, i.area > 0) for i in found] == [(0, True), (0, False)]
    assert found[1].box == (0, 0, 0, 0)
    assert found[1].score == 0
