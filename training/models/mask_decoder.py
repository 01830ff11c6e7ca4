"""Mask decoder (odise.md section 4.2): queries that look only where their last mask was."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from training.config import HeadConfig
from training.models.clip_layers import attention
from training.models.mask_embedding import MaskEmbedding, Mlp
from training.models.pixel_decoder import PixelDecoder, sine_position


@dataclass
class MaskPrediction:
    """What one prediction head says about Q masks."""

    mask_logits: Tensor
    """``(B, Q, H / 4, W / 4)``."""
    mask_embedding: Tensor
    """Classification embedding ``(B, Q, classification_dim)``, not normalised."""
    object_logits: Tensor | None
    """``(B, Q, 2)``, [object, no object]; only with caption supervision."""
    pooled: Tensor
    """z of odise.md section 4.3, ``(B, Q, hidden_dim)``."""
    aux: list[MaskPrediction] = field(default_factory=list)
    """Predictions after every earlier layer, initial queries first; filled only on request."""


class MaskDecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; post-norm, no dropout."""

    def __init__(self, head: HeadConfig) -> None:
        super().__init__()
        dim, heads = head.hidden_dim, head.attention_heads
        self.cross_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, head.mask_decoder_ffn)
        self.linear2 = nn.Linear(head.mask_decoder_ffn, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, states: Tensor, query_position: Tensor, memory: Tensor, memory_position: Tensor, allowed: Tensor
    ) -> Tensor:
        """Refine queries ``(B, Q, C)`` from memory ``(B, N, C)``; ``allowed`` is bool ``(B, Q, N)``."""
        queries = states + query_position
        attended = attention(self.cross_attention, queries, memory + memory_position, memory, allowed[:, None])
        states = self.cross_norm(states + attended)
        queries = states + query_position
        states = self.self_norm(states + attention(self.self_attention, queries, queries, states, None))
        out: Tensor = self.ffn_norm(states + self.linear2(F.relu(self.linear1(states))))
        return out


class MaskDecoder(nn.Module):
    """Turns mask features and refined levels into masks."""

    def __init__(self, head: HeadConfig, with_object_logits: bool) -> None:
        super().__init__()
        dim = head.hidden_dim
        self.query_features = nn.Embedding(head.queries, dim)
        self.query_positions = nn.Embedding(head.queries, dim)
        self.level_embedding = nn.Embedding(3, dim)
        self.layers = nn.ModuleList(MaskDecoderLayer(head) for _ in range(head.mask_decoder_layers))
        self.norm = nn.LayerNorm(dim)
        self.mask_kernel = Mlp(dim)
        self.object_classifier = nn.Linear(dim, 2) if with_object_logits else None

    def memories(self, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Flattened levels s5, s4, s3 with their level embedding, ``(B, N, C)``, and positions ``(1, N, C)``."""
        flattened = []
        for index, level in enumerate(levels):
            memory = level.flatten(2).transpose(1, 2) + self.level_embedding.weight[index]
            position = sine_position(level.shape[2], level.shape[3], level.shape[1], level)
            flattened.append((memory, position))
        return flattened

    def initial_states(self, batch: int) -> tuple[Tensor, Tensor]:
        """Query features ``(B, Q, C)`` and positions ``(1, Q, C)``."""
        return self.query_features.weight[None].expand(batch, -1, -1), self.query_positions.weight[None]

    def masks(self, normed_states: Tensor, features: Tensor) -> Tensor:
        """Mask logits ``(B, Q, h, w)`` of normed states ``(B, Q, C)`` on features ``(B, C, h, w)``."""
        return (self.mask_kernel(normed_states) @ features.flatten(2)).unflatten(2, features.shape[2:])

    def forward(self, mask_features: Tensor, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Inference: the final normed states ``(B, Q, C)`` and mask logits ``(B, Q, H / 4, W / 4)``.

        Attention masks of inner layers are needed at the resolution of a level only. Resizing is linear in the mask
        logits, and these are linear in the features, so the features are resized once a level instead of Q masks at
        every layer.
        """
        memories = self.memories(levels)
        resized = [
            F.interpolate(mask_features, size=level.shape[2:], mode="bilinear", align_corners=False) for level in levels
        ]
        states, query_position = self.initial_states(mask_features.shape[0])
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            allowed = attention_mask(self.masks(self.norm(states), resized[level]))
            states = layer(states, query_position, *memories[level], allowed)
        normed = self.norm(states)
        return normed, self.masks(normed, mask_features)

    def all_states(self, mask_features: Tensor, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Training: normed states and full-size mask logits of the initial queries and after every layer."""
        memories = self.memories(levels)
        states, query_position = self.initial_states(mask_features.shape[0])
        normed = self.norm(states)
        outputs = [(normed, self.masks(normed, mask_features))]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            size = levels[level].shape[2:]
            logits = F.interpolate(outputs[-1][1].detach(), size=size, mode="bilinear", align_corners=False)
            states = layer(states, query_position, *memories[level], attention_mask(logits))
            normed = self.norm(states)
            outputs.append((normed, self.masks(normed, mask_features)))
        return outputs


def attention_mask(logits: Tensor) -> Tensor:
    """The pixels that cross-attention may look at: bool ``(B, Q, N)`` from mask logits ``(B, Q, h, w)``.

    A query whose mask is empty would have nothing to attend to; it may look everywhere (Mask2Former, section 3.2.1).
    """
    allowed = (logits.detach() >= 0).flatten(2)
    return allowed | ~allowed.any(dim=2, keepdim=True)


class MaskGenerator(nn.Module):
    """Pixel decoder, mask decoder and mask embedding: pyramid levels in, masks and their embeddings out."""

    def __init__(self, head: HeadConfig, with_object_logits: bool) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(head)
        self.mask_decoder = MaskDecoder(head, with_object_logits)
        self.mask_embedding = MaskEmbedding(head.hidden_dim, head.classification_dim)

    def forward(self, levels: dict[str, Tensor], aux: bool = False) -> MaskPrediction:
        """Predict masks from ``s2..s5``; with ``aux`` also those of every earlier layer, for the losses."""
        mask_features, refined = self.pixel_decoder(levels)
        return self.predict(mask_features, refined, aux)

    def predict(self, mask_features: Tensor, refined: list[Tensor], aux: bool = False) -> MaskPrediction:
        """The part behind the pixel decoder; see :meth:`PixelDecoder.forward` for the arguments."""
        if not aux:
            normed, mask_logits = self.mask_decoder(mask_features, refined)
            return self.head(normed, mask_logits, mask_features)
        outputs = self.mask_decoder.all_states(mask_features, refined)
        heads = [self.head(normed, mask_logits, mask_features) for normed, mask_logits in outputs]
        heads[-1].aux = heads[:-1]
        return heads[-1]

    def head(self, normed_states: Tensor, mask_logits: Tensor, mask_features: Tensor) -> MaskPrediction:
        """One prediction head's output from normed states ``(B, Q, C)`` and their masks ``(B, Q, H / 4, W / 4)``."""
        embedding, pooled = self.mask_embedding(normed_states, mask_logits, mask_features)
        classifier = self.mask_decoder.object_classifier
        object_logits = classifier(normed_states) if classifier is not None else None
        return MaskPrediction(mask_logits, embedding, object_logits, pooled)
