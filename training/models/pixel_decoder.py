"""Pixel decoder (odise.md section 4.1): deformable attention over s5, s4, s3, then one top-down step to s2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import HeadConfig
from training.models.deformable_attention import DeformableAttention

ATTENDED_LEVELS = ("s5", "s4", "s3")
"""Levels that attention runs over, coarsest first: also the order in which the mask decoder reads them."""


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """2-D sine embedding (DETR, appendix A.4) of pixel positions counted from 1 and scaled to 2 pi.

    Returns:
        float32 ``(1, height * width, channels)``: y in the first half of the channels, x in the second.
    """
    half = channels // 2
    exponent = 2.0 * torch.div(torch.arange(half, device=like.device, dtype=torch.float32), 2, rounding_mode="floor")
    wavelength = 10000.0 ** (exponent / half)
    axes = []
    for size in (height, width):
        count = torch.arange(1, size + 1, device=like.device, dtype=torch.float32)
        phase = (count / (count[-1] + 1e-6) * (2.0 * math.pi))[:, None] / wavelength  # (size, half)
        axes.append(torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1))
    rows = axes[0][:, None].expand(height, width, half)
    columns = axes[1][None].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)[None]


def pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Centres of a level's pixels in [0, 1], x then y: ``(1, height * width, 2)``."""
    y = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) / width
    grid = torch.stack([x[None].expand(height, width), y[:, None].expand(height, width)], dim=2)
    return grid.flatten(0, 1)[None]


class PixelDecoderLayer(nn.Module):
    """Post-norm transformer layer whose self-attention is deformable."""

    def __init__(self, head: HeadConfig) -> None:
        super().__init__()
        dim = head.hidden_dim
        self.attention = DeformableAttention(dim, head.attention_heads, len(ATTENDED_LEVELS), head.sampling_points)
        self.attention_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, head.pixel_decoder_ffn)
        self.linear2 = nn.Linear(head.pixel_decoder_ffn, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, tokens: Tensor, position: Tensor, references: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Tokens ``(B, N, C)`` with positions ``(1, N, C)`` and reference points ``(1, N, 2)`` to ``(B, N, C)``."""
        tokens = self.attention_norm(tokens + self.attention(tokens + position, references, tokens, shapes))
        out: Tensor = self.ffn_norm(tokens + self.linear2(F.relu(self.linear1(tokens))))
        return out


class PixelDecoder(nn.Module):
    """Levels s2..s5 to mask features at stride 4 and three refined levels."""

    def __init__(self, head: HeadConfig) -> None:
        super().__init__()
        dim, groups = head.hidden_dim, head.norm_groups
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(head.pyramid_channels, dim, 1), nn.GroupNorm(groups, dim)) for _ in ATTENDED_LEVELS
        )
        self.level_embedding = nn.Parameter(torch.randn(len(ATTENDED_LEVELS), dim))
        self.layers = nn.ModuleList(PixelDecoderLayer(head) for _ in range(head.pixel_decoder_layers))
        self.lateral = nn.Sequential(nn.Conv2d(head.pyramid_channels, dim, 1, bias=False), nn.GroupNorm(groups, dim))
        self.output = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim))
        self.mask_features = nn.Conv2d(dim, dim, 1)
        for projection in self.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, levels: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode.

        Args:
            levels: ``s2..s5``, each ``(B, pyramid_channels, H / stride, W / stride)``.

        Returns:
            Mask features ``(B, hidden_dim, H / 4, W / 4)`` and the refined levels s5, s4, s3, each
            ``(B, hidden_dim, H / stride, W / stride)``.
        """
        projected = [
            projection(levels[name]) for name, projection in zip(ATTENDED_LEVELS, self.input_projections, strict=True)
        ]
        shapes = [(level.shape[2], level.shape[3]) for level in projected]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in projected], dim=1)
        dim = tokens.shape[2]
        position = torch.cat(
            [
                sine_position(height, width, dim, tokens) + self.level_embedding[index]
                for index, (height, width) in enumerate(shapes)
            ],
            dim=1,
        )
        references = torch.cat([pixel_centres(height, width, tokens) for height, width in shapes], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, position, references, shapes)

        refined = []
        start = 0
        for height, width in shapes:
            level = tokens[:, start : start + height * width].transpose(1, 2).unflatten(2, (height, width))
            refined.append(level)
            start = start + height * width
        lateral = self.lateral(levels["s2"])
        upsampled = F.interpolate(refined[2], size=lateral.shape[2:], mode="bilinear", align_corners=False)
        mask_features = self.mask_features(F.relu(self.output(lateral + upsampled)))
        return mask_features, refined
