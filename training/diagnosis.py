"""Finds where a model loses quality: how many segments have a good mask, and how many of these masks are named right.

Panoptic quality mixes three things: whether a segment has a mask at all, whether the mask gets its name, and whether it
survives the merge. This looks at the first two, segment by segment, before anything is merged. A checkpoint and a
bundle can be looked at alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.image_run import MaskProposals
from odise_rt.options import SegmentOptions
from odise_rt.postprocessing import MaskResizer
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import Vocabulary
from training.data.coco_panoptic import CocoPanoptic, PanopticExample
from training.evaluation import data_vocabulary
from training.evaluation_loop import Progress

MATCH_IOU = 0.5
"""A mask that overlaps a segment by more is *its* mask, as in panoptic quality."""
SIZES = (0, 400, 1000, 2500, 6000)
"""Lower bounds in pixels of the reported sizes of things."""


@dataclass(frozen=True)
class SegmentFinding:
    """One annotated segment and the proposal that fits it best."""

    category_id: int
    isthing: bool
    seen: bool
    """Whether a word of its class was in the model's training vocabulary."""
    area: int
    """Pixels."""
    iou: float
    """IoU of the best of the Q masks, in [0, 1]."""
    mask_rank: int
    """Place of the right class by the mask classifier alone, 0 for the best."""
    clip_rank: int
    """Place of the right class by CLIP alone."""
    rank: int
    """Place of the right class by both together."""
    no_object: float
    """Probability of "no object" for that mask."""


@dataclass(frozen=True)
class Findings:
    """Averages over a group of segments. Shares in percent, of segments with a mask unless said otherwise."""

    segments: int
    with_mask: float
    """Segments that have a mask, of all."""
    iou: float
    """Mean IoU of the best mask, of all segments."""
    mask_right: float
    """Named right by the mask classifier alone."""
    clip_right: float
    """Named right by CLIP alone."""
    right: float
    """Named right by both together."""
    among_five: float
    """The right class is among the best five of both together."""
    no_object: float
    """Median probability of "no object"."""


def diagnose(
    segmenter: Segmenter,
    data: CocoPanoptic,
    indices: Sequence[int],
    options: SegmentOptions | None = None,
    progress: Progress = iter,
    words: Vocabulary | None = None,
) -> list[SegmentFinding]:
    """Look at every annotated segment of some pictures; crowds are left out.

    Args:
        segmenter: a checkpoint's or a bundle's.
        data: pictures and truth; its classes are looked for.
        indices: which pictures.
        options: of these, ensemble weights and sizes matter.
        progress: wraps the indices, e.g. in a progress bar.
        words: other words for the data set's classes, in its order.

    Raises:
        OptionsError: ``words`` has another number of classes than the data set.
    """
    vocabulary = data_vocabulary(data.categories, words)
    seen = vocabulary.seen(segmenter.bundle.training_vocabulary)
    findings: list[SegmentFinding] = []
    for index in progress(indices):
        example = data[index]
        proposals = segmenter.find_masks(example.image, options)
        named = segmenter.classify_masks(proposals, vocabulary, options)
        by_both = named.probabilities[:, :-1]
        for category_id, area, query, iou in _best_masks(example, proposals):
            wanted = data.index_of[category_id]

            def rank(scores: np.ndarray, wanted: int = wanted, query: int = query) -> int:
                return int((scores[query] > scores[query, wanted]).sum())

            findings.append(
                SegmentFinding(
                    category_id,
                    data.categories[wanted].isthing,
                    bool(seen[wanted]),
                    area,
                    iou,
                    rank(named.mask_log_probabilities),
                    rank(named.clip_log_probabilities),
                    rank(by_both),
                    float(named.probabilities[query, -1]),
                )
            )
    return findings


def _best_masks(example: PanopticExample, proposals: MaskProposals) -> Iterator[tuple[int, int, int, float]]:
    """Category, area, best query and its IoU for each segment that is not a crowd."""
    logits = proposals.mask_logits
    resizer = MaskResizer((logits.shape[1], logits.shape[2]), proposals.network_size, proposals.original_size)
    width = proposals.original_size[1]
    segments = [segment for segment in example.segments if not segment.iscrowd]
    if not segments:
        return
    truth = np.stack([example.segment_map == segment.id for segment in segments])
    areas = truth.sum(axis=(1, 2)).astype(np.int64)
    shared = np.zeros((len(segments), len(logits)), np.int64)
    sizes = np.zeros(len(logits), np.int64)
    for band in resizer.bands():
        masks = (resizer(logits, band, slice(0, width)) > 0).reshape(len(logits), -1).astype(np.float32)
        sizes += masks.sum(axis=1).astype(np.int64)
        shared += (truth[:, band].reshape(len(segments), -1).astype(np.float32) @ masks.T).astype(np.int64)
    union = areas[:, None] + sizes[None] - shared
    for segment, area, overlaps in zip(segments, areas, shared / np.maximum(union, 1), strict=True):
        best = int(overlaps.argmax())
        yield segment.category_id, int(area), best, float(overlaps[best])


def summarise(findings: Iterable[SegmentFinding]) -> Findings:
    """Averages over segments; zeros where there are none."""
    chosen = list(findings)
    matched = [finding for finding in chosen if finding.iou > MATCH_IOU]

    def share(of: Sequence[SegmentFinding], condition: Callable[[SegmentFinding], bool]) -> float:
        return 100.0 * sum(map(condition, of)) / len(of) if of else 0.0

    return Findings(
        len(chosen),
        share(chosen, lambda f: f.iou > MATCH_IOU),
        100.0 * float(np.mean([f.iou for f in chosen])) if chosen else 0.0,
        share(matched, lambda f: f.mask_rank == 0),
        share(matched, lambda f: f.clip_rank == 0),
        share(matched, lambda f: f.rank == 0),
        share(matched, lambda f: f.rank < 5),
        float(np.median([f.no_object for f in matched])) if matched else 0.0,
    )


def groups_of(findings: Sequence[SegmentFinding]) -> dict[str, list[SegmentFinding]]:
    """Seen and unseen things and stuff, then things by size."""
    groups: dict[str, list[SegmentFinding]] = {}
    for seen in (True, False):
        for isthing in (True, False):
            name = f"{'seen' if seen else 'unseen'} {'things' if isthing else 'stuff'}"
            groups[name] = [f for f in findings if (f.seen, f.isthing) == (seen, isthing)]
    for low, high in zip(SIZES, (*SIZES[1:], None), strict=True):
        name = f"things from {low:,} pixels" if high is None else f"things of {low:,} to {high:,} pixels"
        groups[name] = [f for f in findings if f.isthing and f.area >= low and (high is None or f.area < high)]
    return groups


def as_json(findings: Sequence[SegmentFinding]) -> dict[str, Any]:
    """Averages by group and every segment, as plain JSON types."""
    return {
        "groups": {name: dataclasses.asdict(summarise(part)) for name, part in groups_of(findings).items()},
        "segments": [dataclasses.asdict(finding) for finding in findings],
    }


def as_table(findings: Sequence[SegmentFinding]) -> str:
    """A Markdown table of the groups that have segments."""
    lines = [
        "| segments | number | with a mask | best IoU | mask classifier right | CLIP right | both right | in best 5 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in groups_of(findings).items():
        if part:
            found = summarise(part)
            values = (found.with_mask, found.iou, found.mask_right, found.clip_right, found.right, found.among_five)
            lines.append(f"| {name} | {found.segments:,} | " + " | ".join(f"{v:.0f} %" for v in values) + " |")
    return "\n".join(lines)
