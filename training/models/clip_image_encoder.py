"""CLIP's image tower on a window: the input of the implicit captioner (paper section 3.2)."""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from training.models.clip_layers import (
    attention,
    embed_patches,
    feed_forward,
    project_image_tokens,
    self_attention_layer,
)
from training.models.resampling import Filter, resample

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipPixels(nn.Module):
    """Resizes [0, 1] images to CLIP's input square and normalises them. No weights, no antialiasing, no clamping."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(OPENAI_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, kind: Filter) -> Tensor:
        """``(B, 3, h, w)`` in [0, 1] to normalised ``(B, 3, S, S)``; the aspect ratio is not kept."""
        return (resample(images, self.image_size, self.image_size, kind) - self.mean) / self.std


def embed_windows(clip: CLIP, pixels: ClipPixels, windows: Tensor, side: int) -> Tensor:
    """Windows ``(N, 3, s, s)`` in [0, 1] to the tokens that enter layer 0: ``(N, 1 + patches, width)``, CLS first.

    As in the published model they are brought to the model's window side first and to CLIP's side second, both bicubic.
    """
    return embed_patches(clip, pixels(resample(windows, side, side, "bicubic"), "bicubic"))


class ClipImageEncoder:
    """CLS embedding of image windows. A composition over a CLIP that its owner holds: it has no weights of its own."""

    def __init__(self, clip: CLIP, pixels: ClipPixels, window: int) -> None:
        self.clip = clip
        self.pixels = pixels
        self.window = window

    def __call__(self, windows: Tensor) -> Tensor:
        """Embed windows.

        Args:
            windows: ``(N, 3, s, s)`` in [0, 1].

        Returns:
            ``(N, embed_dim)``, not normalised.
        """
        tokens = embed_windows(self.clip, self.pixels, windows, self.window)
        *blocks, last = self.clip.visual.transformer.resblocks
        for block in blocks:
            tokens = self_attention_layer(block, tokens)
        # Only CLS is read of the last layer: it alone asks there, all tokens answer.
        normed, cls = last.ln_1(tokens), tokens[:, :1]
        cls = feed_forward(last, cls + attention(last.attn, normed[:, :1], normed, normed, None))
        return project_image_tokens(self.clip, cls[:, 0])
