"""Ground truth of a batch in the form that matcher and criterion read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.data.picture_files import ImageId


@dataclass(frozen=True)
class MaskTargets:
    """Segments of B images, padded to the largest count M of the batch."""

    masks: Tensor
    """(B, M, H, W) bool on the padded canvas; rows from ``counts[b]`` on are empty padding."""
    labels: Tensor
    """(B, M) int64 class index of each segment; padding holds 0."""
    counts: tuple[int, ...]
    """Segments of each image; 0 is allowed."""
    image_ids: tuple[ImageId, ...]
    """Data set ids, named in errors."""
    seeds: tuple[int, ...]
    """Seed of the random points of each image in this step: they depend on the sample, not on batch or process."""

    batch_counts: tuple[int, ...] = ()
    """Segments of each image of the whole batch, where these targets are a part of it."""

    def to(self, device: torch.device | str) -> MaskTargets:
        """The same targets on another device."""
        return replace(self, masks=self.masks.to(device), labels=self.labels.to(device))

    def class_agnostic(self) -> MaskTargets:
        """Every segment labelled 0 = "object", for caption supervision."""
        return replace(self, labels=torch.zeros_like(self.labels))

    def split(self, parts: int) -> list[MaskTargets]:
        """Equal parts, in order, whose losses add up to those of the whole; ``parts`` divides B."""
        size = len(self.counts) // parts
        slices = [slice(first, first + size) for first in range(0, len(self.counts), size)]
        return [
            MaskTargets(
                self.masks[part],
                self.labels[part],
                self.counts[part],
                self.image_ids[part],
                self.seeds[part],
                batch_counts=self.counts,
            )
            for part in slices
        ]


def collate_targets(
    masks: Sequence[Tensor], labels: Sequence[Tensor], image_ids: Sequence[ImageId], seeds: Sequence[int]
) -> MaskTargets:
    """Stack per-image segments.

    Args:
        masks: one (M_b, H, W) bool for each image, all of the same H, W.
        labels: one (M_b,) int64 for each image.
        image_ids: data set ids.
        seeds: seeds of the images' random points.
    """
    most = max(1, *(len(m) for m in masks)) if masks else 1
    height, width = masks[0].shape[-2:]
    padded_masks = torch.zeros(len(masks), most, height, width, dtype=torch.bool, device=masks[0].device)
    padded_labels = torch.zeros(len(masks), most, dtype=torch.int64, device=masks[0].device)
    for index, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        padded_masks[index, : len(mask)] = mask
        padded_labels[index, : len(label)] = label
    return MaskTargets(padded_masks, padded_labels, tuple(len(m) for m in masks), tuple(image_ids), tuple(seeds))
