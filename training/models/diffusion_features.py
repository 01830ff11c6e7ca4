"""Diffusion features (paper section 3.1): internal activations of a frozen text-to-image model at one time step.

A tap is the *input* of a block. Everything behind the last tap of each network is left out, which removes 44 % of the
official model's diffusion FLOPs without changing a bit of the result (odise.md sections 2.4 and 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from training.config import OdiseConfig
from training.models.resampling import resample


@dataclass(frozen=True)
class FeatureTap:
    """A place where a feature map is read."""

    module: str
    """The block whose input is read, in the terms of the original Stable Diffusion code."""
    level: str
    """Pyramid level that it feeds, ``s2`` to ``s5``."""
    channels: int


def feature_taps(config: OdiseConfig) -> tuple[FeatureTap, ...]:
    """The eight taps in the order of the released weights (odise.md table 2.4)."""
    vae, unet = config.vae.channels, config.unet.channels
    return (
        FeatureTap("vae.encoder.down.2.block.1", "s2", vae[2]),
        FeatureTap("vae.encoder.down.3.block.1", "s3", vae[3]),
        FeatureTap("unet.output_blocks.2", "s5", unet[3] + unet[2]),
        FeatureTap("unet.output_blocks.5", "s5", unet[2] + unet[1]),
        FeatureTap("unet.output_blocks.8", "s4", unet[1] + unet[0]),
        FeatureTap("unet.output_blocks.11", "s3", unet[0] + unet[0]),
        FeatureTap("vae.decoder.up.3.block.2", "s3", vae[3]),
        FeatureTap("vae.decoder.up.2.block.2", "s2", vae[2]),
    )


def noise_schedule(timestep: int) -> tuple[float, float]:
    """``sqrt(abar_t)`` and ``sqrt(1 - abar_t)`` of Stable Diffusion's scaled-linear schedule.

    Computed in float64 and rounded to float32 as the original does: 0.99957491 and 0.02915476 at t = 0.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    abar = np.cumprod(1.0 - betas)[timestep]
    return float(np.float32(np.sqrt(abar))), float(np.float32(np.sqrt(1.0 - abar)))


def fixed_noise(config: OdiseConfig) -> Tensor:
    """The one noise tensor ``(1, 4, h, h)`` that every window shares; it is not part of a released checkpoint."""
    generator = torch.Generator().manual_seed(config.noise_seed)
    return torch.randn(1, 4, config.latent_side, config.latent_side, generator=generator)


class DiffusionFeatures:
    """Reads the taps. A composition over networks that its owner holds: it has no weights of its own."""

    def __init__(self, vae: AutoencoderKL, unet: UNet2DConditionModel, config: OdiseConfig) -> None:
        self.vae = vae
        self.unet = unet
        self.config = config
        self.signal_scale, self.noise_scale = noise_schedule(config.timestep)

    def to_vae_pixels(self, windows: Tensor) -> Tensor:
        """``(N, 3, s, s)`` in [0, 1] to ``(N, 3, window, window)`` in [-1, 1]."""
        return resample(windows, self.config.window, self.config.window, "bicubic") * 2.0 - 1.0

    def encode(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """VAE encoder: the posterior mean ``(N, 4, h, h)``, unscaled, and taps 0 and 1."""
        encoder = self.vae.encoder
        taps: list[Tensor] = []
        hidden = encoder.conv_in(pixels)
        for level, block in enumerate(encoder.down_blocks):
            for index, resnet in enumerate(block.resnets):
                if level >= 2 and index == 1:
                    taps.append(hidden)
                hidden = resnet(hidden, None)
            for downsample in block.downsamplers or ():
                hidden = downsample(hidden)
        hidden = encoder.mid_block(hidden, None)
        hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(hidden)))
        moments = self.vae.quant_conv(hidden)
        return moments[:, :4], taps

    def add_noise(self, mean: Tensor, noise: Tensor) -> Tensor:
        """The noised latent that the UNet sees; at t = 0 a little noise is added all the same."""
        latent = mean * self.config.vae.scaling_factor
        return self.signal_scale * latent + self.noise_scale * noise

    def decode_prefix(self, mean: Tensor) -> list[Tensor]:
        """VAE decoder on the clean mean up to its last tap: taps 6 and 7."""
        decoder = self.vae.decoder
        hidden = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(mean)), None)
        deepest, second = decoder.up_blocks[0], decoder.up_blocks[1]
        hidden = deepest.resnets[1](deepest.resnets[0](hidden, None), None)
        taps = [hidden]
        hidden = deepest.upsamplers[0](deepest.resnets[2](hidden, None))
        taps.append(second.resnets[1](second.resnets[0](hidden, None), None))
        return taps

    def denoise_prefix(self, latent: Tensor, context: Tensor, time_increment: Tensor) -> list[Tensor]:
        """UNet up to its last tap: taps 2 to 5.

        Args:
            latent: noised, ``(N, 4, h, h)``.
            context: ``(N, T, context_dim)``.
            time_increment: ``(N, time_dim)``, added to the time embedding.
        """
        unet = self.unet
        steps = torch.full((1,), self.config.timestep, dtype=torch.int64, device=latent.device)
        time = unet.time_embedding(unet.time_proj(steps).to(latent.dtype)) + time_increment
        hidden = unet.conv_in(latent)
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, states = _run_down(block, hidden, time, context)
            skips += states
        hidden = unet.mid_block.resnets[0](hidden, time)
        hidden = _attend(unet.mid_block.attentions[0], hidden, context)
        hidden = unet.mid_block.resnets[1](hidden, time)

        taps: list[Tensor] = []
        for level, block in enumerate(unet.up_blocks):
            attentions = getattr(block, "attentions", None)
            for index, resnet in enumerate(block.resnets):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
                if index == 2:
                    taps.append(hidden)
                    if level == 3:
                        return taps
                hidden = resnet(hidden, time)
                if attentions is not None:
                    hidden = _attend(attentions[index], hidden, context)
            hidden = block.upsamplers[0](hidden)
        raise AssertionError("unreachable: the fourth up block returns")

    def __call__(self, windows: Tensor, noise: Tensor, context: Tensor, time_increment: Tensor) -> list[Tensor]:
        """All eight taps of windows ``(N, 3, s, s)`` in [0, 1], in the order of :func:`feature_taps`."""
        mean, encoder_taps = self.encode(self.to_vae_pixels(windows))
        unet_taps = self.denoise_prefix(self.add_noise(mean, noise), context, time_increment)
        return encoder_taps + unet_taps + self.decode_prefix(mean)


def _run_down(block: torch.nn.Module, hidden: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One level on the way down: its result and the states that the way up concatenates."""
    states: list[Tensor] = []
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        hidden = resnet(hidden, time)
        if attentions is not None:
            hidden = _attend(attentions[index], hidden, context)
        states.append(hidden)
    for downsample in block.downsamplers or ():
        hidden = downsample(hidden)
        states.append(hidden)
    return hidden, states


def _attend(transformer: torch.nn.Module, hidden: Tensor, context: Tensor) -> Tensor:
    out: Tensor = transformer(hidden, encoder_hidden_states=context, return_dict=False)[0]
    return out
