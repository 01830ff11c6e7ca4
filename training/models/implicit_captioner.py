"""Implicit captioner (paper section 3.2): a CLIP image embedding stands in for the caption of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImplicitCaptioner(nn.Module):
    """Turns a CLIP image embedding into UNet conditioning, through gates that start closed.

    With gates at zero the conditioning is that of the empty caption; training opens them (odise.md section 2.2).
    """

    def __init__(self, embed_dim: int, context_length: int, context_dim: int, time_dim: int) -> None:
        super().__init__()
        self.caption_gate = nn.Parameter(torch.zeros(1, context_length, context_dim))
        self.caption_position = nn.Parameter(torch.empty(1, context_length, context_dim))
        self.caption_projection = nn.Linear(embed_dim, context_dim)
        self.time_gate = nn.Parameter(torch.zeros(time_dim))
        self.time_position = nn.Parameter(torch.empty(1, 1, time_dim))
        self.time_projection = nn.Linear(embed_dim, time_dim)
        for position in (self.caption_position, self.time_position):
            nn.init.trunc_normal_(position, std=0.02)

    def forward(self, image_embedding: Tensor, null_text_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Conditioning for one window each.

        Args:
            image_embedding: ``(N, embed_dim)``, not normalised.
            null_text_embedding: ``(1, context_length, context_dim)``, the text encoder's output for "".

        Returns:
            The cross-attention context ``(N, context_length, context_dim)`` and the increment of the time embedding
            ``(N, time_dim)``.
        """
        words = self.caption_projection(image_embedding)[:, None] + self.caption_position
        context = null_text_embedding + torch.tanh(self.caption_gate) * words
        step = self.time_projection(image_embedding) + self.time_position[0]
        return context, torch.tanh(self.time_gate) * step
