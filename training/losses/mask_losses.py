"""Cross-entropy and dice of matched masks at sampled points (odise.md 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from odise_rt.errors import ConfigError
from training.losses.matcher import Matches
from training.losses.point_sampling import most_uncertain_points, sample_at_points, seeded_uniform
from training.losses.targets import MaskTargets

_CANDIDATE_STREAM = 100
_REST_STREAM = 200


@dataclass(frozen=True)
class PointOptions:
    """How many points a mask loss reads and where."""

    points: int = 12544
    oversample_ratio: float = 3.0
    """Candidates for each point, among which the uncertain ones are searched."""
    importance_ratio: float = 0.75
    """Share of the points taken from the most uncertain candidates; the others are uniform."""

    def __post_init__(self) -> None:
        if self.points < 1 or self.oversample_ratio < 1 or not 0 <= self.importance_ratio <= 1:
            raise ConfigError(
                f"{self}: expected points and oversample_ratio of 1 or more, and importance_ratio of 0 to 1"
            )


def loss_points(
    mask_logits: Tensor, image: Tensor, seeds: tuple[int, ...], options: PointOptions, stream: int
) -> Tensor:
    """Points of each matched mask.

    Args:
        mask_logits: (N, h, w) matched masks, grouped by image.
        image: (N,) index of each mask's image, ascending.
        seeds: seed of each image of the batch.
        options: counts and ratios.
        stream: number of the prediction.

    Returns:
        (N, points, 2) in [0, 1].
    """
    candidates_per_mask = int(options.points * options.oversample_ratio)
    uncertain = int(options.points * options.importance_ratio)
    rest = options.points - uncertain
    device = mask_logits.device
    masks_of_image = torch.bincount(image, minlength=len(seeds)).tolist()
    candidates, others = [], []
    for seed, masks in zip(seeds, masks_of_image, strict=True):
        candidates.append(seeded_uniform(seed, _CANDIDATE_STREAM + stream, (masks, candidates_per_mask, 2), device))
        others.append(seeded_uniform(seed, _REST_STREAM + stream, (masks, rest, 2), device))
    chosen = most_uncertain_points(mask_logits, torch.cat(candidates), uncertain)
    return torch.cat([chosen, torch.cat(others)], dim=1)


def matched_mask_losses(
    mask_logits: Tensor,
    targets: MaskTargets,
    matches: Matches,
    masks: Tensor | float,
    options: PointOptions,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """Point-sampled sigmoid cross-entropy and dice loss of the matched masks.

    Args:
        mask_logits: (B, Q, h, w).
        targets: segments of the images.
        matches: assigned pairs.
        masks: divisor, the number of segments averaged over processes, at least 1.
        options: point counts.
        stream: number of the prediction.

    Returns:
        Two scalars (cross-entropy, dice); 0 with a gradient path when nothing is matched.
    """
    predicted = mask_logits[matches.image, matches.query].float()  # (N, h, w)
    if len(predicted) == 0:
        nothing = mask_logits.sum(dtype=torch.float32) * 0.0  # in fp16 the sum of large maps overflows
        return nothing, nothing
    wanted = targets.masks[matches.image, matches.segment]  # (N, H, W)
    with torch.no_grad():
        points = loss_points(predicted, matches.image, targets.seeds, options, stream)
        labels = sample_at_points(wanted[:, None], points)[:, 0]  # (N, P)
    logits = sample_at_points(predicted[:, None], points)[:, 0]
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum() / masks
    probability = logits.sigmoid()
    overlap = 2 * (probability * labels).sum(1) + 1
    dice = (1 - overlap / (probability.sum(1) + labels.sum(1) + 1)).sum() / masks
    return cross_entropy, dice
