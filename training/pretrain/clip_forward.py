"""CLIP's two towers step by step, with region tokens, patch dropout and texts cut to their length."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: Tensor) -> Tensor:
    """OpenAI's normalisation of (N, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(value, device=images.device)[None, :, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def encode_images(model: CLIP, images: Tensor, visible: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """Embeddings of pictures, or of regions of them.

    Args:
        model: The CLIP.
        images: (N, 3, S, S) in [0, 1].
        visible: Optional bool (N, Q, P): patches that each region token may attend to. Region tokens start as copies of
            the class token and attend to it and to their patches; nothing attends to them.
        kept: Optional int64 (N, k): the only patches to process (patch dropout); not together with ``visible``.

    Returns:
        Unnormalised (N, 1 + Q, D): the class token's embedding, then the regions'.
    """
    visual: Any = model.visual
    patches = visual.conv1(normalise(images)).flatten(2).transpose(1, 2)
    positions = visual.positional_embedding
    patches = patches + positions[1:]
    if kept is not None:
        patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
    class_token = (visual.class_embedding + positions[0]).expand(len(images), 1, -1)
    regions = 0 if visible is None else visible.shape[1]
    x = visual.ln_pre(torch.cat([class_token.expand(-1, regions + 1, -1), patches], 1))
    mask = None
    if visible is not None:
        everything = visible.new_ones(len(images), 1 + patches.shape[1], 1 + patches.shape[1])
        region_rows = torch.cat([visible.new_ones(len(images), regions, 1), visible], -1)
        mask = torch.cat([region_rows, everything], 1)[:, None]
    for block in visual.transformer.resblocks:
        heads = block.attn.num_heads
        joint = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in joint.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(query, key[:, :, regions:], value[:, :, regions:], attn_mask=mask)
        x = x + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    tokens = torch.cat([x[:, regions : regions + 1], x[:, :regions]], 1)
    return visual.ln_post(tokens) @ visual.proj


def encode_tokens(model: CLIP, tokens: Tensor) -> Tensor:
    """Unnormalised text embeddings (L, D) of token ids (L, T); trailing padding is cut, which changes nothing."""
    length = int(tokens.argmax(-1).max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection
