from __future__ import annotations

import pytest
import torch

from training.models.mask_pooling import mask_pool


def test_means_under_hard_masks_and_zeros_for_empty_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 7, generator=generator)
    logits[0, 1] = -1.0  # empty
    logits[1, 2] = 1.0  # everything
    logits[1, 3] = 0.0  # exactly one half is outside: the comparison is strict
    features = torch.randn(2, 3, 5, 7, generator=generator)
    pooled = mask_pool(logits, features)
    for b in range(2):
        for q in range(4):
            mask = logits[b, q] > 0
            expected = features[b][:, mask].double().mean(dim=1) if mask.any() else torch.zeros(3).double()
            torch.testing.assert_close(pooled[b, q].double(), expected, atol=1e-6, rtol=0)


def test_gradient_reaches_features_but_not_masks() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    features = torch.randn(1, 3, 4, 4, requires_grad=True)
    mask_pool(logits, features).sum().backward()
    assert logits.grad is None
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_large_masks_stay_finite_under_autocast(dtype: torch.dtype) -> None:
    """65,536 pixels of a mean of three are more than float16 holds."""
    features = torch.randn(1, 8, 256, 256, generator=torch.Generator().manual_seed(0)) * 0.5 + 3
    masks = torch.ones(1, 2, 256, 256)
    with torch.autocast("cpu", dtype):
        found = mask_pool(masks, features)
        half = mask_pool(masks, features.to(dtype))
    torch.testing.assert_close(found, mask_pool(masks, features))
    torch.testing.assert_close(half, mask_pool(masks, features), rtol=1e-2, atol=1e-2, check_dtype=False)
