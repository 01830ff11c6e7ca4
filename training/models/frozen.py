"""Builds the frozen networks from a config: Stable Diffusion through diffusers, CLIP through open_clip."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from transformers import CLIPTextConfig, CLIPTextModel

from training.config import ClipConfig, SdTextConfig, UnetConfig, VaeConfig


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """Stable Diffusion's autoencoder with fresh weights."""
    levels = len(config.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=4,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scaling_factor,
    )


def build_unet(config: UnetConfig, latent_side: int) -> UNet2DConditionModel:
    """Stable Diffusion 1.x's UNet with fresh weights.

    diffusers' ``attention_head_dim`` is, for this model family, the *number* of heads.
    """
    return UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=4,
        out_channels=4,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.heads,
        norm_num_groups=config.norm_groups,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def build_sd_text(config: SdTextConfig) -> CLIPTextModel:
    """The text encoder that conditions the UNet; its last hidden state after the final layer norm is the context."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            hidden_act="quick_gelu",
            bos_token_id=config.start_token,
            eos_token_id=config.end_token,
            pad_token_id=config.end_token,
        )
    )


def build_clip(config: ClipConfig) -> CLIP:
    """CLIP with a ViT image tower; OpenAI's weights use QuickGELU."""
    return CLIP(
        embed_dim=config.embed_dim,
        vision_cfg=CLIPVisionCfg(
            layers=config.layers,
            width=config.width,
            head_width=config.head_width,
            patch_size=config.patch_size,
            image_size=config.image_size,
        ),
        text_cfg=CLIPTextCfg(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
        ),
        quick_gelu=config.quick_gelu,
    )


@torch.no_grad()
def null_text_embedding(encoder: CLIPTextModel, config: SdTextConfig) -> torch.Tensor:
    """The context for the empty prompt, float32 ``(1, context_length, width)``: start token, then end tokens."""
    ids = torch.full((1, config.context_length), config.end_token, dtype=torch.int64)
    ids[0, 0] = config.start_token
    device = next(encoder.parameters()).device
    embedding: torch.Tensor = encoder(input_ids=ids.to(device)).last_hidden_state
    return embedding.float()
