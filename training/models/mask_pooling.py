"""MaskPooling (odise.md section 4.3): mean of the features under a hard mask."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_pool(mask_logits: Tensor, features: Tensor) -> Tensor:
    """Average the features of the pixels whose mask probability exceeds one half.

    Args:
        mask_logits: ``(B, Q, H, W)``; no gradient flows into them, since the threshold has none.
        features: ``(B, C, H, W)``.

    Returns:
        ``(B, Q, C)``; zeros for an empty mask. Under autocast in float32: a sum over 65,536 pixels leaves float16's
        range where the mean feature exceeds one.
    """
    kind = features.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return mask_pool(mask_logits, features.float())
    # sigmoid(x) > 0.5 is x > 0.
    mask = (mask_logits.detach() > 0).to(features.dtype).flatten(2)
    pooled = mask @ features.flatten(2).transpose(1, 2)
    area = mask.sum(dim=2, keepdim=True)
    return pooled / (area + 1e-8)
