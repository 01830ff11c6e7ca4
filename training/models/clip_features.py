"""CLIP's image tokens in place of diffusion features: what the paper compares with (its section 4.3).

Frozen ViT tokens of four depths, a quarter of the layers apart, are resized to the levels of the pyramid: each level
gets a depth of its own, shallow ones for fine levels, the next deeper one, and the last layer's. Behind them stand
fresh projections like those of the diffusion taps, of about the same size in all, and the same heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from training.config import OdiseConfig
from training.models.clip_image_encoder import embed_windows
from training.models.clip_layers import self_attention_layer
from training.models.diffusion_features import FeatureTap
from training.models.feature_pyramid import LEVEL_STRIDES, FeaturePyramid
from training.models.odise import Odise

_DEPTHS = 4


def clip_depths(config: OdiseConfig) -> tuple[int, ...]:
    """Layers of CLIP's image tower behind which tokens are read, from 1; the last is the tower's last."""
    layers = config.clip.layers
    return tuple(sorted({-(-layers * quarter // _DEPTHS) for quarter in range(1, _DEPTHS + 1)}))


def clip_taps(config: OdiseConfig) -> tuple[FeatureTap, ...]:
    """Which depths feed which level: its own, the next, and the last."""
    depths = clip_depths(config)
    taps = []
    for number, level in enumerate(LEVEL_STRIDES):
        chosen = sorted({*depths[number : number + 2], depths[-1]})
        taps += [FeatureTap(f"clip.visual.{depth}", level, config.clip.width) for depth in chosen]
    return tuple(taps)


class ClipFeatureOdise(Odise):
    """ODISE on CLIP's image tokens. Captioner, VAE and UNet stay in it, unused, so that checkpoints keep their form."""

    def __init__(self, config: OdiseConfig) -> None:
        super().__init__(config)
        self.feature_pyramid = FeaturePyramid(clip_taps(config), config.head.pyramid_channels, config.head.norm_groups)

    def token_maps(self, windows: Tensor) -> dict[int, Tensor]:
        """Windows ``(N, 3, s, s)`` in [0, 1] to tokens of each depth as maps ``(N, width, grid, grid)``."""
        tokens = embed_windows(self.clip, self.clip_pixels, windows, self.config.window)
        grid = self.config.clip.image_size // self.config.clip.patch_size
        maps: dict[int, Tensor] = {}
        for depth, block in enumerate(self.clip.visual.transformer.resblocks, start=1):
            tokens = self_attention_layer(block, tokens)
            if depth in clip_depths(self.config):
                maps[depth] = tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
        return maps

    def levels_of_maps(self, maps: dict[int, Tensor], side: int) -> dict[str, Tensor]:
        """Token maps of windows of ``side`` pixels to their levels s2..s5."""
        features: Sequence[Tensor] = [
            resized(maps[int(tap.module.rsplit(".", 1)[1])], side // LEVEL_STRIDES[tap.level])
            for tap in self.feature_pyramid.taps
        ]
        levels: dict[str, Tensor] = self.feature_pyramid(features, side)
        return levels

    def unet_tap(
        self, windows: Tensor, image_embedding: Tensor, noise: Tensor, null_text_embedding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stage of :meth:`Odise.unet_tap` with the same outputs; only ``windows`` is read."""
        levels = self.levels_of_maps(self.token_maps(windows), windows.shape[-1])
        return levels["s2"], levels["s3"], levels["s4"], levels["s5"]


def resized(tokens: Tensor, size: int) -> Tensor:
    """``(N, C, g, g)`` to ``(N, C, size, size)``: bilinear to a finer grid, averages to a coarser one."""
    if size >= tokens.shape[-1]:
        return F.interpolate(tokens, size=(size, size), mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(tokens, size)
