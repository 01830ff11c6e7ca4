"""Ground truth of a batch: as it travels to the device, and in the form that matcher and criterion read."""

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
    """(B, M, H, W) on the padded canvas, 0 or 1 in float32; rows from ``counts[b]`` on are empty padding."""
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

    def class_agnostic(self) -> MaskTargets:
        """Every segment labelled 0 = "object", for caption supervision."""
        return replace(self, labels=torch.zeros_like(self.labels))


@dataclass(frozen=True)
class SegmentTargets:
    """What :class:`MaskTargets` are made from, in a fraction of the bytes: processes and devices pass it on."""

    segment_index: Tensor
    """(B, H, W) int32 on the padded canvas: 0 = no segment, else 1 + index into the image's labels."""
    labels: Tensor
    """(B, M) int64, and all else as in :class:`MaskTargets`."""
    counts: tuple[int, ...]
    image_ids: tuple[ImageId, ...]
    seeds: tuple[int, ...]
    batch_counts: tuple[int, ...] = ()

    def pin_memory(self) -> SegmentTargets:
        """A copy in page-locked memory, from which copies to a GPU need not be waited for."""
        return replace(self, segment_index=self.segment_index.pin_memory(), labels=self.labels.pin_memory())

    def masks_on(self, device: torch.device | str) -> MaskTargets:
        """A mask for each segment, made on a device."""
        index = self.segment_index.to(device, non_blocking=True)
        numbers = torch.arange(1, self.labels.shape[1] + 1, dtype=index.dtype, device=device)
        return MaskTargets(
            (index[:, None] == numbers[:, None, None]).float(),
            self.labels.to(device, non_blocking=True),
            self.counts,
            self.image_ids,
            self.seeds,
            self.batch_counts,
        )

    def split(self, parts: int) -> list[SegmentTargets]:
        """Equal parts, in order, whose losses add up to those of the whole; ``parts`` divides B."""
        size = len(self.counts) // parts
        slices = [slice(first, first + size) for first in range(0, len(self.counts), size)]
        return [
            SegmentTargets(
                self.segment_index[part],
                self.labels[part],
                self.counts[part],
                self.image_ids[part],
                self.seeds[part],
                batch_counts=self.counts,
            )
            for part in slices
        ]


def collate_targets(
    indices: Sequence[Tensor], labels: Sequence[Tensor], image_ids: Sequence[ImageId], seeds: Sequence[int]
) -> SegmentTargets:
    """Stack per-image segments.

    Args:
        indices: one (H, W) int32 for each image, all of the same H, W: 0, or 1 + index of a segment.
        labels: one (M_b,) int64 for each image.
        image_ids: data set ids.
        seeds: seeds of the images' random points.
    """
    counts = tuple(len(label) for label in labels)
    padded = torch.zeros(len(labels), max(1, *counts), dtype=torch.int64)
    for row, label in zip(padded, labels, strict=True):
        row[: len(label)] = label
    return SegmentTargets(torch.stack(list(indices)), padded, counts, tuple(image_ids), tuple(seeds))
