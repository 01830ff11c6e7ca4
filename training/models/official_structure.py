"""The official implementation's *amount of work* on our modules, as an honest baseline for speed and memory.

Computes what the published code computes and then throws away or could share (odise.md sections 2.4 and 5.2): windows
one by one; the text encoder on "" for every window; the whole UNet and the whole VAE decoder; full-size mask logits and
mask embeddings in every prediction head, with the pooling evaluated twice; CLIP on the long sequence [Q mask tokens,
CLS, patches]. Results equal the pruned structure's up to rounding; a test holds both to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odise_rt.windows import window_grid
from training.models import frozen
from training.models.clip_image_encoder import embed_windows
from training.models.clip_layers import embed_patches, project_image_tokens, self_attention_layer
from training.models.diffusion_features import DiffusionFeatures
from training.models.feature_pyramid import LEVEL_STRIDES
from training.models.mask_decoder import MaskPrediction
from training.models.mask_pooling import mask_pool
from training.models.windows import cut_windows, stitch_levels

if TYPE_CHECKING:
    from training.models.odise import Odise


def official_forward(model: Odise, images: Tensor) -> MaskPrediction:
    """Padded images ``(B, 3, H, W)`` in [0, 1] to mask predictions."""
    grid = window_grid(images.shape[2], images.shape[3], model.config.window)
    windows = cut_windows(images, grid)
    embeddings = torch.cat([official_clip_image(model, window[None]) for window in windows])
    levels = official_unet_tap(model, windows, embeddings, model.noise, model.null_text_embedding)
    return official_decode_masks(model, stitch_levels(dict(zip(LEVEL_STRIDES, levels, strict=True)), grid))


def official_clip_image(model: Odise, windows: Tensor) -> Tensor:
    """:meth:`Odise.clip_image` with all tokens through the last layer, of which only CLS is read."""
    tokens = embed_windows(model.clip, model.clip_pixels, windows, model.config.window)
    for block in model.clip.visual.transformer.resblocks:
        tokens = self_attention_layer(block, tokens)
    return project_image_tokens(model.clip, tokens[:, 0])


def official_unet_tap(
    model: Odise, windows: Tensor, image_embedding: Tensor, noise: Tensor, null_text_embedding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:meth:`Odise.unet_tap`, one window after the other and with nothing left out."""
    features = model.diffusion_features
    outputs = []
    for window, embedding in zip(windows.split(1), image_embedding.split(1), strict=True):
        if model.sd_text is not None:
            frozen.null_text_embedding(model.sd_text, model.config.sd_text)
        context, time_increment = model.implicit_captioner(embedding, null_text_embedding)
        mean, encoder_taps = features.encode(features.to_vae_pixels(window))
        unet_taps = _whole_unet(model, features.add_noise(mean, noise), context, time_increment)
        decoder_taps = _whole_decoder(features, mean)
        outputs.append(model.feature_pyramid(encoder_taps + unet_taps + decoder_taps, window.shape[-1]))
    s2, s3, s4, s5 = (torch.cat([output[name] for output in outputs]) for name in LEVEL_STRIDES)
    return s2, s3, s4, s5


def _whole_unet(model: Odise, latent: Tensor, context: Tensor, time_increment: Tensor) -> list[Tensor]:
    unet = model.unet
    taps: list[Tensor] = []

    def keep_input(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        taps.append(args[0])

    def add_increment(_module: torch.nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + time_increment

    hooks = [block.resnets[2].register_forward_pre_hook(keep_input) for block in unet.up_blocks]
    hooks.append(unet.time_embedding.register_forward_hook(add_increment))
    try:
        unet(latent, model.config.timestep, encoder_hidden_states=context, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return taps


def _whole_decoder(features: DiffusionFeatures, mean: Tensor) -> list[Tensor]:
    vae = features.vae
    taps: list[Tensor] = []

    def keep_input(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        taps.append(args[0])

    blocks = vae.decoder.up_blocks
    hooks = [blocks[index].resnets[2].register_forward_pre_hook(keep_input) for index in (0, 1)]
    try:
        vae.decoder(vae.post_quant_conv(mean))
    finally:
        for hook in hooks:
            hook.remove()
    return taps


def official_decode_masks(model: Odise, levels: dict[str, Tensor]) -> MaskPrediction:
    """:meth:`Odise.decode_masks` with full-size masks and embeddings in every prediction head."""
    generator = model.mask_generator
    mask_features, refined = generator.pixel_decoder(levels)
    states = generator.mask_decoder.all_states(mask_features, refined)
    for _normed, mask_logits in states:
        mask_pool(mask_logits, mask_features)  # evaluated, dropped, and evaluated again in the embedding below
    predictions = [generator.head(normed, mask_logits, mask_features) for normed, mask_logits in states]
    return predictions[-1]


def official_clip_mask(model: Odise, image: Tensor, mask_logits: Tensor) -> Tensor:
    """CLIP on [Q mask tokens, CLS, patches] with a ``(Q + 1 + patches)`` square attention mask: ``(B, Q, D)``."""
    clip, queries = model.clip, mask_logits.shape[1]
    patches = embed_patches(clip, model.clip_pixels(image, "bilinear"))
    tokens = torch.cat([patches[:, :1].expand(-1, queries, -1), patches], dim=1)
    allowed = torch.zeros(image.shape[0], tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=image.device)
    allowed[:, queries:, queries:] = True
    allowed[:, :queries, queries:] = model.mask_clip.visible_tokens(mask_logits)
    for block in clip.visual.transformer.resblocks:
        tokens = self_attention_layer(block, tokens, allowed[:, None])
    return project_image_tokens(clip, tokens[:, :queries])
