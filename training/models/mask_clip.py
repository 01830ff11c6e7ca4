"""Discriminative mask classification with CLIP (paper section 3.5; MaskCLIP, arXiv 2208.08984).

Each mask gets a class token that sees only the patches under it. The published form runs CLIP on the sequence
[Q mask tokens, CLS, patches]. Since nobody attends to a mask token, the CLS and patch stream is plain CLIP, and the
mask tokens are Q extra queries into each layer: the same numbers for less work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from training.models.clip_image_encoder import ClipPixels
from training.models.clip_layers import attention, embed_patches, feed_forward, project_image_tokens
from training.models.resampling import resample


class MaskClip:
    """Embeds masks with CLIP. A composition over a CLIP that its owner holds: it has no weights of its own."""

    def __init__(self, clip: CLIP, pixels: ClipPixels, patch_size: int) -> None:
        self.clip = clip
        self.pixels = pixels
        self.patch_size = patch_size

    def visible_tokens(self, mask_logits: Tensor) -> Tensor:
        """Which of [CLS, patches] each mask token may see: bool ``(B, Q, 1 + patches)``.

        A patch is visible when any pixel in it has mask probability of at least one half; CLS always is.
        """
        size = self.pixels.image_size
        resized = resample(mask_logits, size, size, "bilinear")
        # max commutes with the monotone sigmoid, and sigmoid(x) >= 0.5 is x >= 0.
        visible = (F.max_pool2d(resized, self.patch_size) >= 0).flatten(2)
        cls = torch.ones_like(visible[:, :, :1])
        return torch.cat([cls, visible], dim=2)

    def __call__(self, image: Tensor, mask_logits: Tensor) -> Tensor:
        """Embed masks.

        Args:
            image: ``(B, 3, h, w)`` in [0, 1], without padding.
            mask_logits: ``(B, Q, mh, mw)`` over the *padded* canvas; the slight misregistration is the published
                model's.

        Returns:
            ``(B, Q, embed_dim)``, not normalised.
        """
        visible = self.visible_tokens(mask_logits)[:, None]  # (B, 1, Q, 1 + patches)
        tokens = embed_patches(self.clip, self.pixels(image, "bilinear"))
        masks = tokens[:, :1].expand(-1, mask_logits.shape[1], -1)
        blocks = list(self.clip.visual.transformer.resblocks)
        for index, block in enumerate(blocks):
            normed = block.ln_1(tokens)
            masks = masks + attention(block.attn, block.ln_1(masks), normed, normed, visible)
            masks = feed_forward(block, masks)
            if index + 1 < len(blocks):  # nothing reads the patches after the last layer
                tokens = feed_forward(block, tokens + attention(block.attn, normed, normed, normed, None))
        return project_image_tokens(self.clip, masks)
