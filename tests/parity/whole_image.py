"""From the raw image to panoptic, semantic and instance results, against what was recorded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from odise_rt.options import SegmentOptions
from odise_rt.postprocessing import find_instances, merge_panoptic, semantic_map
from tests.parity.reference_run import UNSEEN, Run
from tests.parity.stages import recorded_probabilities
from training.torch_stages import torch_segmenter

THRESHOLD = 0.0
"""Object mask and overlap threshold of the recorded run (the official demo's)."""
INSTANCES = 100


@dataclass(frozen=True)
class Outcome:
    """What the merges say of one image."""

    segment_map: np.ndarray
    segments: list[tuple[int, int, bool]]
    """Id, class and whether it is a thing, of each segment."""
    semantic: np.ndarray
    instances: list[tuple[int, float]]
    """Class and score of each instance."""


def from_recorded_masks(run: Run) -> Outcome:
    """The runtime's merges alone, fed recorded masks and class probabilities."""
    masks, probabilities = run.recorded["predictor.pred_masks"][0], recorded_probabilities(run)
    isthing = run.vocabulary.isthing
    segment_map, segments = merge_panoptic(masks, probabilities, isthing, run.resizer, THRESHOLD, THRESHOLD)
    return Outcome(
        segment_map,
        [(segment.id, segment.class_index, segment.isthing) for segment in segments],
        semantic_map(masks, probabilities, run.resizer),
        [(i.class_index, i.score) for i in find_instances(masks, probabilities, isthing, run.resizer, INSTANCES)],
    )


def from_raw_image(run: Run) -> Outcome:
    """The whole runtime on our networks, fed nothing but the pixels and the words."""
    pixels = np.ascontiguousarray(run.recorded["input.image"].transpose(1, 2, 0))
    options = SegmentOptions(
        outputs=("panoptic", "semantic", "instance"),
        object_mask_threshold=THRESHOLD,
        overlap_threshold=THRESHOLD,
        instances_per_image=INSTANCES,
        short_edge=min(pixels.shape[:2]),  # the image has its test size
        long_edge=max(pixels.shape[:2]),
    )
    training_vocabulary = [word for entry in run.vocabulary if entry.name != UNSEEN for word in entry.words]
    with torch_segmenter(run.model, run.tokenizer_json, training_vocabulary) as segmenter:
        result = segmenter.segment(pixels, run.vocabulary, options)
    assert result.semantic_map is not None
    assert result.instances is not None
    return Outcome(
        result.segment_map,
        [(segment.id, segment.class_index, segment.isthing) for segment in result.segments],
        result.semantic_map,
        [(instance.class_index, instance.score) for instance in result.instances],
    )


@dataclass(frozen=True)
class Agreement:
    """Our outcome against the recorded one."""

    panoptic: float
    """Share of pixels with the same segment id."""
    semantic: float
    """Share of pixels with the same best class."""
    same_segments: bool
    """Whether ids, classes and kinds of all segments are the same."""
    segments: int
    """How many were recorded."""
    instance_classes: bool
    """Whether the same classes come as often."""
    instance_error: float
    """Largest difference of an instance's score, in units of the largest score."""


def agreement(run: Run, outcome: Outcome) -> Agreement:
    """Compare with the recorded results."""
    recorded = run.recorded
    segments = [(s["id"], s["category_id"], s["isthing"]) for s in recorded.json("segments_info_json")]
    scores, classes = recorded["instances.scores"], recorded["instances.pred_classes"]
    theirs = sorted(zip(classes.tolist(), scores.tolist(), strict=True))
    ours = sorted(outcome.instances)
    same_classes = [c for c, _ in ours] == [c for c, _ in theirs]
    error = max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) if same_classes else float("inf")
    return Agreement(
        panoptic=float((outcome.segment_map == recorded["panoptic_seg"]).mean()),
        semantic=float((outcome.semantic == recorded["sem_seg.argmax"]).mean()),
        same_segments=outcome.segments == segments,
        segments=len(segments),
        instance_classes=same_classes,
        instance_error=error / float(scores.max()),
    )
