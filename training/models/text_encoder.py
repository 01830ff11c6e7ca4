"""CLIP's text tower: words to the embeddings that masks are compared with."""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from torch import Tensor

from training.models.clip_layers import self_attention_layer


class TextEncoder:
    """Embeds token ids. A composition over a CLIP that its owner holds: it has no weights of its own."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip

    def __call__(self, tokens: Tensor) -> Tensor:
        """Embed texts.

        Args:
            tokens: int64 ``(L, T)``, start token first, zero-padded after the end token, which is the largest id.

        Returns:
            ``(L, embed_dim)``, not normalised: the projected state at the end token.
        """
        clip = self.clip
        length = tokens.shape[1]
        hidden = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        # The first row's query may only see itself, and so on: True where attention is allowed.
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for block in clip.transformer.resblocks:
            hidden = self_attention_layer(block, hidden, causal)
        end = tokens.argmax(dim=1)[:, None, None].expand(-1, 1, hidden.shape[2])
        pooled = clip.ln_final(hidden).gather(1, end)[:, 0]
        out: Tensor = pooled @ clip.text_projection
        return out
