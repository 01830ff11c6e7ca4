"""Panoptic quality (Kirillov et al. 2019), counting void and crowd regions as COCO's evaluation does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from odise_rt.errors import DatasetError

VOID = 0
_PAIR_BASE = 1 << 32


@dataclass(frozen=True)
class PanopticSegment:
    """One entry of a panoptic picture's segment list."""

    id: int
    """Value in the id map; never 0."""
    category_id: int
    iscrowd: bool = False
    """Ground truth only: a region of many instances, which takes part in no match."""
    area: float | None = None
    """Ground truth only: its pixels, where the annotation says more than the map shows; None: those in the map."""


@dataclass
class CategoryCounts:
    """Sums of one category over all pictures."""

    iou: float = 0.0
    """Sum of the IoU of the true positives."""
    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def add(self, other: CategoryCounts) -> None:
        """Add another picture's sums."""
        self.iou += other.iou
        self.true_positives += other.true_positives
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives

    @property
    def seen(self) -> bool:
        """Whether the category occurs at all, in ground truth or prediction."""
        return self.true_positives + self.false_positives + self.false_negatives > 0

    @property
    def pq(self) -> float:
        """Panoptic quality in [0, 1]; 0 where the category does not occur."""
        weight = self.true_positives + 0.5 * self.false_positives + 0.5 * self.false_negatives
        return self.iou / weight if weight else 0.0

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the true positives, 0 without one."""
        return self.iou / self.true_positives if self.true_positives else 0.0

    @property
    def rq(self) -> float:
        """Recognition quality: F1 of the matches."""
        weight = self.true_positives + 0.5 * self.false_positives + 0.5 * self.false_negatives
        return self.true_positives / weight if weight else 0.0


@dataclass(frozen=True)
class PanopticScores:
    """Averages over a group's categories that occur, in percent; NaN where none does."""

    pq: float
    sq: float
    rq: float
    categories: int
    """Categories averaged over."""


def picture_counts(
    truth: npt.NDArray[np.integer],
    truth_segments: Sequence[PanopticSegment],
    predicted: npt.NDArray[np.integer],
    predicted_segments: Sequence[PanopticSegment],
    name: str = "picture",
) -> dict[int, CategoryCounts]:
    """Matches and misses of one picture, by category.

    A prediction matches a segment of its category when their IoU, without the prediction's void pixels, exceeds 0.5.
    The union counts the area that the annotation gives a segment, as COCO's code does, even where others cover part of
    it. A prediction that matches nothing is no false positive when more than half of it lies on void or on a crowd of
    its category. Of several crowds of one category COCO's code regards the last, and so does this.

    Args:
        truth: (H, W) segment ids, 0 = void.
        truth_segments: their categories; ids absent from this list count as void.
        predicted: (H, W) segment ids, 0 = unlabelled.
        predicted_segments: their categories.
        name: named in errors.

    Raises:
        DatasetError: sizes differ, or a predicted id is in the map and not the list, or the other way around.
    """
    if truth.shape != predicted.shape:
        raise DatasetError(f"{name}: prediction is {predicted.shape}, ground truth {truth.shape}: sizes must agree")
    truth_of = {segment.id: segment for segment in truth_segments}
    predicted_of = {segment.id: segment for segment in predicted_segments}
    pairs, areas = np.unique(truth.astype(np.uint64) * _PAIR_BASE + predicted.astype(np.uint64), return_counts=True)
    overlap: dict[tuple[int, int], int] = {}
    for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True):
        truth_id, predicted_id = divmod(pair, _PAIR_BASE)
        key = (truth_id if truth_id in truth_of else VOID, predicted_id)
        overlap[key] = overlap.get(key, 0) + area
    truth_area: dict[int, int] = {}
    predicted_area: dict[int, int] = {}
    for (truth_id, predicted_id), area in overlap.items():
        truth_area[truth_id] = truth_area.get(truth_id, 0) + area
        predicted_area[predicted_id] = predicted_area.get(predicted_id, 0) + area
    unlisted = sorted(set(predicted_area) - {VOID} - set(predicted_of))
    if unlisted:
        raise DatasetError(f"{name}: predicted ids {unlisted} are in the map but not in the segment list")
    absent = sorted(set(predicted_of) - set(predicted_area))
    if absent:
        raise DatasetError(f"{name}: predicted segments {absent} have no pixel in the map")

    counts: dict[int, CategoryCounts] = {}

    def of(category_id: int) -> CategoryCounts:
        return counts.setdefault(category_id, CategoryCounts())

    matched_truth: set[int] = set()
    matched_predicted: set[int] = set()
    for (truth_id, predicted_id), area in overlap.items():
        wanted, found = truth_of.get(truth_id), predicted_of.get(predicted_id)
        if wanted is None or found is None or wanted.iscrowd or wanted.category_id != found.category_id:
            continue
        whole = truth_area[truth_id] if wanted.area is None else wanted.area
        union = predicted_area[predicted_id] + whole - area - overlap.get((VOID, predicted_id), 0)
        iou = area / union
        if iou > 0.5:
            of(wanted.category_id).true_positives += 1
            of(wanted.category_id).iou += iou
            matched_truth.add(truth_id)
            matched_predicted.add(predicted_id)
    crowd_of: dict[int, int] = {}
    for segment in truth_segments:
        if segment.iscrowd:
            crowd_of[segment.category_id] = segment.id
        elif segment.id not in matched_truth:
            of(segment.category_id).false_negatives += 1
    for segment in predicted_segments:
        if segment.id in matched_predicted:
            continue
        excused = overlap.get((VOID, segment.id), 0)
        if segment.category_id in crowd_of:
            excused += overlap.get((crowd_of[segment.category_id], segment.id), 0)
        if excused / predicted_area[segment.id] <= 0.5:
            of(segment.category_id).false_positives += 1
    return counts


@dataclass
class PanopticQuality:
    """Sums over a data set."""

    counts: dict[int, CategoryCounts] = field(default_factory=dict)

    def add(self, picture: Mapping[int, CategoryCounts]) -> None:
        """Add the result of :func:`picture_counts`."""
        for category_id, counts in picture.items():
            self.counts.setdefault(category_id, CategoryCounts()).add(counts)

    def merge(self, other: PanopticQuality) -> None:
        """Add the sums over other pictures."""
        self.add(other.counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {str(category_id): dataclasses.asdict(counts) for category_id, counts in self.counts.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PanopticQuality:
        """What :meth:`to_dict` gave, exactly."""
        return cls({int(category_id): CategoryCounts(**counts) for category_id, counts in data.items()})

    def scores(self, category_ids: Iterable[int]) -> PanopticScores:
        """Averages over those of ``category_ids`` that occur in ground truth or predictions, as panopticapi's."""
        present = [self.counts[c] for c in category_ids if c in self.counts and self.counts[c].seen]
        if not present:
            return PanopticScores(math.nan, math.nan, math.nan, 0)
        return PanopticScores(
            100 * float(np.mean([c.pq for c in present])),
            100 * float(np.mean([c.sq for c in present])),
            100 * float(np.mean([c.rq for c in present])),
            len(present),
        )


def picture_quality(counts: Mapping[int, CategoryCounts]) -> float:
    """PQ of one picture over all its categories together, in [0, 1], NaN where there is nothing to find and nothing
    was: what the best and worst pictures are sorted by.
    """
    total = CategoryCounts()
    for category in counts.values():
        total.add(category)
    return total.pq if total.seen else math.nan
