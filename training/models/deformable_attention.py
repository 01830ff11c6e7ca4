"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3), forward and backward, any device."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sampling = Literal["grid_sample", "gather"]
"""How bilinear samples are taken. "gather" is the same arithmetic in plain indexing, for engines whose grid sampling
cannot be trusted (TensorRT from 10.14 on, NVIDIA/TensorRT issue 4813)."""


class DeformableAttention(nn.Module):
    """Every query attends to a few learned offsets around its reference point, on every level."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads = heads
        self.levels = levels
        self.points = points
        self.sampling: Sampling = "grid_sample"
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_projection = nn.Linear(channels, channels)
        self.output_projection = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start on rings: each head looks in its own direction, each point one pixel further out."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2.0 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        radii = torch.arange(1, self.points + 1, dtype=torch.float32)
        ring = directions[:, None, None, :] * radii[None, None, :, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.levels, -1, -1).reshape(-1))
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
            for layer in (self.value_projection, self.output_projection):
                nn.init.xavier_uniform_(layer.weight)
                layer.bias.zero_()

    def forward(self, queries: Tensor, references: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Attend.

        Args:
            queries: ``(B, M, C)``.
            references: ``(1 or B, M, 2)``, x then y, in [0, 1] of the padded image; the same point on every level.
            memory: ``(B, N, C)``, the levels flattened and concatenated.
            shapes: ``(height, width)`` of each level; their products sum to N.

        Returns:
            ``(B, M, C)``.
        """
        value = self.value_projection(memory).unflatten(2, (self.heads, -1))  # (B, N, heads, C / heads)
        offsets = self.sampling_offsets(queries).unflatten(2, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(queries).unflatten(2, (self.heads, self.levels * self.points))
        weights = weights.softmax(dim=-1).unflatten(3, (self.levels, self.points))

        sample = sample_by_grid if self.sampling == "grid_sample" else sample_by_gather
        parts = []
        start = 0
        for level, (height, width) in enumerate(shapes):
            # (B, heads, C / heads, height, width)
            image = value[:, start : start + height * width].permute(0, 2, 3, 1).unflatten(3, (height, width))
            # Offsets count pixels of the level.
            x = references[:, :, None, None, 0] + offsets[:, :, :, level, :, 0] / width  # (B, M, heads, points)
            y = references[:, :, None, None, 1] + offsets[:, :, :, level, :, 1] / height
            locations = torch.stack([x, y], dim=-1)
            sampled = sample(image, locations.transpose(1, 2))  # (B, heads, C / heads, M, points)
            # Summed level by level: all samples side by side would be the largest array of the mask decoder.
            parts.append((sampled * weights[:, :, :, level].transpose(1, 2)[:, :, None]).sum(dim=4))
            start = start + height * width
        attended = sum(parts[1:], parts[0])  # (B, heads, C / heads, M)
        out: Tensor = self.output_projection(attended.flatten(1, 2).transpose(1, 2))
        return out


def sample_by_grid(image: Tensor, locations: Tensor) -> Tensor:
    """Bilinear samples, zeros outside.

    Args:
        image: ``(B, heads, C, h, w)``.
        locations: ``(B, heads, M, P, 2)``, x then y, [0, 1] spanning the image from edge to edge.

    Returns:
        ``(B, heads, C, M, P)``.
    """
    batch, heads = image.shape[:2]
    sampled = F.grid_sample(
        image.flatten(0, 1),
        locations.flatten(0, 1) * 2.0 - 1.0,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled.unflatten(0, (batch, heads))


def sample_by_gather(image: Tensor, locations: Tensor) -> Tensor:
    """:func:`sample_by_grid` with the four neighbours gathered explicitly."""
    height, width = image.shape[-2:]
    points = locations.shape[-2]
    x = locations[..., 0] * width - 0.5
    y = locations[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    flat = image.flatten(3)  # (B, heads, C, h * w)
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for step_x in (0, 1):
        for step_y in (0, 1):
            column, row = left + step_x, top + step_y
            weight = (1.0 - (x - column).abs()) * (1.0 - (y - row).abs())
            inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
            weight = torch.where(inside, weight, torch.zeros_like(weight))
            index = row.clamp(min=0, max=height - 1) * width + column.clamp(min=0, max=width - 1)
            index = index.flatten(2).to(torch.int64)[:, :, None]  # (B, heads, 1, M * P)
            picked = flat.gather(3, index.expand(-1, -1, flat.shape[2], -1)).unflatten(3, (-1, points))
            total = total + picked * weight[:, :, None]
    return total
