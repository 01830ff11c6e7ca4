from __future__ import annotations

import math

import numpy as np
import torch

from training.models.deformable_attention import DeformableAttention, sample_by_gather, sample_by_grid


def naive_samples(image: np.ndarray, locations: np.ndarray) -> np.ndarray:
    """Bilinear sampling with zeros outside, one sample at a time in float64."""
    batch, heads, channels, height, width = image.shape
    _, _, queries, points, _ = locations.shape
    out = np.zeros((batch, heads, channels, queries, points))
    for b, h, q, p in np.ndindex(batch, heads, queries, points):
        x, y = locations[b, h, q, p, 0] * width - 0.5, locations[b, h, q, p, 1] * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    out[b, h, :, q, p] += weight * image[b, h, :, row, column]
    return out


def test_both_samplers_equal_the_definition_inside_and_outside() -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 2, 3, 5, 7, generator=generator)
    locations = torch.rand(2, 2, 6, 4, 2, generator=generator) * 1.6 - 0.3  # a quarter lies outside
    expected = torch.from_numpy(naive_samples(image.double().numpy(), locations.double().numpy())).float()
    torch.testing.assert_close(sample_by_grid(image, locations), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample_by_gather(image, locations), expected, atol=1e-5, rtol=0)


def test_module_is_the_same_with_either_sampler() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(channels=16, heads=4, levels=2, points=4)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.attention_weights.weight)
    shapes = [(3, 4), (6, 8)]
    memory, queries, references = torch.randn(2, 60, 16), torch.randn(2, 9, 16), torch.rand(1, 9, 2)
    by_grid = layer(queries, references, memory, shapes)
    layer.sampling = "gather"
    torch.testing.assert_close(layer(queries, references, memory, shapes), by_grid, atol=1e-5, rtol=0)
    assert by_grid.std() > 0.01


def test_fresh_offsets_are_rings() -> None:
    layer = DeformableAttention(channels=16, heads=8, levels=3, points=4)
    offsets = layer.sampling_offsets.bias.unflatten(0, (8, 3, 4, 2))
    radius = offsets.abs().amax(dim=-1)
    torch.testing.assert_close(radius, torch.arange(1.0, 5.0).expand(8, 3, 4))
    torch.testing.assert_close(offsets[0, 0, 0], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
