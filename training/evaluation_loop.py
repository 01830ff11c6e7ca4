"""The loop of every evaluation: segment each picture, let a scorer compare, keep the best and worst, report.

:mod:`training.evaluation` scores panoptic data sets, :mod:`training.semantic_evaluation` semantic ones.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from odise_rt.options import Output, SegmentOptions
from odise_rt.results import PanopticResult
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import Vocabulary
from training.distributed import gathered, share_of
from training.evaluation_log import EvaluationLog, Measured


class PictureKeeper(Protocol):
    """Keeps some of the pictures, by their quality."""

    def wants(self, quality: float) -> bool:
        """Whether a picture of this quality in [0, 1], NaN if it has none, would be kept now."""

    def __call__(self, quality: float, example: Any, prediction: PanopticResult) -> None:
        """Look at a picture with its quality and its prediction."""


Progress = Callable[[Sequence[int]], Iterator[int]]
"""Wraps the indices of pictures, e.g. in a progress bar."""


def progress_bar(title: str) -> Progress:
    """A bar on the terminal."""
    return lambda indices: iter(tqdm(indices, desc=title, mininterval=5))


AnExample = TypeVar("AnExample", contravariant=True)


@dataclass(frozen=True)
class Numbers:
    """What a :class:`Scorer` has counted; the fields are those of :class:`EvaluationReport`."""

    pq: dict[str, dict[str, float]] = field(default_factory=dict)
    miou: dict[str, dict[str, float]] = field(default_factory=dict)
    ap: dict[str, dict[str, float]] = field(default_factory=dict)
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    """Numbers of one evaluation, in percent; NaN where a group has nothing to average."""

    model: str
    """What was measured: name, precision and supervision."""
    engine: str
    """What it ran on."""
    pictures: int
    seconds_per_picture: float
    pq: dict[str, dict[str, float]]
    """Group (all, things, stuff, seen, unseen, and things and stuff of each) to pq, sq, rq, categories; empty for a
    semantic set."""
    miou: dict[str, dict[str, float]]
    """Group to miou, miou_with_predicted, pixel_accuracy, classes; empty unless asked for."""
    ap: dict[str, dict[str, float]]
    """Group to ap, ap50, ap75; empty unless asked for."""
    by_category: dict[str, dict[str, float]]
    """Category name (:func:`distinct_names`) to pq, sq, rq and counts, and iou where mean IoU was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None for NaN, which JSON has not."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            return None if isinstance(value, float) and math.isnan(value) else value

        return {key: plain(value) for key, value in dataclasses.asdict(self).items()}


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names of classes; where several share one, as in ADE20K's 847, each has its position behind it."""
    often = Counter(names)
    return [name if often[name] == 1 else f"{name} [{index}]" for index, name in enumerate(names)]


class Scorer(Protocol[AnExample]):
    """Compares predictions with the truth of one kind of data set."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What to look for."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What to predict."""

    def compare(self, example: AnExample, prediction: PanopticResult) -> tuple[float, Any]:
        """A picture's own quality in [0, 1], NaN if it has none, and its counts, which :meth:`merge` adds."""

    @property
    def counts(self) -> Any:
        """What was added up, which another process can be sent."""

    def merge(self, counts: Any) -> None:
        """Add counts of pictures, by this scorer or one of the same data set."""

    def to_dict(self, counts: Any) -> dict[str, Any]:
        """Plain JSON types for counts."""

    def from_dict(self, data: dict[str, Any]) -> Any:
        """What :meth:`to_dict` gave, exactly."""

    def numbers(self) -> Numbers:
        """Averages over what was added."""


def measure(
    segmenter: Segmenter,
    example_at: Callable[[int], AnExample],
    indices: Sequence[int],
    scorer: Scorer[AnExample],
    options: SegmentOptions | None = None,
    keep: PictureKeeper | None = None,
    progress: Progress = iter,
    shared: bool = False,
    log: EvaluationLog | None = None,
) -> EvaluationReport:
    """Segment pictures and count.

    Args:
        segmenter: what to measure.
        example_at: reads the picture of an index.
        indices: which pictures.
        scorer: knows the vocabulary and counts.
        options: thresholds and weights; its outputs are set by the scorer.
        keep: shown every picture with its own quality, to choose the best and worst.
        progress: wraps the indices.
        shared: the processes of :mod:`training.distributed`, who all call this together, share the pictures; the
            report of the first one is of all of them.
        log: every picture is noted in it, and those that it knows already are not segmented again, unless they are
            to be kept.
    """
    settings = dataclasses.replace(options or SegmentOptions(), outputs=scorer.outputs)
    seconds, engine = 0.0, ""
    for index in progress(share_of(indices) if shared else indices):
        known = None if log is None else log.find(index)
        if known is not None and not (keep is not None and keep.wants(known.quality)):
            scorer.merge(scorer.from_dict(known.counts))
            seconds, engine = seconds + known.seconds, known.engine
            continue
        example: Any = example_at(index)
        began = time.perf_counter()
        prediction = segmenter.segment(example.image, scorer.vocabulary, settings)
        lasted = time.perf_counter() - began
        seconds, engine = seconds + lasted, prediction.facts.engine
        quality, counts = scorer.compare(example, prediction)
        scorer.merge(counts)
        if log is not None:
            log.append(index, Measured(quality, scorer.to_dict(counts), lasted, engine))
        if keep is not None:
            keep(quality, example, prediction)
    if shared:
        for counts, others, name in gathered((scorer.counts, seconds, engine))[1:]:
            scorer.merge(counts)
            seconds += others
            engine = engine or name
    bundle, numbers = segmenter.bundle, scorer.numbers()
    return EvaluationReport(
        f"{bundle.name} ({bundle.facts.variant} supervision, {bundle.precision})",
        engine,
        len(indices),
        seconds / max(1, len(indices)),
        numbers.pq,
        numbers.miou,
        numbers.ap,
        numbers.by_category,
    )
