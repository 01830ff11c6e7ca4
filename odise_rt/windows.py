"""Sliding windows: where the squares lie that the diffusion network sees (odise.md section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowGrid:
    """Square windows over a padded canvas."""

    height: int
    """Canvas height in pixels."""
    width: int
    """Canvas width in pixels."""
    side: int
    """Side of every window in pixels: ``min(window, height, width)``."""
    origins: tuple[tuple[int, int], ...]
    """``(top, left)`` in pixels, rows outer, columns inner."""


def window_grid(height: int, width: int, window: int) -> WindowGrid:
    """Cover a canvas with squares that touch; the last row and column are shifted back inside and may overlap.

    Args:
        height: canvas height in pixels, a multiple of 32.
        width: canvas width in pixels, a multiple of 32.
        window: largest side in pixels.
    """
    side = min(window, height, width)
    tops = [min(top, height - side) for top in range(0, height, side)]
    lefts = [min(left, width - side) for left in range(0, width, side)]
    return WindowGrid(height, width, side, tuple((top, left) for top in tops for left in lefts))
