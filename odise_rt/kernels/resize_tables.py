"""The weights of Pillow's bilinear resize of uint8 pixels, one axis at a time, for the kernels of ``image_windows.cu``.

Pillow's filter is a triangle, as wide as the shrinking demands (so it is antialiased), and its weights are integers of
22 fractional bits. A test compares the sums with Pillow's own pixels, which are equal to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESIZE_BITS = 22
"""Fractional bits of a weight."""


@dataclass(frozen=True)
class ResizeTable:
    """Value i is ``(2**21 + sum over t of weights[t, i] * source[first[i] + t]) >> 22``."""

    first: np.ndarray
    """int32 (target,)."""
    weights: np.ndarray
    """int32 (taps, target); zero for taps that lie behind the last source value."""

    @property
    def taps(self) -> int:
        """Source values that a result may depend on."""
        return len(self.weights)


def resize_table(target: int, source: int) -> ResizeTable:
    """The table of one axis.

    Args:
        target: length of the result, at least 1.
        source: length of what is resized, at least 1.
    """
    scale = source / target
    widening = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - widening + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + widening + 0.5).astype(np.int64), source)
    taps = min(2 * math.ceil(widening) + 1, int((stop - first).max()))
    position = first[None] + np.arange(taps)[:, None]
    distance = np.abs((position - centre[None] + 0.5) / widening)
    weights = np.where((distance < 1) & (position < stop[None]), 1 - distance, 0.0)
    total = np.zeros(target)
    for row in weights:  # one after the other, as Pillow adds them
        total += row
    weights = np.where(total != 0, weights / total, weights)
    fixed = (weights * (1 << RESIZE_BITS) + 0.5).astype(np.int32)
    return ResizeTable(first.astype(np.int32), np.ascontiguousarray(fixed))
