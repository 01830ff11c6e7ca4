"""Points at which masks are compared (PointRend sampling): uniform for matching, mostly uncertain ones for the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_STREAM_STRIDE = 1_000_003


def seeded_uniform(seed: int, stream: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) that depend on ``seed`` and ``stream`` alone.

    A generator for each draw keeps a step reproducible whatever the batch size, the number of processes or the steps
    run before it, which is what resuming and the two-process test rely on.
    """
    generator = torch.Generator(device=device).manual_seed((seed * _STREAM_STRIDE + stream) % 2**63)
    return torch.rand(*shape, generator=generator, device=device)


def sample_at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps at points, bilinearly, zero outside.

    Args:
        maps: (N, C, H, W) float.
        points: (N, P, 2) x, y in [0, 1] over the map's extent (pixel centres at (i + 0.5) / size).

    Returns:
        (N, C, P).
    """
    grid = 2.0 * points[:, None] - 1.0
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


def most_uncertain_points(mask_logits: Tensor, candidates: Tensor, uncertain: int) -> Tensor:
    """Choose the candidates of each mask where its logit is nearest to 0.

    Args:
        mask_logits: (N, H, W).
        candidates: (N, R, 2) points in [0, 1].
        uncertain: how many to keep, at most R.

    Returns:
        (N, uncertain, 2).
    """
    logits = sample_at_points(mask_logits[:, None], candidates)[:, 0]
    order = (-logits.abs()).topk(uncertain, dim=1).indices
    return candidates.gather(1, order[..., None].expand(-1, -1, 2))
