"""Feature pyramid: projects the diffusion taps and sums them into the levels s2..s5 (odise.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from training.models.diffusion_features import FeatureTap

LEVEL_STRIDES = {"s2": 4, "s3": 8, "s4": 16, "s5": 32}


class Bottleneck(nn.Module):
    """ResNet bottleneck, GroupNorm for batch statistics: 1x1, 3x3, 1x1 with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        inner = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.GroupNorm(norm_groups, inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.norm3 = nn.GroupNorm(norm_groups, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.GroupNorm(norm_groups, out_channels)
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """``(N, in_channels, h, w)`` to ``(N, out_channels, h, w)``."""
        hidden = F.relu(self.norm1(self.conv1(features)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        return F.relu(self.norm3(self.conv3(hidden)) + self.shortcut(features))


class FeaturePyramid(nn.Module):
    """One bottleneck a tap; taps of a level are summed.

    Normalisation statistics are those of a window, so this must run before windows are stitched.
    """

    def __init__(self, taps: Sequence[FeatureTap], channels: int, norm_groups: int) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.projections = nn.ModuleList(Bottleneck(tap.channels, channels, norm_groups) for tap in self.taps)

    def forward(self, features: Sequence[Tensor], side: int) -> dict[str, Tensor]:
        """Project and sum.

        Args:
            features: one ``(N, channels, h, h)`` a tap, in the order of ``taps``.
            side: pixels of the window *before* it was brought to the model's window side; a multiple of 32.

        Returns:
            ``s2..s5``, each ``(N, channels, side / stride, side / stride)``.
        """
        levels: dict[str, Tensor] = {}
        for tap, projection, feature in zip(self.taps, self.projections, features, strict=True):
            size = side // LEVEL_STRIDES[tap.level]
            projected = projection(_nearest(feature, size))
            levels[tap.level] = levels[tap.level] + projected if tap.level in levels else projected
        return {name: levels[name] for name in LEVEL_STRIDES}


def _nearest(feature: Tensor, size: int) -> Tensor:
    return feature if feature.shape[-1] == size else F.interpolate(feature, size=(size, size), mode="nearest")
