"""Launches of the kernels that give names to masks; see ``naming.cuh``, and ``native.py`` for what arrays may be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.errors import BackendError
from odise_rt.kernels.launch_plans import (
    plan_choose_segments,
    plan_name_classes,
    plan_paint_segments,
    plan_text_cosines,
)
from odise_rt.kernels.native import Kernels, expect_named, gpu_array


@dataclass(frozen=True)
class ClassArrays:
    """What :meth:`NamingKernels.name_classes` writes, on the GPU."""

    probabilities: DeviceArray
    """float32 (Q, K + 1), the last column "no object"; with ``unknown`` (Q, K + 2), "unknown" before it."""
    labels: DeviceArray
    """int32 (Q,): the class; K for "unknown", -1 for no object, -2 where probabilities are NaN."""
    scores: DeviceArray
    """float32 (Q,): the label's probability, 0 for masks that take no part in the merge."""
    ranked: DeviceArray
    """int32 (Q, N): the best classes of each mask, best first."""
    ranked_scores: DeviceArray
    """float32 (Q, N, 3): their probabilities by both classifiers together, by the mask classifier, by CLIP."""


@dataclass(frozen=True)
class SegmentArrays:
    """What :meth:`NamingKernels.choose_segments` writes, on the GPU; at most one segment for each mask."""

    ids: DeviceArray
    """int32 (Q,): id of the segment that a mask's pixels belong to, counted from 1; 0 for none."""
    count: DeviceArray
    """int32 (2,): segments, and masks whose probabilities are NaN."""
    queries: DeviceArray
    """int32 (Q,): of each segment, the mask with the best score. Only the first ``count[0]`` are written, as below."""
    classes: DeviceArray
    """int32 (Q,)."""
    scores: DeviceArray
    """float32 (Q,)."""
    facts: DeviceArray
    """int32 (5, Q): left, top, right, bottom (exclusive) and area, of :meth:`NamingKernels.paint_segments`."""


