"""Mean intersection over union of semantic maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from odise_rt.errors import DatasetError


@dataclass(frozen=True)
class SemanticScores:
    """Averages in percent; NaN where no class occurs in the ground truth."""

    miou: float
    """Mean IoU over the classes that occur in the ground truth."""
    miou_with_predicted: float
    """The same sum divided by the classes that occur in the ground truth or are predicted on annotated pixels: one that
    is only predicted counts, with 0. So averages detectron2 0.6, which the published figures were measured with."""
    pixel_accuracy: float
    classes: int
    """Classes that occur in the ground truth."""


class MeanIou:
    """Confusion matrix of K classes; pixels of the ignored value count nowhere."""

    def __init__(self, classes: int, ignore: int = -1) -> None:
        self.classes = classes
        self.ignore = ignore
        self.confusion = np.zeros((classes, classes + 1), dtype=np.int64)  # truth, prediction (last: none)

    def add(self, truth: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer]) -> float:
        """Count one picture.

        Args:
            truth: (H, W) class index in [0, K) or ``ignore``.
            predicted: (H, W) class index in [0, K), or -1 where nothing is predicted (wrong everywhere).

        Returns:
            Mean IoU in [0, 1] of this picture alone, over the classes of its truth; NaN if it has none.

        Raises:
            DatasetError: sizes differ or a class is out of range.
        """
        if truth.shape != predicted.shape:
            raise DatasetError(f"prediction is {predicted.shape}, ground truth {truth.shape}: sizes must agree")
        counted = truth != self.ignore
        wanted = truth[counted].astype(np.int64)
        found = predicted[counted].astype(np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.classes):
            raise DatasetError(
                f"ground truth holds class {int(wanted.min())}..{int(wanted.max())}: expected 0..{self.classes - 1} or "
                f"the ignored value {self.ignore}"
            )
        if found.size and (found.min() < -1 or found.max() >= self.classes):
            raise DatasetError(f"prediction holds a class outside -1..{self.classes - 1}")
        found = np.where(found == -1, self.classes, found)
        flat = np.bincount(wanted * (self.classes + 1) + found, minlength=self.confusion.size)
        picture = flat.reshape(self.confusion.shape)
        self.confusion += picture
        return float(np.nanmean(_iou(picture))) if wanted.size else float("nan")

    def merge(self, other: MeanIou) -> None:
        """Add the counts of other pictures."""
        self.confusion += other.confusion

    def to_list(self) -> list[list[int]]:
        """Plain JSON types: [class, predicted class, pixels] of each pair that occurs."""
        return [[int(k), int(p), int(self.confusion[k, p])] for k, p in zip(*self.confusion.nonzero(), strict=True)]

    @classmethod
    def from_list(cls, classes: int, pairs: Iterable[Sequence[int]]) -> MeanIou:
        """What :meth:`to_list` gave for ``classes`` classes."""
        counts = cls(classes)
        for truth, predicted, pixels in pairs:
            counts.confusion[truth, predicted] = pixels
        return counts

    def iou(self) -> npt.NDArray[np.float64]:
        """(K,) IoU of each class; NaN for a class absent from the ground truth."""
        return _iou(self.confusion)

    def scores(self, indices: Iterable[int] | None = None) -> SemanticScores:
        """Averages over ``indices`` (default: all classes) that occur in the ground truth."""
        chosen = np.arange(self.classes) if indices is None else np.array(sorted(indices), dtype=np.int64)
        values = self.iou()[chosen]
        present = ~np.isnan(values)
        occurring = self.confusion.sum(1) + self.confusion[:, : self.classes].sum(0) > 0
        pixels = int(self.confusion[chosen].sum())
        hits = int(np.diag(self.confusion[:, : self.classes])[chosen].sum())
        return SemanticScores(
            100 * float(values[present].mean()) if present.any() else math.nan,
            100 * float(values[present].sum()) / int(occurring[chosen].sum()) if present.any() else math.nan,
            100 * hits / pixels if pixels else math.nan,
            int(present.sum()),
        )


def _iou(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(K,) IoU of each class for a (K, K + 1) confusion matrix; NaN for a class absent from the ground truth."""
    hits = np.diag(confusion[:, :-1]).astype(np.float64)
    truth = confusion.sum(1)
    union = truth + confusion[:, :-1].sum(0) - hits
    return np.where(truth > 0, hits / np.maximum(union, 1), np.nan)
