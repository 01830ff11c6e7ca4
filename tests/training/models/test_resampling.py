from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.models.resampling import resample, resample_matrix


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [(64, 64, 64, 64), (37, 53, 64, 48), (128, 96, 112, 112), (1, 5, 4, 7), (2, 3, 9, 2)])
def test_equals_interpolate(kind: str, sizes: tuple[int, int, int, int]) -> None:
    height, width, out_height, out_width = sizes
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(images, size=(out_height, out_width), mode=kind, align_corners=False, antialias=False)
    # Overshoot of the cubic kernel is at most about 1.3 for inputs in [0, 1]: 2e-6 is a few float32 roundings.
    torch.testing.assert_close(resample(images, out_height, out_width, kind), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_rows_sum_to_one_and_equal_sizes_are_identity(kind: str) -> None:
    like = torch.zeros(())
    torch.testing.assert_close(resample_matrix(7, 19, kind, like).sum(1), torch.ones(19))
    torch.testing.assert_close(resample_matrix(12, 12, kind, like), torch.eye(12), atol=0, rtol=0)
