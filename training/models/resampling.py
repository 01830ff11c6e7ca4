"""Separable image resizing as two matrix products.

The product form has three virtues over ``interpolate``: it is one and the same arithmetic in PyTorch, ONNX Runtime and
TensorRT (whose resize operators differ in corner cases), its sizes may be dynamic, and it runs at matmul speed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Filter = Literal["bilinear", "bicubic"]

CUBIC_A = -0.75
"""Keys' parameter of PyTorch's bicubic without antialiasing (odise.md section 1, "antialias trap")."""


def resample_matrix(source: int, target: int, kind: Filter, like: Tensor) -> Tensor:
    """Weights that resize one axis, half-pixel centres, edges clamped, no antialiasing.

    Args:
        source: input length, at least 1; may be a symbolic size under export.
        target: output length.
        kind: interpolation kernel; both equal ``torch.nn.functional.interpolate(align_corners=False)``.
        like: its device is taken.

    Returns:
        float32 ``(target, source)``; every row sums to 1.
    """
    rows = torch.arange(target, device=like.device, dtype=torch.float32)
    columns = torch.arange(source, device=like.device, dtype=torch.float32)
    # Sizes enter as tensors: a symbolic size in float arithmetic would not survive export.
    last = columns[-1]
    centre = (rows + 0.5) * ((last + 1.0) / target) - 0.5
    if kind == "bilinear":
        # Clamping the centre is what clamping both neighbours amounts to for a kernel of two taps.
        centre = torch.minimum(centre.clamp(min=0.0), last)
        return (1.0 - (centre[:, None] - columns[None, :]).abs()).clamp(min=0.0)
    floor = centre.floor()
    fraction = centre - floor
    matrix = torch.zeros((), device=like.device)
    for tap in (-1, 0, 1, 2):
        position = torch.minimum((floor + tap).clamp(min=0.0), last)
        weight = _cubic_weight((fraction - tap).abs())
        # Clamped taps may coincide at a border; their weights then add up, as they should.
        matrix = matrix + weight[:, None] * (position[:, None] == columns[None, :])
    return matrix


def _cubic_weight(distance: Tensor) -> Tensor:
    """Keys' cubic kernel at distances in [0, 2]."""
    a = CUBIC_A
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = ((a * distance - 5.0 * a) * distance + 8.0 * a) * distance - 4.0 * a
    return torch.where(distance <= 1.0, near, far)


def resample(images: Tensor, height: int, width: int, kind: Filter) -> Tensor:
    """Resize ``(..., h, w)`` to ``(..., height, width)``; values may overshoot with "bicubic"."""
    sizes = (images.shape[-2], images.shape[-1])
    # Under export the sizes are symbols, and comparing them would fix them to the example's.
    if all(type(size) is int for size in sizes) and sizes == (height, width):
        return images
    rows = resample_matrix(images.shape[-2], height, kind, images).to(images.dtype)
    columns = resample_matrix(images.shape[-1], width, kind, images).to(images.dtype)
    return rows @ images @ columns.transpose(-1, -2)
