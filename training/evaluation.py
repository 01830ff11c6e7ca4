"""Evaluates a segmenter on a panoptic data set: panoptic quality, mean IoU, mask AP, overall and by seen or unseen.

The segmenter runs an exported bundle or a PyTorch checkpoint; resizing, classification and merging are the runtime's
own in both cases, so the numbers of two engines differ by their networks only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from odise_rt.errors import OptionsError
from odise_rt.options import Output, SegmentOptions
from odise_rt.results import PanopticResult
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import Vocabulary, VocabularyClass
from training.data.coco_instances import CocoInstances
from training.data.coco_panoptic import Category, CocoPanoptic, PanopticExample
from training.evaluation_log import EvaluationLog
from training.evaluation_loop import EvaluationReport, Numbers, PictureKeeper, Progress, distinct_names, measure
from training.metrics.instance_ap import InstanceAp
from training.metrics.mean_iou import MeanIou
from training.metrics.panoptic_quality import PanopticQuality, PanopticSegment, picture_counts, picture_quality

METRICS = ("pq", "miou", "ap")
PictureTeller = Callable[[PanopticExample], None]
PanopticCounts = tuple[PanopticQuality, MeanIou, InstanceAp]


def data_vocabulary(categories: Sequence[Category], words: Vocabulary | None = None) -> Vocabulary:
    """The data set's classes in its order, with their synonyms or those of the classes of ``words``.

    Raises:
        OptionsError: ``words`` has another number of classes.
    """
    if words is None:
        return Vocabulary(tuple(VocabularyClass(c.synonyms, c.isthing, c.id) for c in categories))
    if len(words) != len(categories):
        raise OptionsError(
            f"{len(words)} classes were given for a data set of {len(categories)}: expected as many, in its order"
        )
    return Vocabulary(tuple(VocabularyClass(w.words, c.isthing, c.id) for c, w in zip(categories, words, strict=True)))


def category_groups(categories: Sequence[Category], seen: Collection[int]) -> dict[str, list[int]]:
    """Category ids of each reported group."""
    things = [c.id for c in categories if c.isthing]
    stuff = [c.id for c in categories if not c.isthing]
    groups = {"all": things + stuff, "things": things, "stuff": stuff}
    groups["seen"] = [c for c in groups["all"] if c in seen]
    groups["unseen"] = [c for c in groups["all"] if c not in seen]
    for part in ("seen", "unseen"):
        groups[f"{part} things"] = [c for c in groups[part] if c in set(things)]
        groups[f"{part} stuff"] = [c for c in groups[part] if c in set(stuff)]
    return groups


def evaluate(
    segmenter: Segmenter,
    data: CocoPanoptic,
    indices: Sequence[int],
    metrics: Collection[str] = ("pq",),
    options: SegmentOptions | None = None,
    keep: PictureKeeper | None = None,
    progress: Progress = iter,
    words: Vocabulary | None = None,
    tell: PictureTeller | None = None,
    instances: CocoInstances | None = None,
    shared: bool = False,
    log: EvaluationLog | None = None,
) -> EvaluationReport:
    """Segment pictures with the data set's classes and count.

    Args:
        segmenter: what to measure.
        data: pictures and truth.
        indices: which of them.
        metrics: of :data:`METRICS`; ``pq`` is always computed.
        options: thresholds and weights; its outputs are set by the metrics.
        keep: shown every picture with its own quality, to choose the best and worst.
        progress: wraps the indices, e.g. in a progress bar.
        words: other words for the data set's classes, in its order.
        tell: told of every picture before it is segmented, for models that need to know more of it than its pixels.
        instances: the truth for AP; None: the panoptic set's own things, which never overlap.
        shared: several processes share the pictures; see :func:`training.evaluation_loop.measure`.
        log: of what has been measured; see there, too.

    Raises:
        OptionsError: ``words`` has another number of classes than the data set.
    """

    def picture(index: int) -> PanopticExample:
        example = data[index]
        if tell is not None:
            tell(example)
        return example

    scorer = PanopticScorer(data, segmenter.bundle.training_vocabulary, metrics, words, instances)
    return measure(segmenter, picture, indices, scorer, options, keep, progress, shared, log)


class PanopticScorer:
    """Counts panoptic quality, and mean IoU and mask AP if asked for.

    Args:
        data: for its categories.
        training_vocabulary: every word of the model's training; tells seen classes from unseen ones.
        metrics: of :data:`METRICS`; ``pq`` is always computed.
        words: other words for the data set's classes, in its order.
        instances: the truth for AP; None: the panoptic set's own things, which never overlap.
    """

    def __init__(
        self,
        data: CocoPanoptic,
        training_vocabulary: Collection[str],
        metrics: Collection[str],
        words: Vocabulary | None = None,
        instances: CocoInstances | None = None,
    ) -> None:
        self.data = data
        self.instance_truth = instances
        self.metrics = frozenset(metrics)
        self.vocabulary = data_vocabulary(data.categories, words)
        self.outputs = outputs_for(metrics)
        flags = self.vocabulary.seen(training_vocabulary)
        self.seen = {category.id for category, flag in zip(data.categories, flags, strict=True) if flag}
        self.groups = category_groups(data.categories, self.seen)
        self.quality, self.semantic, self.instances = PanopticQuality(), MeanIou(len(data.categories)), InstanceAp()

    def compare(self, example: PanopticExample, prediction: PanopticResult) -> tuple[float, PanopticCounts]:
        """A picture's own PQ over all categories together, NaN if there is nothing to count, and its counts."""
        counts = picture_counts(
            example.segment_map,
            [PanopticSegment(s.id, s.category_id, s.iscrowd, s.area) for s in example.segments],
            prediction.segment_map,
            [PanopticSegment(s.id, self.data.categories[s.class_index].id) for s in prediction.segments],
            f"image id {example.image_id}",
        )
        quality, semantic, instances = PanopticQuality(counts), MeanIou(len(self.data.categories)), InstanceAp()
        if prediction.semantic_map is not None:
            semantic.add(semantic_truth(example, self.data), prediction.semantic_map)
        if prediction.instances is not None:
            size = example.segment_map.shape[:2]
            truth = self.instance_truth
            instances.add(
                visible_things(example, self.data) if truth is None else truth.of(example.image_id, size),
                [
                    (found.mask, self.data.categories[found.class_index].id, found.score)
                    for found in prediction.instances
                ],
                size,
            )
        return picture_quality(counts), (quality, semantic, instances)

    @property
    def counts(self) -> PanopticCounts:
        """What was counted."""
        return self.quality, self.semantic, self.instances

    def merge(self, counts: PanopticCounts) -> None:
        """Add what a scorer of the same data set has counted of other pictures."""
        quality, semantic, instances = counts
        self.quality.merge(quality)
        self.semantic.merge(semantic)
        self.instances.merge(instances)

    def to_dict(self, counts: PanopticCounts) -> dict[str, Any]:
        """Plain JSON types for counts."""
        quality, semantic, instances = counts
        return {"pq": quality.to_dict(), "miou": semantic.to_list(), "ap": instances.to_dict()}

    def from_dict(self, data: dict[str, Any]) -> PanopticCounts:
        """What :meth:`to_dict` gave."""
        semantic = MeanIou.from_list(len(self.data.categories), data["miou"])
        return PanopticQuality.from_dict(data["pq"]), semantic, InstanceAp.from_dict(data["ap"])

    def numbers(self) -> Numbers:
        """Averages over what was added."""
        things, groups = set(self.groups["things"]), self.groups
        ap_groups = {n: [c for c in ids if c in things] for n, ids in groups.items() if n in ("all", "seen", "unseen")}
        return Numbers(
            {name: dataclasses.asdict(self.quality.scores(ids)) for name, ids in groups.items()},
            {
                name: dataclasses.asdict(self.semantic.scores([self.data.index_of[c] for c in ids]))
                for name, ids in groups.items()
                if "miou" in self.metrics
            },
            {
                name: dataclasses.asdict(self.instances.scores(ids))
                for name, ids in ap_groups.items()
                if "ap" in self.metrics
            },
            self._by_category(),
        )

    def _by_category(self) -> dict[str, dict[str, float]]:
        found = {}
        iou = 100 * self.semantic.iou()
        names = distinct_names([category.name for category in self.data.categories])
        for index, (category, name) in enumerate(zip(self.data.categories, names, strict=True)):
            if category.id not in self.quality.counts:
                continue
            counts = self.quality.counts[category.id]
            found[name] = {
                "pq": 100 * counts.pq,
                "sq": 100 * counts.sq,
                "rq": 100 * counts.rq,
                "true_positives": counts.true_positives,
                "false_positives": counts.false_positives,
                "false_negatives": counts.false_negatives,
                "seen": float(category.id in self.seen),
            }
            if not math.isnan(iou[index]):
                found[name]["iou"] = float(iou[index])
        return found


def outputs_for(metrics: Collection[str]) -> tuple[Output, ...]:
    """Outputs that the named metrics need."""
    wanted: list[Output] = ["panoptic"]
    if "miou" in metrics:
        wanted.append("semantic")
    if "ap" in metrics:
        wanted.append("instance")
    return tuple(wanted)


def semantic_truth(example: PanopticExample, data: CocoPanoptic) -> np.ndarray:
    """(h, w) class indices from the panoptic truth, crowds included; -1 for void."""
    truth = np.full(example.segment_map.shape, -1, dtype=np.int64)
    for segment in example.segments:
        truth[example.segment_map == segment.id] = data.index_of[segment.category_id]
    return truth


def visible_things(example: PanopticExample, data: CocoPanoptic) -> list[tuple[np.ndarray, int, bool]]:
    """(mask (H, W), category id, iscrowd) of the things of one picture, but for those that are wholly covered."""
    things = {category.id for category in data.categories if category.isthing}
    visible = set(np.unique(example.segment_map).tolist())
    return [
        (example.segment_map == segment.id, segment.category_id, segment.iscrowd)
        for segment in example.segments
        if segment.category_id in things and segment.id in visible
    ]
