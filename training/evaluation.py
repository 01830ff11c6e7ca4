"""Evaluates a segmenter on a panoptic data set: panoptic quality, mean IoU, mask AP, overall and by seen or unseen.

The segmenter runs an exported bundle or a PyTorch checkpoint; resizing, classification and merging are the runtime's
own in both cases, so the numbers of two engines differ by their networks only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.options import Output, SegmentOptions
from odise_rt.results import PanopticResult
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import Vocabulary, VocabularyClass
from training.data.coco_panoptic import Category, CocoPanoptic, PanopticExample
from training.metrics.instance_ap import InstanceAp
from training.metrics.mean_iou import MeanIou
from training.metrics.panoptic_quality import PanopticQuality, PanopticSegment, picture_counts, picture_quality

METRICS = ("pq", "miou", "ap")
PictureKeeper = Callable[[float, PanopticExample, PanopticResult], None]
PictureTeller = Callable[[PanopticExample], None]


@dataclass(frozen=True)
class EvaluationReport:
    """Numbers of one evaluation, in percent; plain values, ready for JSON."""

    model: str
    """What was measured: name, precision and supervision."""
    engine: str
    """What it ran on."""
    pictures: int
    seconds_per_picture: float
    pq: dict[str, dict[str, float]]
    """Group (all, things, stuff, seen, unseen, and things and stuff of each) to pq, sq, rq, categories."""
    miou: dict[str, dict[str, float]]
    """Group to miou, pixel_accuracy, classes; empty unless asked for."""
    ap: dict[str, dict[str, float]]
    """Group to ap, ap50, ap75; empty unless asked for."""
    by_category: dict[str, dict[str, float]]
    """Category name to pq, sq, rq and counts."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def data_vocabulary(categories: Sequence[Category]) -> Vocabulary:
    """The data set's classes in its order, with synonyms."""
    return Vocabulary(tuple(VocabularyClass(c.synonyms, c.isthing, c.id) for c in categories))


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
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
    tell: PictureTeller | None = None,
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
        tell: told of every picture before it is segmented, for models that need to know more of it than its pixels.
    """
    vocabulary = data_vocabulary(data.categories)
    flags = vocabulary.seen(segmenter.bundle.training_vocabulary)
    seen = {category.id for category, flag in zip(data.categories, flags, strict=True) if flag}
    groups = category_groups(data.categories, seen)
    quality, semantic, instances = PanopticQuality(), MeanIou(len(data.categories)), InstanceAp()
    settings = dataclasses.replace(options or SegmentOptions(), outputs=outputs_for(metrics))
    seconds, engine = 0.0, ""
    for index in progress(indices):
        example = data[index]
        if tell is not None:
            tell(example)
        began = time.perf_counter()
        prediction = segmenter.segment(example.image, vocabulary, settings)
        seconds += time.perf_counter() - began
        engine = prediction.facts.engine
        counts = picture_counts(
            example.segment_map,
            [PanopticSegment(s.id, s.category_id, s.iscrowd) for s in example.segments],
            prediction.segment_map,
            [PanopticSegment(s.id, data.categories[s.class_index].id) for s in prediction.segments],
            f"image id {example.image_id}",
        )
        quality.add(counts)
        if prediction.semantic_map is not None:
            semantic.add(semantic_truth(example, data), prediction.semantic_map)
        if prediction.instances is not None:
            add_instances(instances, example, prediction, data)
        if keep is not None:
            keep(picture_quality(counts), example, prediction)
    things = set(groups["things"])
    ap_groups = {n: [c for c in ids if c in things] for n, ids in groups.items() if n in ("all", "seen", "unseen")}
    bundle = segmenter.bundle
    return EvaluationReport(
        f"{bundle.name} ({bundle.facts.variant} supervision, {bundle.precision})",
        engine,
        len(indices),
        seconds / max(1, len(indices)),
        {name: dataclasses.asdict(quality.scores(ids)) for name, ids in groups.items()},
        {
            name: dataclasses.asdict(semantic.scores([data.index_of[c] for c in ids]))
            for name, ids in groups.items()
            if "miou" in metrics
        },
        {name: dataclasses.asdict(instances.scores(ids)) for name, ids in ap_groups.items() if "ap" in metrics},
        {
            category.name: {
                "pq": 100 * quality.counts[category.id].pq,
                "sq": 100 * quality.counts[category.id].sq,
                "rq": 100 * quality.counts[category.id].rq,
                "true_positives": quality.counts[category.id].true_positives,
                "false_positives": quality.counts[category.id].false_positives,
                "false_negatives": quality.counts[category.id].false_negatives,
                "seen": float(category.id in seen),
            }
            for category in data.categories
            if category.id in quality.counts
        },
    )


def outputs_for(metrics: Collection[str]) -> tuple[Output, ...]:
    """Outputs that the named metrics need."""
    wanted: list[Output] = ["panoptic"]
    if "miou" in metrics:
        wanted.append("semantic")
    if "ap" in metrics:
        wanted.append("instance")
    return tuple(wanted)


def semantic_truth(example: PanopticExample, data: CocoPanoptic) -> np.ndarray:
    """(h, w) class indices from the panoptic truth; -1 for void and crowds."""
    truth = np.full(example.segment_map.shape, -1, dtype=np.int64)
    for segment in example.segments:
        if not segment.iscrowd:
            truth[example.segment_map == segment.id] = data.index_of[segment.category_id]
    return truth


def add_instances(
    instances: InstanceAp, example: PanopticExample, prediction: PanopticResult, data: CocoPanoptic
) -> None:
    """Count the things of one picture for AP."""
    things = {category.id for category in data.categories if category.isthing}
    height, width = example.segment_map.shape
    instances.add(
        example.image_id,
        [
            (example.segment_map == segment.id, segment.category_id, segment.iscrowd)
            for segment in example.segments
            if segment.category_id in things
        ],
        [(found.mask, data.categories[found.class_index].id, found.score) for found in prediction.instances or ()],
        (height, width),
    )
