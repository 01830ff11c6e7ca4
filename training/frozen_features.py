"""Results of the frozen networks for pictures, and how the trained part goes on from there.

The UNet is not among them: its conditioning, the implicit captioner, is trained, so it runs (with gradients to the
conditioning) each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odise_rt.windows import WindowGrid, window_grid
from training.models.clip_features import ClipFeatureOdise
from training.models.odise import Odise
from training.models.windows import cut_windows, stitch_levels

_VAE_ARRAYS = ("mean", "encoder_s2", "encoder_s3", "decoder_s3", "decoder_s2")
_TOKENS = "tokens_"
PIXELS_AT_ONCE = 4 * 512 * 512
"""Pixels of the windows that go through the networks together where memory is to be saved: of one picture at full size.
Fewer would keep a GPU less busy, and have FSDP gather weights more often."""


@dataclass(frozen=True)
class FrozenFeatures:
    """Results for N windows of each of B views, flattened to B * N.

    Diffusion features: ``mean`` (B * N, 4, h, h) is the posterior mean, unscaled; ``encoder_s2``, ``encoder_s3``,
    ``decoder_s3`` and ``decoder_s2`` are the VAE's taps, ``image_embedding`` (B * N, D) is CLIP's. CLIP features:
    ``tokens_<depth>`` (B * N, width, grid, grid).
    """

    arrays: dict[str, Tensor]

    def to(self, device: torch.device | str) -> FrozenFeatures:
        """Copies in float32 on a device."""
        return FrozenFeatures({name: array.to(device, torch.float32) for name, array in self.arrays.items()})

    def split(self, parts: int) -> list[FrozenFeatures]:
        """The features of equal parts of the views, in order; ``parts`` divides B."""
        pieces = zip(*(array.chunk(parts) for array in self.arrays.values()), strict=True)
        return [FrozenFeatures(dict(zip(self.arrays, piece, strict=True))) for piece in pieces]


@dataclass(frozen=True)
class FrozenNetwork:
    """A network, or part of one, whose results are kept together."""

    name: str
    module: nn.Module
    """All weights that the results depend on."""
    compute: Callable[[Tensor], dict[str, Tensor]]
    """Windows (B * N, 3, s, s) in [0, 1] to arrays by name."""


def frozen_networks(model: Odise) -> tuple[FrozenNetwork, ...]:
    """The networks that training reads of a model."""
    if isinstance(model, ClipFeatureOdise):
        clip_model = model

        def tokens(windows: Tensor) -> dict[str, Tensor]:
            return {f"{_TOKENS}{depth}": found for depth, found in clip_model.token_maps(windows).items()}

        return (FrozenNetwork("clip_tokens", model.clip, tokens),)

    def vae(windows: Tensor) -> dict[str, Tensor]:
        features = model.diffusion_features
        mean, encoder_taps = features.encode(features.to_vae_pixels(windows))
        return dict(zip(_VAE_ARRAYS, (mean, *encoder_taps, *features.decode_prefix(mean)), strict=True))

    def clip(windows: Tensor) -> dict[str, Tensor]:
        return {"image_embedding": model.clip_image(windows)}

    return FrozenNetwork("vae", model.vae, vae), FrozenNetwork("clip", model.clip, clip)


@torch.no_grad()
def network_features(model: Odise, network: FrozenNetwork, images: Tensor) -> dict[str, Tensor]:
    """Arrays of one network for all windows of images (B, 3, H, W) in [0, 1]."""
    return network.compute(cut_windows(images, window_grid(images.shape[2], images.shape[3], model.config.window)))


def frozen_features(model: Odise, images: Tensor) -> FrozenFeatures:
    """Results of all frozen networks for images (B, 3, H, W) in [0, 1], a picture or so at a time."""
    together = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    arrays: dict[str, Tensor] = {}
    for network in frozen_networks(model):
        found = [network_features(model, network, some) for some in images.split(together)]
        arrays |= {name: torch.cat([of[name] for of in found]) for name in found[0]}
    return FrozenFeatures(arrays)


def pyramid_from_features(
    model: Odise,
    features: FrozenFeatures,
    grid: WindowGrid,
    caption_context: Tensor | None = None,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Stitched levels s2..s5 of views whose frozen features are known: the trained half of ``Odise.pyramid``.

    Args:
        model: supplies the UNet and the trained parts.
        features: of B views.
        grid: their N windows.
        caption_context: (B, T, context_dim), what the UNet is told in place of the empty caption; None: nothing else.
        recompute: keep no activations and compute them again in the backward pass, :data:`PIXELS_AT_ONCE` at a time.
    """
    context = None if caption_context is None else caption_context.repeat_interleave(len(grid), dim=0)
    if not recompute:
        return stitch_levels(window_levels(model, features.arrays, grid.side, context), grid)
    together = max(1, PIXELS_AT_ONCE // grid.side**2)
    cut = [array.split(together) for array in features.arrays.values()]
    contexts = [None] * len(cut[0]) if context is None else context.split(together)
    levels: list[dict[str, Tensor]] = []
    for *arrays, some in zip(*cut, contexts, strict=True):
        named = dict(zip(features.arrays, arrays, strict=True))
        levels.append(checkpoint(window_levels, model, named, grid.side, some, use_reentrant=False))
    return stitch_levels({name: torch.cat([of[name] for of in levels]) for name in levels[0]}, grid)


def window_levels(
    model: Odise, arrays: Mapping[str, Tensor], side: int, caption_context: Tensor | None = None
) -> dict[str, Tensor]:
    """Levels s2..s5 of W windows, each by itself.

    Args:
        model: supplies the UNet and the trained parts.
        arrays: of :class:`FrozenFeatures`, of W windows.
        side: of a window in pixels.
        caption_context: (W, T, context_dim); None: the empty caption's.
    """
    if isinstance(model, ClipFeatureOdise):
        maps = {int(name.removeprefix(_TOKENS)): array for name, array in arrays.items()}
        return model.levels_of_maps(maps, side)
    base = model.null_text_embedding if caption_context is None else caption_context
    context, time = model.implicit_captioner(arrays["image_embedding"], base)
    latent = model.diffusion_features.add_noise(arrays["mean"], model.noise)
    unet_taps = model.diffusion_features.denoise_prefix(latent, context, time)
    encoder_taps = [arrays["encoder_s2"], arrays["encoder_s3"]]
    decoder_taps = [arrays["decoder_s3"], arrays["decoder_s2"]]
    levels: dict[str, Tensor] = model.feature_pyramid([*encoder_taps, *unet_taps, *decoder_taps], side)
    return levels
