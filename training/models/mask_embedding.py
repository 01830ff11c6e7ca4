"""MaskEmbedding (paper section 3.3): the vector z by which a mask is classified against words."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.mask_pooling import mask_pool

MAX_LOGIT_SCALE = 100.0


class Mlp(nn.Module):
    """Three linear layers with ReLU between them, all of one width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., dim)``."""
        for layer in self.layers[:-1]:
            inputs = F.relu(layer(inputs))
        out: Tensor = self.layers[-1](inputs)
        return out


class MaskEmbedding(nn.Module):
    """Pooled features under the mask plus the query's own state.

    Not to be confused with :attr:`MaskDecoder.mask_kernel`, which *makes* the mask.
    """

    def __init__(self, hidden_dim: int, classification_dim: int) -> None:
        super().__init__()
        assert hidden_dim == classification_dim, "the released model has one width for both"
        self.pool_norm = nn.LayerNorm(hidden_dim)
        self.pool_projection = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.mlp = Mlp(hidden_dim)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1.0 / 0.07)))

    @property
    def logit_scale(self) -> Tensor:
        """Factor on the cosine of mask and word, at most 100; scalar."""
        return self.log_logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def forward(self, states: Tensor, mask_logits: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Embed masks.

        Args:
            states: decoder outputs ``(B, Q, C)``.
            mask_logits: ``(B, Q, H, W)``.
            mask_features: ``(B, C, H, W)``.

        Returns:
            The classification embedding ``(B, Q, C)``, not normalised, and z ``(B, Q, C)`` that it was made from.
        """
        z = self.pool_projection(self.pool_norm(mask_pool(mask_logits, mask_features))) + states
        return self.mlp(self.norm(z)), z
