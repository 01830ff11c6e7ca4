"""The numpy definitions that the CUDA kernels are held to, held to the model's own modules."""

from __future__ import annotations

import numpy as np
import torch

from odise_rt.kernels.reference import deformable_attention, mask_pool
from training.models.deformable_attention import DeformableAttention
from training.models.mask_pooling import mask_pool as torch_mask_pool


def test_mask_pool_is_the_models() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, 7, generator=generator, dtype=torch.float64)
    logits[0, 1], logits[1, 2], logits[1, 3] = -1.0, 1.0, 0.0
    features = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    pooled, areas = mask_pool(logits.numpy(), features.numpy())
    # The model adds 1e-8 to the area.
    np.testing.assert_allclose(pooled, torch_mask_pool(logits, features).numpy(), rtol=2e-8, atol=1e-12)
    np.testing.assert_array_equal(areas, (logits > 0).sum(dim=(2, 3)).numpy())


@torch.no_grad()
def test_deformable_attention_is_the_models() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(channels=24, heads=4, levels=3, points=4).double()
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.attention_weights.weight)
    shapes = [(3, 4), (6, 8), (12, 16)]
    memory, queries = torch.randn(2, 252, 24).double(), torch.randn(2, 9, 24).double()
    references = torch.rand(1, 9, 2)
    expected = layer(queries, references.double(), memory, shapes)
    attended = deformable_attention(
        layer.value_projection(memory).unflatten(2, (4, 6)).numpy(),
        shapes,
        references.numpy(),
        layer.sampling_offsets(queries).reshape(2, 9, 4, 3, 4, 2).numpy(),
        layer.attention_weights(queries).reshape(2, 9, 4, 12).numpy(),
    )
    ours = layer.output_projection(torch.from_numpy(attended).flatten(2))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