class NamingKernels:
    """The kernels of naming on the GPU of some :class:`Kernels`. Threads may share it; each call only launches."""

    def __init__(self, kernels: Kernels) -> None:
        """Launch through ``kernels``."""
        self._kernels = kernels

    def text_cosines(self, embeddings: object, texts: object, scale: float, cosines: object, stream: Any) -> None:
        """Scaled cosines of masks and words, as :func:`odise_rt.classification.class_logits` has them before synonyms.

        Args:
            embeddings: float32 (Q, C), not normalised.
            texts: float32 (L, C), L2-normalised.
            scale: factor on cosines.
            cosines: float32 (Q, L); written.
            stream: as for :meth:`Kernels.mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        masks, words = gpu_array(embeddings, "embeddings"), gpu_array(texts, "texts")
        if len(masks.shape) != 2 or len(words.shape) != 2 or masks.shape[1] != words.shape[1]:
            raise BackendError(f"embeddings {masks.shape} and texts {words.shape}, expected (Q, C) and (L, C)")
        (queries, channels), count = masks.shape, words.shape[0]
        plan = plan_text_cosines(queries, channels, count)
        for array, name in ((masks, "embeddings"), (words, "texts")):
            expect_named(array, name, array.shape, "float32")
        out = expect_named(gpu_array(cosines, "cosines"), "cosines", (queries, count), "float32")
        sizes = map(np.int32, (queries, channels, count))
        self._kernels.launch(plan, stream, masks.pointer, words.pointer, np.float32(scale), *sizes, out.pointer)

    def name_classes(
        self,
        mask_cosines: object,
        clip_cosines: object,
        first_word: object,
        clip_weight: object,
        object_logits: object | None,
        thresholds: object,
        out: ClassArrays,
        stream: Any,
        *,
        rank_all: bool = False,
        with_unknown: bool = False,
    ) -> None:
        """Class probabilities of masks; see :func:`odise_rt.classification.name_queries`.

        Args:
            mask_cosines: float32 (Q, L) of the mask classifier; (Q, L + 1) with "no object" as last word where there
                are no object logits.
            clip_cosines: float32 (Q, L) of CLIP.
            first_word: int32 (K + 1,): the first word of each class; the last entry is L.
            clip_weight: float32 (K,): CLIP's weight for each class.
            object_logits: float32 (Q, 2) of the caption variant, or ``None``.
            thresholds: float32 (2,): the probability below which a mask is "unknown", if there is that; and what a
                class must exceed for its mask to take part in the merge.
            out: written.
            stream: as for :meth:`Kernels.mask_pool`.
            rank_all: rank the names of masks that are likeliest no object, too.
            with_unknown: whether there is "unknown", and a column of ``out.probabilities`` for it.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        clip = gpu_array(clip_cosines, "clip_cosines")
        first = gpu_array(first_word, "first_word")
        if len(clip.shape) != 2 or len(first.shape) != 1 or len(out.ranked.shape) != 2:
            raise BackendError(
                f"clip_cosines {clip.shape}, first_word {first.shape} and ranked {out.ranked.shape}, expected (Q, L), "
                "(K + 1,) and (Q, N)"
            )
        (queries, words), classes, best = clip.shape, first.shape[0] - 1, out.ranked.shape[1]
        plan = plan_name_classes(queries, words, classes, best)
        objects = 0
        if object_logits is not None:
            logits = gpu_array(object_logits, "object_logits")
            objects = expect_named(logits, "object_logits", (queries, 2), "float32").pointer
        columns = classes + 1 + with_unknown
        mask_words = words if objects else words + 1
        inputs = (
            (mask_cosines, "mask_cosines", (queries, mask_words), "float32"),
            (clip, "clip_cosines", (queries, words), "float32"),
            (first, "first_word", (classes + 1,), "int32"),
            (clip_weight, "clip_weight", (classes,), "float32"),
        )
        limits = expect_named(gpu_array(thresholds, "thresholds"), "thresholds", (2,), "float32")
        outputs = (
            (out.probabilities, "probabilities", (queries, columns), "float32"),
            (out.labels, "labels", (queries,), "int32"),
            (out.scores, "scores", (queries,), "float32"),
            (out.ranked, "ranked", (queries, best), "int32"),
            (out.ranked_scores, "ranked_scores", (queries, best, 3), "float32"),
        )
        read, written = _pointers(inputs), _pointers(outputs)
        self._kernels.launch(
            plan, stream, *read, objects, limits.pointer, *map(np.int32, (queries, words, classes, best, rank_all)),
            np.int32(with_unknown), *written,
        )  # fmt: skip

    def choose_segments(
        self,
        labels: object,
        scores: object,
        areas: object,
        things: object,
        overlap_threshold: object,
        out: SegmentArrays,
        stream: Any,
    ) -> None:
        """Which masks become segments; see :func:`odise_rt.postprocessing.merge_panoptic`.

        Args:
            labels: int32 (Q,), of :meth:`name_classes`.
            scores: float32 (Q,), likewise.
            areas: int32 (3, Q), of :meth:`Kernels.panoptic_merge`.
            things: uint8 (K,) or, with "unknown", (K + 1,): 1 for things.
            overlap_threshold: float64 (1,), in [0, 1].
            out: written; ``facts`` are made ready for :meth:`paint_segments`.
            stream: as for :meth:`Kernels.mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        label, thing = gpu_array(labels, "labels"), gpu_array(things, "things")
        if len(label.shape) != 1 or len(thing.shape) != 1:
            raise BackendError(f"labels {label.shape} and things {thing.shape}, expected (Q,) and (K,)")
        queries = label.shape[0]
        plan = plan_choose_segments(queries)
        inputs = (
            (label, "labels", (queries,), "int32"),
            (scores, "scores", (queries,), "float32"),
            (areas, "areas", (3, queries), "int32"),
            (thing, "things", thing.shape, "uint8"),
            (overlap_threshold, "overlap_threshold", (1,), "float64"),
        )
        outputs = (
            (out.ids, "ids", (queries,), "int32"),
            (out.count, "count", (2,), "int32"),
            (out.queries, "queries", (queries,), "int32"),
            (out.classes, "classes", (queries,), "int32"),
            (out.scores, "scores", (queries,), "float32"),
            (out.facts, "facts", (5, queries), "int32"),
        )
        read, written = _pointers(inputs), _pointers(outputs)
        self._kernels.launch(plan, stream, *read, np.int32(queries), *written)

    def paint_segments(self, owner: object, segments: SegmentArrays, segment_map: object, stream: Any) -> None:
        """The segment map, and boxes and areas of the segments.

        Args:
            owner: int16 (h, w), of :meth:`Kernels.panoptic_merge`.
            segments: of :meth:`choose_segments`; its ``facts`` are written.
            segment_map: int32 (h, w); written.
            stream: as for :meth:`Kernels.mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        masks = gpu_array(owner, "owner")
        if len(masks.shape) != 2:
            raise BackendError(f"owner is {masks.shape}, expected (h, w)")
        queries, (rows, columns) = segments.ids.shape[0], masks.shape
        plan = plan_paint_segments(queries, (rows, columns))
        expect_named(masks, "owner", (rows, columns), "int16")
        expect_named(segments.facts, "facts", (5, queries), "int32")
        out = expect_named(gpu_array(segment_map, "segment_map"), "segment_map", (rows, columns), "int32")
        self._kernels.launch(
            plan, stream, masks.pointer, segments.ids.pointer, segments.count.pointer,
            *map(np.int32, (queries, rows, columns)), segments.facts.pointer, out.pointer,
        )  # fmt: skip


def _pointers(arrays: Iterable[tuple[object, str, tuple[int, ...], str]]) -> list[int]:
    """Where arrays lie, each with its name and the shape and type that it must have."""
    return [expect_named(gpu_array(array, name), name, shape, dtype).pointer for array, name, shape, dtype in arrays]
