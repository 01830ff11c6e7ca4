"""Square windows over the padded canvas, and their features stitched back (paper section 4, "sliding window").

The side is ``s = min(window, H, W)``; windows stand on a grid of stride ``s``, rows outer, columns inner, and the last
row and column are shifted back to end at the border. Where windows overlap, their features are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowGrid:
    """Where the windows of one canvas lie, in pixels."""

    side: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    canvas: tuple[int, int]
    """Height and width of the padded canvas."""

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top left corners ``(y, x)``, in the order of the batch."""
        return [(y, x) for y in self.tops for x in self.lefts]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)


def window_grid(height: int, width: int, window: int) -> WindowGrid:
    """Lay windows over a canvas of ``height`` x ``width`` pixels, both at least 1."""
    side = min(window, height, width)
    return WindowGrid(side, _starts(height, side), _starts(width, side), (height, width))


def _starts(length: int, side: int) -> tuple[int, ...]:
    count = -(-length // side)
    return tuple(min(i * side, length - side) for i in range(count))


def cut_windows(canvas: np.ndarray, grid: WindowGrid, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Windows ``start`` to ``stop`` of the grid as one batch.

    Args:
        canvas: (1, C, H, W).

    Returns:
        (N, C, s, s), contiguous; the canvas itself, not a copy, when one window covers it.
    """
    s = grid.side
    if grid.canvas == (s, s):
        return canvas
    return np.concatenate([canvas[:, :, y : y + s, x : x + s] for y, x in grid.corners[start:stop]])


class Stitcher:
    """Collects the feature levels of windows, batch by batch, into canvases.

    Only one set of canvases is alive, however many batches there are. Not for use by several threads at once.
    """

    def __init__(self, grid: WindowGrid, strides: Mapping[str, int]) -> None:
        """Prepare for the levels ``strides`` (name to pixels a cell); every stride must divide all coordinates."""
        for name, stride in strides.items():
            if any(v % stride for v in (grid.side, *grid.tops, *grid.lefts, *grid.canvas)):
                raise ValueError(f"level {name}: stride {stride} does not divide the window grid {grid}")
        self._grid = grid
        self._strides = dict(strides)
        self._levels: dict[str, np.ndarray] = {}
        self._next = 0

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        """Add the next windows of the grid.

        Args:
            features: level name to float32 (n, C, s/stride, s/stride), for the n windows after those already added.
                With a single window the arrays are kept, not copied.
        """
        grid = self._grid
        count = len(next(iter(features.values())))
        corners = grid.corners[self._next : self._next + count]
        if len(corners) != count:
            raise ValueError(f"{count} windows added after {self._next}, but the grid has {len(grid)}")
        for name, stride in self._strides.items():
            batch = features[name]
            if len(grid) == 1:
                self._levels[name] = batch
                continue
            if name not in self._levels:
                height, width = (v // stride for v in grid.canvas)
                self._levels[name] = np.zeros((1, batch.shape[1], height, width), batch.dtype)
            cells = grid.side // stride
            for (top, left), window in zip(corners, batch, strict=True):
                y, x = top // stride, left // stride
                self._levels[name][0, :, y : y + cells, x : x + cells] += window
        self._next += count

    def finish(self) -> dict[str, np.ndarray]:
        """The stitched levels, level name to (1, C, H/stride, W/stride), averaged where windows overlap."""
        grid = self._grid
        if self._next != len(grid):
            raise ValueError(f"{self._next} of {len(grid)} windows were added")
        for name, stride in self._strides.items():
            level = self._levels[name]
            # Only the last row and column can overlap their neighbours, so only those cells are divided.
            for axis, starts in ((2, grid.tops), (3, grid.lefts)):
                if len(starts) > 1:
                    index = [slice(None)] * 4
                    index[axis] = slice(starts[-1] // stride, (starts[-2] + grid.side) // stride)
                    level[tuple(index)] *= 0.5
        return dict(self._levels)
