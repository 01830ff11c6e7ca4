"""How tests call the kernels of naming, whatever runs them: what is given, what is written, and what comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class ClassesCall(NamedTuple):
    """What ``name_classes`` is given, and where it writes."""

    inputs: Sequence[np.ndarray]
    """Both cosines, first words, CLIP's weights."""
    object_logits: np.ndarray | None
    thresholds: np.ndarray
    out: Sequence[np.ndarray]
    """The fields of ``ClassArrays``."""
    rank_all: bool
    with_unknown: bool


class NamingCalls(ABC):
    """Makes results, filled with other values before, lets the subclass launch, and reads them."""

    def full(self, shape: int | tuple[int, ...], value: float, dtype: Any) -> np.ndarray:
        """A result before anything is written to it."""
        return np.full(shape, value, dtype)

    @abstractmethod
    def launch_classes(self, call: ClassesCall) -> None:
        """Run ``name_classes``."""

    @abstractmethod
    def launch_segments(
        self, inputs: Sequence[np.ndarray], made: Sequence[np.ndarray], owner: np.ndarray, segment_map: np.ndarray
    ) -> None:
        """Run ``choose_segments`` and ``paint_segments``; ``made`` are the fields of ``SegmentArrays``."""

    def name_classes(
        self,
        mask_cosines: np.ndarray,
        clip_cosines: np.ndarray,
        first_word: np.ndarray,
        clip_weight: np.ndarray,
        object_logits: np.ndarray | None,
        *,
        unknown: float | None,
        threshold: float,
        best: int,
        rank_all: bool,
    ) -> dict[str, np.ndarray]:
        """Probabilities, labels, scores, ranked, ranked_scores."""
        queries, classes, with_unknown = len(clip_cosines), len(clip_weight), unknown is not None
        out = {
            "probabilities": self.full((queries, classes + 1 + with_unknown), np.nan, np.float32),
            "labels": self.full(queries, -9, np.int32),
            "scores": self.full(queries, np.nan, np.float32),
            "ranked": self.full((queries, best), -9, np.int32),
            "ranked_scores": self.full((queries, best, 3), np.nan, np.float32),
        }
        thresholds = np.array([unknown if with_unknown else 9, threshold], np.float32)  # 9 must not be looked at
        inputs = (mask_cosines, clip_cosines, first_word, clip_weight)
        made = list(out.values())
        self.launch_classes(ClassesCall(inputs, object_logits, thresholds, made, rank_all, with_unknown))
        return out

    def segments(
        self,
        labels: np.ndarray,
        scores: np.ndarray,
        owner: np.ndarray,
        areas: np.ndarray,
        things: np.ndarray,
        overlap: float,
    ) -> tuple[np.ndarray, list[tuple[int, int, float, tuple[int, ...]]]]:
        """The segment map, and of each segment query, class, score, and left, top, right, bottom and area."""
        queries = len(labels)
        ids, count, of, classes = (self.full(n, -9, np.int32) for n in (queries, 2, queries, queries))
        best, facts = self.full(queries, np.nan, np.float32), self.full((5, queries), -9, np.int32)
        segment_map = self.full(owner.shape, -9, np.int32)
        inputs = (labels, scores, areas, things, np.array([overlap], np.float64))
        self.launch_segments(inputs, (ids, count, of, classes, best, facts), owner, segment_map)
        found = zip(of, classes, best, facts.T, strict=True)
        segments = [(int(q), int(c), float(s), tuple(int(v) for v in f)) for q, c, s, f in found]
        assert count[1] == (labels < -1).sum()
        return segment_map, segments[: count[0]]
