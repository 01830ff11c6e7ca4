"""Mask classifier (paper eq. 4): cosine of mask embedding and word embedding, best synonym of a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskClassifier(nn.Module):
    """Projects CLIP text embeddings into the space of mask embeddings."""

    def __init__(self, embed_dim: int, classification_dim: int, with_no_object: bool) -> None:
        super().__init__()
        self.text_projection = nn.Linear(embed_dim, classification_dim)
        self.no_object_embedding: nn.Parameter | None = None
        """Stands for the text embedding of "no object", ``(1, embed_dim)``; label supervision only."""
        if with_no_object:
            self.no_object_embedding = nn.Parameter(torch.randn(1, embed_dim) * embed_dim**-0.5)

    def project_text(self, text_embedding: Tensor) -> Tensor:
        """``(L, embed_dim)`` as CLIP gives it to ``(L, classification_dim)``, not normalised."""
        out: Tensor = self.text_projection(text_embedding)
        return out

    def forward(
        self, mask_embedding: Tensor, projected_text: Tensor, synonym_counts: Sequence[int], logit_scale: Tensor
    ) -> Tensor:
        """Class logits.

        Args:
            mask_embedding: ``(B, Q, classification_dim)``.
            projected_text: ``(L, classification_dim)`` of all synonyms, class by class.
            synonym_counts: how many of the L belong to each of the K classes.
            logit_scale: scalar.

        Returns:
            ``(B, Q, K)``, or ``(B, Q, K + 1)`` with "no object" last under label supervision.
        """
        logits = cosine(mask_embedding, projected_text) * logit_scale
        logits = best_synonym(logits, synonym_counts)
        if self.no_object_embedding is None:
            return logits
        no_object = cosine(mask_embedding, self.project_text(self.no_object_embedding)) * logit_scale
        return torch.cat([logits, no_object], dim=-1)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of ``(..., M, C)`` with ``(L, C)``: ``(..., M, L)``."""
    return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).transpose(-1, -2)


def best_synonym(logits: Tensor, synonym_counts: Sequence[int]) -> Tensor:
    """Maximum over the synonyms of each class: ``(..., L)`` to ``(..., K)``."""
    if all(count == 1 for count in synonym_counts):
        return logits
    return torch.stack([part.amax(dim=-1) for part in logits.split(list(synonym_counts), dim=-1)], dim=-1)
