"""Sliding windows in PyTorch: pad, cut, and stitch the levels of windows into those of the canvas (odise.md 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from odise_rt.windows import WindowGrid
from training.models.feature_pyramid import LEVEL_STRIDES


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """``(B, C, h, w)`` with zeros below and to the right, so that both edges are multiples of ``divisor``."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % divisor, 0, -height % divisor))


def cut_windows(images: Tensor, grid: WindowGrid) -> Tensor:
    """``(B, C, H, W)`` to ``(B * N, C, side, side)``: the N windows of the first image, then those of the second."""
    side = grid.side
    windows = [images[:, :, top : top + side, left : left + side] for top, left in grid.corners]
    return torch.stack(windows, dim=1).flatten(0, 1)


def stitch_levels(levels: dict[str, Tensor], grid: WindowGrid) -> dict[str, Tensor]:
    """Average window levels ``(B * N, C, side / stride, side / stride)`` into ``(B, C, H / stride, W / stride)``."""
    return {name: _stitch(level, grid, LEVEL_STRIDES[name]) for name, level in levels.items()}


def _stitch(level: Tensor, grid: WindowGrid, stride: int) -> Tensor:
    windows = level.unflatten(0, (-1, len(grid)))
    height, width, side = (n // stride for n in (*grid.canvas, grid.side))
    canvas = level.new_zeros(windows.shape[0], level.shape[1], height, width)
    count = level.new_zeros(1, 1, height, width)
    for index, (top, left) in enumerate(grid.corners):
        rows = slice(top // stride, top // stride + side)
        columns = slice(left // stride, left // stride + side)
        canvas[:, :, rows, columns] += windows[:, index]
        count[:, :, rows, columns] += 1
    return canvas / count
