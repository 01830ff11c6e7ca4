"""Hungarian assignment of predicted masks to ground-truth segments (Mask2Former; odise.md 7)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from odise_rt.errors import OdiseError
from training.losses.point_sampling import sample_at_points, seeded_uniform
from training.losses.targets import MaskTargets


class NonFiniteLossError(OdiseError):
    """A prediction or loss became NaN or infinite; the message names the images of the batch."""


@dataclass(frozen=True)
class Matches:
    """Pairs (image, query, segment) of a batch, ordered by image and then by query."""

    image: Tensor
    """(P,) int64."""
    query: Tensor
    """(P,) int64."""
    segment: Tensor
    """(P,) int64 index into the image's segments."""


def pairwise_mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss of every query against every segment.

    Args:
        logits: (B, Q, P) mask logits at P points.
        targets: (B, M, P) in [0, 1].

    Returns:
        Two (B, Q, M): mean cross-entropy over the points, and dice loss with +1 smoothing.
    """
    positive = F.softplus(-logits)  # -log sigmoid
    negative = F.softplus(logits)
    transposed = targets.transpose(1, 2)  # (B, P, M)
    cross_entropy = (positive @ transposed + negative @ (1 - transposed)) / logits.shape[-1]
    probability = logits.sigmoid()
    intersection = probability @ transposed
    dice = 1 - (2 * intersection + 1) / (probability.sum(-1)[:, :, None] + targets.sum(-1)[:, None, :] + 1)
    return cross_entropy, dice


class HungarianMatcher:
    """Cheapest one-to-one assignment under ``class * (-probability) + mask * BCE + dice * dice``."""

    def __init__(
        self, class_cost: float = 2.0, mask_cost: float = 5.0, dice_cost: float = 5.0, points: int = 12544
    ) -> None:
        self.class_cost = class_cost
        self.mask_cost = mask_cost
        self.dice_cost = dice_cost
        self.points = points

    @torch.no_grad()
    def match(self, class_logits: Tensor, mask_logits: Tensor, targets: MaskTargets, stream: int = 0) -> Matches:
        """Assign.

        Args:
            class_logits: (B, Q, K+1), "no object" last.
            mask_logits: (B, Q, h, w).
            targets: segments of the B images.
            stream: number of the prediction (final, auxiliary ...) whose points are drawn.

        Raises:
            NonFiniteLossError: a prediction is NaN or infinite.
        """
        device = mask_logits.device
        points = torch.cat(
            [seeded_uniform(seed, stream, (1, self.points, 2), device) for seed in targets.seeds]
        )  # (B, P, 2)
        predicted = sample_at_points(mask_logits.float(), points)
        wanted = sample_at_points(targets.masks, points)
        cross_entropy, dice = pairwise_mask_costs(predicted, wanted)
        probability = class_logits.float().softmax(-1)  # (B, Q, K+1)
        labels = targets.labels[:, None].expand(-1, probability.shape[1], -1)
        costs = (
            self.mask_cost * cross_entropy + self.dice_cost * dice - self.class_cost * probability.gather(2, labels)
        ).cpu()
        finite = costs.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            broken = [image for image, good in zip(targets.image_ids, finite.tolist(), strict=True) if not good]
            raise NonFiniteLossError(
                f"predictions are NaN or infinite for image ids {broken}: look at these images and go on with "
                "--resume, or start a new run with a lower learning rate, or with bf16 or fp32 instead of fp16"
            )
        images, queries, segments = [], [], []
        for index, count in enumerate(targets.counts):
            query, segment = linear_sum_assignment(costs[index, :, :count].numpy())
            images.append(np.full(len(query), index))
            queries.append(query)
            segments.append(segment)
        image, query, segment = (
            torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device) for parts in (images, queries, segments)
        )
        return Matches(image, query, segment)
