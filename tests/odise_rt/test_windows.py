"""Windows cover the canvas, and stitching averages what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odise_rt.windows import Stitcher, cut_windows, window_grid

STRIDES = {"s2": 4, "s3": 8, "s4": 16, "s5": 32}


def test_published_window_counts() -> None:
    for (height, width), count in {(512, 512): 1, (1024, 1024): 4, (1024, 1408): 6, (1024, 1536): 6}.items():
        assert len(window_grid(height, width, 512)) == count


def test_order_is_rows_outer_and_the_last_is_shifted_back() -> None:
    grid = window_grid(256, 384, 128)
    assert grid.corners == [(0, 0), (0, 128), (0, 256), (128, 0), (128, 128), (128, 256)]
    assert window_grid(1024, 1408, 512).lefts == (0, 512, 896)


def test_side_is_at_most_the_shorter_edge() -> None:
    grid = window_grid(320, 1024, 512)
    assert grid.side == 320
    assert grid.lefts == (0, 320, 640, 704)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 8))
def test_windows_cover_every_cell_and_stay_inside(rows: int, columns: int, window: int) -> None:
    height, width, side = 32 * rows, 32 * columns, 32 * window
    grid = window_grid(height, width, side)
    covered = np.zeros((height // 32, width // 32), int)
    for y, x in grid.corners:
        assert 0 <= y <= height - grid.side
        assert 0 <= x <= width - grid.side
        covered[y // 32 : (y + grid.side) // 32, x // 32 : (x + grid.side) // 32] += 1
    assert covered.min() >= 1
    assert covered.max() <= 4
    assert len(set(grid.corners)) == len(grid)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_stitching_is_the_average_over_windows(rows: int, columns: int, window: int, batch: int, seed: int) -> None:
    grid = window_grid(32 * rows, 32 * columns, 32 * window)
    rng = np.random.default_rng(seed)
    features = {
        n: rng.standard_normal((len(grid), 2, grid.side // k, grid.side // k)).astype(np.float32)
        for n, k in STRIDES.items()
    }
    stitcher = Stitcher(grid, STRIDES)
    for start in range(0, len(grid), batch):
        stitcher.add({n: f[start : start + batch] for n, f in features.items()})
    stitched = stitcher.finish()
    for name, stride in STRIDES.items():
        total = np.zeros((2, grid.canvas[0] // stride, grid.canvas[1] // stride))
        count = np.zeros(total.shape[1:])
        for (y, x), feature in zip(grid.corners, features[name], strict=True):
            y, x, cells = y // stride, x // stride, grid.side // stride
            total[:, y : y + cells, x : x + cells] += feature
            count[y : y + cells, x : x + cells] += 1
        assert stitched[name].shape == (1, *total.shape)
        np.testing.assert_allclose(stitched[name][0], total / count, atol=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_cutting_and_stitching_gives_the_image_back(rows: int, columns: int, window: int) -> None:
    grid = window_grid(32 * rows, 32 * columns, 32 * window)
    canvas = np.random.default_rng(0).random((1, 3, 32 * rows, 32 * columns), np.float32)
    stitcher = Stitcher(grid, {"pixels": 1})
    stitcher.add({"pixels": cut_windows(canvas, grid)})
    np.testing.assert_allclose(stitcher.finish()["pixels"], canvas, atol=1e-6)


def test_a_single_window_is_never_copied() -> None:
    grid = window_grid(128, 128, 128)
    canvas = np.zeros((1, 3, 128, 128), np.float32)
    assert cut_windows(canvas, grid) is canvas
    features = {"s2": np.ones((1, 4, 32, 32), np.float32)}
    stitcher = Stitcher(grid, {"s2": 4})
    stitcher.add(features)
    assert stitcher.finish()["s2"] is features["s2"]
    assert (features["s2"] == 1).all()


def test_several_windows_are_a_contiguous_batch() -> None:
    grid = window_grid(128, 256, 128)
    canvas = np.arange(3 * 128 * 256, dtype=np.float32).reshape(1, 3, 128, 256)
    batch = cut_windows(canvas, grid, 1, 2)
    assert batch.shape == (1, 3, 128, 128)
    assert batch.flags.c_contiguous
    assert np.array_equal(batch, canvas[:, :, :, 128:])


def test_misuse_is_refused() -> None:
    grid = window_grid(64, 128, 64)
    with pytest.raises(ValueError, match="does not divide"):
        Stitcher(window_grid(60, 60, 60), {"s5": 32})
    stitcher = Stitcher(grid, {"s2": 4})
    with pytest.raises(ValueError, match="0 of 2"):
        stitcher.finish()
    with pytest.raises(ValueError, match="3 windows"):
        stitcher.add({"s2": np.zeros((3, 1, 16, 16), np.float32)})
