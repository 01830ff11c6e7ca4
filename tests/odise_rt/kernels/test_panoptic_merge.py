"""panoptic_merge: the definition against the product, and the CUDA kernel's body emulated on the CPU against both."""

from __future__ import annotations

import numpy as np
import pytest

from odise_rt.kernels.reference import MergedPixels, merge_errors, panoptic_merge
from odise_rt.postprocessing import MaskResizer, _assign_pixels
from tests.odise_rt.kernels.bfloat16 import from_bfloat16, to_bfloat16
from tests.odise_rt.kernels.compiled import NEWER, Compiled, chosen
from tests.odise_rt.kernels.emulated import Emulation

# cells, test size, original size: same size, smaller and larger original, cropped canvas, one cell, one pixel.
SIZES = [
    ((16, 24), (64, 96), (64, 96)),
    ((16, 24), (61, 90), (61, 90)),
    ((32, 32), (128, 128), (50, 47)),
    ((32, 48), (120, 177), (333, 491)),
    ((16, 16), (64, 33), (640, 20)),
    ((1, 1), (4, 4), (4, 4)),
    ((2, 1), (7, 3), (9, 5)),
    ((1, 2), (1, 5), (3, 1)),
    ((16, 16), (64, 64), (1, 1)),
    ((32, 40), (128, 160), (16, 27)),  # two cells from pixel to pixel
    ((23, 1), (90, 3), (11, 102)),  # so in one direction, and one cell in the other
    ((2, 30), (8, 118), (40, 9)),
]


@pytest.fixture(params=["source", "sm_75", "sm_90", NEWER])
def implementation(request: pytest.FixtureRequest) -> Emulation | Compiled:
    """The oldest GPUs have other copies, products and sums."""
    return chosen(request)


