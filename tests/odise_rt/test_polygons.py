"""Polygons give the mask back: filled by a rule written out here, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from odise_rt.polygons import Polygon, polygons

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14)))


def crossings(ring: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For the centre of each pixel: edges that the ray to the left crosses, and their signed sum (winding number)."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    count, winding = np.zeros(shape, int), np.zeros(shape, int)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        at = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
        crossed = ((y0 > y) != (y1 > y)) & (at < x)
        count += crossed
        winding += np.where(crossed, -1 if y1 > y0 else 1, 0)
    return count, winding


def filled(parts: list[Polygon], shape: tuple[int, int]) -> np.ndarray:
    total = np.zeros(shape, int)
    for part in parts:
        for ring in (part.outline, *part.holes):
            total += crossings(ring, shape)[0]
    return total % 2 == 1


@given(MASKS)
def test_filling_the_polygons_gives_the_mask(mask: np.ndarray) -> None:
    parts = polygons(mask)
    assert np.array_equal(filled(parts, mask.shape), mask)
    for part in parts:
        for ring in (part.outline, *part.holes):
            assert len({tuple(p) for p in ring}) == len(ring), "no outline touches itself"


@given(MASKS)
def test_one_ring_fills_the_same_by_both_rules(mask: np.ndarray) -> None:
    even_odd, winding = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    for part in polygons(mask):
        count, turns = crossings(part.as_one_ring(), mask.shape)
        assert not (even_odd & (count % 2 == 1)).any(), "parts do not overlap"
        even_odd |= count % 2 == 1
        winding |= turns != 0
    assert np.array_equal(even_odd, mask)
    assert np.array_equal(winding, mask)


def test_a_ring_with_an_island() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    ring, island = polygons(mask)
    assert ring.outline.tolist() == [[1, 1], [8, 1], [8, 8], [1, 8]]
    assert len(ring.holes) == 1
    assert len(island.outline) == 4
    assert island.holes == ()


def test_pixels_that_touch_at_a_corner_are_two_parts() -> None:
    assert len(polygons(np.eye(2, dtype=bool))) == 2
    assert len(polygons(np.eye(2, dtype=bool)[::-1])) == 2
    assert len(polygons(~np.eye(3, dtype=bool))) == 2


def test_empty_and_full() -> None:
    assert polygons(np.zeros((4, 5), bool)) == []
    (whole,) = polygons(np.ones((4, 5), bool))
    assert whole.outline.tolist() == [[0, 0], [5, 0], [5, 4], [0, 4]]


def test_tolerance_saves_corners_and_keeps_the_shape() -> None:
    y, x = np.mgrid[:200, :300]
    distance = np.hypot((y - 100) / 80, (x - 150) / 120)
    mask = (distance < 1) & (distance > 0.4)
    (exact,) = polygons(mask)
    (simple,) = polygons(mask, tolerance=1.0)
    assert len(simple.outline) < len(exact.outline) / 4
    assert len(simple.holes) == 1
    again = filled([simple], mask.shape)
    assert (again & mask).sum() / (again | mask).sum() > 0.99


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_tolerance_never_loses_a_part(shape: tuple[int, int]) -> None:
    mask = np.ones(shape, bool)
    assert len(polygons(mask, tolerance=5.0)) == 1
    assert len(polygons(mask, tolerance=5.0)[0].outline) >= 3
