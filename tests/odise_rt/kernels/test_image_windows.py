"""The kernels around the networks, emulated on the CPU, against what the runtime does on the host: equal to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from odise_rt.errors import BackendError
from odise_rt.kernels.launch_plans import (
    WindowLayout,
    plan_cut_windows,
    plan_resize,
    plan_stitch_windows,
)
from odise_rt.kernels.resize_tables import resize_table
from odise_rt.preprocessing import prepare
from odise_rt.windows import Stitcher, cut_windows, window_grid
from tests.odise_rt.kernels.compiled import Compiled
from tests.odise_rt.kernels.emulated import Emulation

SIZES = [
    ((64, 96), (64, 96)),  # nothing to resize
    ((50, 70), (64, 90)),
    ((333, 491), (64, 94)),
    ((40, 600), (11, 160)),
    ((600, 40), (160, 11)),
    ((1, 1), (64, 64)),
    ((3, 200), (1, 64)),
    ((200, 3), (64, 1)),
    ((37, 64), (37, 90)),  # one axis only
]


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_resized_canvas_is_the_hosts(
    implementation: Emulation | Compiled, original: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*original, 3), dtype=np.uint8)
    expected = prepare(pixels, size, 32).canvas[0]
    assert np.array_equal(implementation.resize(pixels, size, expected.shape[1:]), expected)


def test_extremes_stay_in_range(implementation: Emulation | Compiled) -> None:
    for value in (0, 255):
        pixels = np.full((90, 121, 3), value, np.uint8)
        canvas = implementation.resize(pixels, (32, 43), (32, 64))
        assert (canvas[:, :, :43] == value / np.float32(255)).all()
        assert not canvas[:, :, 43:].any()


def test_tables_of_random_lengths_sum_to_one() -> None:
    random = np.random.default_rng(1)
    for target, source in random.integers(1, 300, (200, 2)):
        table = resize_table(int(target), int(source))
        assert table.weights.shape == (table.taps, target)
        assert (np.abs(table.weights.sum(axis=0) - (1 << 22)) <= table.taps).all()
        behind = table.first + np.arange(table.taps)[:, None] >= source
        assert not table.weights[behind].any(), "a tap behind the image is not read"


# canvas, window: one window, side by side, overlapping along one axis and along both.
GRIDS = [((64, 64), 64), ((64, 128), 64), ((96, 64), 64), ((96, 160), 64), ((32, 64), 64), ((160, 224), 64)]


@pytest.mark.parametrize(("canvas", "window"), GRIDS)
def test_windows_are_cut_and_stitched_as_on_the_host(
    implementation: Emulation | Compiled, canvas: tuple[int, int], window: int
) -> None:
    random = np.random.default_rng(2)
    image = random.random((1, 3, *canvas), np.float32)
    grid = window_grid(*canvas, window)
    whole = cut_windows(image, grid)
    assert np.array_equal(implementation.cut_windows(image[0], (grid.side, grid.side), 0, len(grid)), whole)
    for start in range(len(grid)):
        found = implementation.cut_windows(image[0], (grid.side, grid.side), start, 1)
        assert np.array_equal(found, whole[start : start + 1])
    for stride in (4, 8, 16, 32):
        cells = grid.side // stride
        features = random.normal(size=(len(grid), 37, cells, cells)).astype(np.float32)
        stitcher = Stitcher(grid, {"level": stride})
        stitcher.add({"level": features})
        expected = stitcher.finish()["level"]
        assert np.array_equal(implementation.stitch_windows(features, expected.shape[2:])[None], expected)


def test_a_crop_is_one_window_of_another_shape(implementation: Emulation | Compiled) -> None:
    canvas = np.random.default_rng(3).random((3, 64, 96), np.float32)
    assert np.array_equal(implementation.cut_windows(canvas, (50, 91), 0, 1)[0], canvas[:, :50, :91])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: plan_resize((0, 4), (4, 4), (4, 4)), "expected sizes of 1"),
        (lambda: plan_resize((4, 4), (5, 4), (4, 4)), "holds the image"),
        (lambda: plan_resize((1 << 20, 4), (4, 1 << 20), (4, 1 << 20)), "too many"),
        (lambda: plan_cut_windows(WindowLayout((4, 4), (5, 4)), 3, 0, 1), "do not fit"),
        (lambda: plan_cut_windows(WindowLayout((4, 4), (2, 2)), 3, 3, 2), "do not exist"),
        (lambda: plan_cut_windows(WindowLayout((4, 4), (2, 2)), 0, 0, 1), "0 channels"),
        (lambda: plan_stitch_windows(WindowLayout((1 << 20, 1 << 20), (4, 4)), 1 << 16), "too many"),
    ],
)
def test_sizes_out_of_range_are_typed_errors(broken: object, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        broken()  # type: ignore[operator]