def blobs(queries: int, cells: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth masks as a trained model makes them, clearly negative in most places, and scores."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: cells[0], : cells[1]]
    centre = random.uniform(0, 1, (queries, 2)) * cells
    radius = random.uniform(0.05, 0.5, queries) * max(cells)
    distance = np.hypot(y - centre[:, 0, None, None], x - centre[:, 1, None, None])
    logits = 4 * (radius[:, None, None] - distance) + random.normal(0, 0.5, (queries, *cells))
    return logits.astype(np.float32), random.uniform(0.05, 1, queries).astype(np.float32)


def product(logits: np.ndarray, scores: np.ndarray, test: tuple[int, int], original: tuple[int, int]) -> MergedPixels:
    """What odise_rt/postprocessing.py makes of it, in the reference's terms."""
    kept = np.flatnonzero(scores > 0)
    resizer = MaskResizer((logits.shape[1], logits.shape[2]), test, original)
    position, *areas = _assign_pixels(logits, scores, kept, resizer)
    owner = np.where(position >= 0, kept[position], -1).astype(np.int16)
    wide = np.zeros((3, len(scores)), np.int32)
    wide[:, kept] = areas
    return MergedPixels(owner, wide)


@pytest.mark.parametrize(("cells", "test", "original"), SIZES)
def test_definition_is_the_products(cells: tuple[int, int], test: tuple[int, int], original: tuple[int, int]) -> None:
    logits, scores = blobs(12, cells)
    scores[3] = 0  # takes no part
    assert merge_errors(product(logits, scores, test, original), logits, scores, test, original) == []
    assert merge_errors(panoptic_merge(logits, scores, test, original), logits, scores, test, original) == []


def test_the_judge_finds_errors() -> None:
    cells, test, original = SIZES[3]
    logits, scores = blobs(12, cells)
    good = panoptic_merge(logits, scores, test, original)
    owner = good.owner.copy()
    owner[100, 100] = (owner[100, 100] + 1) % 12
    assert "wrong owner" in merge_errors(MergedPixels(owner, good.areas), logits, scores, test, original)[0]
    for row, name in enumerate(("mask", "owned", "kept")):
        areas = good.areas.copy()
        areas[row, good.areas[2].argmax()] += 200
        errors = merge_errors(MergedPixels(good.owner, areas), logits, scores, test, original)
        assert any(f"{name} areas" in e for e in errors)


@pytest.mark.parametrize(("cells", "test", "original"), SIZES)
def test_body_equals_the_definition(
    implementation: Emulation | Compiled, cells: tuple[int, int], test: tuple[int, int], original: tuple[int, int]
) -> None:
    logits, scores = blobs(12, cells, seed=1)
    scores[3], scores[5] = 0, np.nan
    owner, areas = implementation.panoptic_merge(logits, scores, test, original)
    assert merge_errors(MergedPixels(owner, areas), logits, scores, test, original) == []


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bit_logits(implementation: Emulation | Compiled, kind: str) -> None:
    cells, test, original = SIZES[2]
    logits, scores = blobs(40, cells, seed=2)
    stored = to_bfloat16(logits) if kind == "bfloat16" else logits.astype(np.float16)
    true = from_bfloat16(stored) if kind == "bfloat16" else stored.astype(np.float32)
    owner, areas = implementation.panoptic_merge(stored, scores, test, original)
    assert merge_errors(MergedPixels(owner, areas), true, scores, test, original) == []


def test_noise_where_nothing_can_be_left_out(implementation: Emulation | Compiled) -> None:
    random = np.random.default_rng(4)
    logits = random.normal(0, 3, (100, 16, 16)).astype(np.float32)
    scores = random.uniform(0.2, 1, 100).astype(np.float32)
    owner, areas = implementation.panoptic_merge(logits, scores, (64, 64), (64, 64))
    assert merge_errors(MergedPixels(owner, areas), logits, scores, (64, 64), (64, 64)) == []


def test_edges_of_queries_and_scores(implementation: Emulation | Compiled) -> None:
    cells, size = (8, 8), (32, 32)
    full = np.full((3, *cells), 5, np.float32)
    owner, areas = implementation.panoptic_merge(full, np.array([0.5, 0.5, 0.5]), size, size)
    assert (owner == 0).all()  # of equal masks the first
    assert areas.tolist() == [[1024] * 3, [1024, 0, 0], [1024, 0, 0]]
    owner, areas = implementation.panoptic_merge(-full, np.array([0.5, 0.6, 0.5]), size, size)
    assert (owner == -1).all()
    assert areas.tolist() == [[0] * 3, [0, 1024, 0], [0] * 3]  # the best of masks that are nowhere still owns
    owner, areas = implementation.panoptic_merge(full, np.array([0.0, -1.0, np.nan]), size, size)
    assert (owner == -1).all()
    assert not areas.any()
    owner, areas = implementation.panoptic_merge(full[:1], np.array([1.0]), size, size)
    assert (owner == 0).all()
    far = np.full((2, *cells), -500, np.float32)  # probabilities that round to zero
    owner, areas = implementation.panoptic_merge(far, np.array([0.1, 0.9]), size, size)
    assert (owner == -1).all()
    assert areas[1].tolist() == [1024, 0]
    many = np.full((2048, 1, 1), -1, np.float32)
    many[-1] = 1
    owner, areas = implementation.panoptic_merge(many, np.full(2048, 0.5), (4, 4), (4, 4))
    assert (owner == 2047).all()
    zero = np.zeros((1, *cells), np.float32)
    owner, areas = implementation.panoptic_merge(zero, np.array([0.5]), size, size)
    assert (owner == 0).all()  # exactly one half is inside here


@pytest.mark.parametrize(("cells", "test", "original"), SIZES)
def test_a_mask_of_nan_is_nowhere_and_hides_no_other(
    implementation: Emulation | Compiled, cells: tuple[int, int], test: tuple[int, int], original: tuple[int, int]
) -> None:
    logits, scores = blobs(12, cells, seed=2)
    logits[4], scores[4] = np.nan, 1.0
    merges = [
        MergedPixels(*implementation.panoptic_merge(logits, scores, test, original)),
        product(logits, scores, test, original),
    ]
    for merged in merges:
        assert merge_errors(merged, logits, scores, test, original) == []
        assert not merged.areas[:, 4].any()


def test_one_cell_that_is_nan_hides_no_other(implementation: Emulation | Compiled) -> None:
    cells, size = (32, 32), (128, 128)
    logits = np.stack([np.full(cells, 8, np.float32), np.full(cells, -1, np.float32), np.full(cells, 1, np.float32)])
    logits[0, 16, 16] = np.nan
    scores = np.array([1.0, 0.9, 0.3], np.float32)
    for merged in (
        MergedPixels(*implementation.panoptic_merge(logits, scores, size, size)),
        product(logits, scores, size, size),
    ):
        owner = merged.owner
        assert (owner[62:70, 62:70] != 0).all()
        assert (owner[64:68, 64:68] == -1).all()  # the second has more of it than the third, and is not inside
        assert (owner[:56] == 0).all()
        assert (owner[72:] == 0).all()


@pytest.mark.parametrize(("cells", "test", "original"), [*SIZES, ((256, 352), (1024, 1365), (480, 640))])
def test_tables_are_the_products(
    implementation: Emulation | Compiled, cells: tuple[int, int], test: tuple[int, int], original: tuple[int, int]
) -> None:
    resizer = MaskResizer(cells, test, original)
    row_first, row_weights, column_first, column_weights, areas = implementation.merge_tables(cells, test, original, 7)
    assert not areas.any()
    for axis, first, weights in ((0, row_first, row_weights), (1, column_first, column_weights)):
        own = resizer._axis(axis)
        dense, expected = np.zeros((2, original[axis], cells[axis] + 3))
        for t in range(3):
            dense[np.arange(original[axis]), first + t] += weights[t]
        for t, tap in enumerate(own._weights):
            expected[np.arange(original[axis]), own._first + t] += tap
        np.testing.assert_array_equal(dense, expected)
        assert (first >= 0).all()
        assert (first + np.minimum(3, cells[axis]) <= cells[axis]).all()
