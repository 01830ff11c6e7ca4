"""Evaluates a segmenter on a semantic segmentation set: mean IoU and pixel accuracy, overall and by seen or unseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from odise_rt.options import Output, SegmentOptions
from odise_rt.results import PanopticResult
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import Vocabulary
from training.data.semantic_sets import VOID, SemanticExample, SemanticSet
from training.evaluation_log import EvaluationLog
from training.evaluation_loop import EvaluationReport, Numbers, PictureKeeper, Progress, distinct_names, measure
from training.metrics.mean_iou import MeanIou


def evaluate_semantic(
    segmenter: Segmenter,
    data: SemanticSet,
    indices: Sequence[int],
    options: SegmentOptions | None = None,
    keep: PictureKeeper | None = None,
    progress: Progress = iter,
    shared: bool = False,
    log: EvaluationLog | None = None,
) -> EvaluationReport:
    """Segment pictures with the set's classes and compare the class of every pixel.

    Args:
        segmenter: what to measure.
        data: pictures and truth.
        indices: which of them.
        options: thresholds and weights.
        keep: shown every picture with its own mean IoU, to choose the best and worst.
        progress: wraps the indices, e.g. in a progress bar.
        shared: several processes share the pictures; see :func:`training.evaluation_loop.measure`.
        log: of what has been measured; see there, too.
    """
    scorer = SemanticScorer(data.vocabulary, segmenter.bundle.training_vocabulary)
    return measure(segmenter, data.__getitem__, indices, scorer, options, keep, progress, shared, log)


class SemanticScorer:
    """Counts pixels by class.

    Args:
        vocabulary: the set's classes in the order of its class maps.
        training_vocabulary: every word of the model's training; tells seen classes from unseen ones.
    """

    outputs: tuple[Output, ...] = ("semantic",)

    def __init__(self, vocabulary: Vocabulary, training_vocabulary: Collection[str]) -> None:
        self.vocabulary = vocabulary
        self.seen = vocabulary.seen(training_vocabulary)
        self.semantic = MeanIou(len(vocabulary), VOID)

    def compare(self, example: SemanticExample, prediction: PanopticResult) -> tuple[float, MeanIou]:
        """The mean IoU of a picture's own classes, NaN if all of it is void, and its counts."""
        assert prediction.semantic_map is not None, "semantic output was asked for"
        counts = MeanIou(len(self.vocabulary), VOID)
        return counts.add(example.class_map, prediction.semantic_map), counts

    @property
    def counts(self) -> MeanIou:
        """What was counted."""
        return self.semantic

    def merge(self, counts: MeanIou) -> None:
        """Add what a scorer of the same data set has counted of other pictures."""
        self.semantic.merge(counts)

    def to_dict(self, counts: MeanIou) -> dict[str, Any]:
        """Plain JSON types for counts."""
        return {"miou": counts.to_list()}

    def from_dict(self, data: dict[str, Any]) -> MeanIou:
        """What :meth:`to_dict` gave."""
        return MeanIou.from_list(len(self.vocabulary), data["miou"])

    def numbers(self) -> Numbers:
        """Averages over what was added; classes that occur nowhere in the truth take no part."""
        members = {
            "all": range(len(self.vocabulary)),
            "seen": self.seen.nonzero()[0].tolist(),
            "unseen": (~self.seen).nonzero()[0].tolist(),
        }
        iou, pixels = 100 * self.semantic.iou(), self.semantic.confusion.sum(axis=1)
        return Numbers(
            miou={name: dataclasses.asdict(self.semantic.scores(indices)) for name, indices in members.items()},
            by_category={
                name: {"iou": float(iou[k]), "pixels": int(pixels[k]), "seen": float(self.seen[k])}
                for k, name in enumerate(distinct_names(self.vocabulary.names))
                if pixels[k]
            },
        )
