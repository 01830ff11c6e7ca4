"""open_clip's transformer layers, called so that queries may differ from keys and graphs export cleanly.

open_clip runs ``nn.MultiheadAttention`` on whole token sequences. The mask classifier needs its layers with separate
query tokens (odise.md section 5.2), and ``nn.MultiheadAttention`` switches to a fused kernel in eval mode that the
ONNX exporter cannot follow; both are served by reading its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


def attention(layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """``nn.MultiheadAttention`` with batch-first tokens and no dropout.

    Args:
        layer: holds the weights (``in_proj_weight`` of equal query, key and value widths).
        query: ``(B, M, C)``.
        key: ``(B, N, C)``.
        value: ``(B, N, C)``.
        mask: None, or bool broadcastable to ``(B, heads, M, N)``, True where attention is allowed.

    Returns:
        ``(B, M, C)``.
    """
    weight_q, weight_k, weight_v = layer.in_proj_weight.chunk(3)
    bias_q, bias_k, bias_v = layer.in_proj_bias.chunk(3)
    q = split_heads(F.linear(query, weight_q, bias_q), layer.num_heads)
    k = split_heads(F.linear(key, weight_k, bias_k), layer.num_heads)
    v = split_heads(F.linear(value, weight_v, bias_v), layer.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, M, C / heads)
    out: Tensor = layer.out_proj(attended.transpose(1, 2).flatten(2))
    return out


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """``(B, N, C)`` to ``(B, heads, N, C / heads)``."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def feed_forward(block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
    """The second half of a pre-norm layer, residual included."""
    out: Tensor = tokens + block.mlp(block.ln_2(tokens))
    return out


def self_attention_layer(block: ResidualAttentionBlock, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """One whole pre-norm layer on ``(B, N, C)``."""
    normed = block.ln_1(tokens)
    return feed_forward(block, tokens + attention(block.attn, normed, normed, normed, mask))


def embed_patches(clip: CLIP, pixels: Tensor) -> Tensor:
    """Normalised pixels ``(B, 3, S, S)`` to the tokens that enter layer 0: ``(B, 1 + patches, width)``, CLS first."""
    visual = clip.visual
    patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(patches.shape[0], 1, -1).to(patches.dtype)
    tokens: Tensor = visual.ln_pre(torch.cat([cls, patches], dim=1) + visual.positional_embedding.to(patches.dtype))
    return tokens


def project_image_tokens(clip: CLIP, tokens: Tensor) -> Tensor:
    """Final norm and projection to the joint space: ``(..., width)`` to ``(..., embed_dim)``, not normalised."""
    out: Tensor = clip.visual.ln_post(tokens) @ clip.visual.proj
    return out
