"""Names for masks on the GPU: what is uploaded once for a vocabulary, and set up once for a size of result.

See :mod:`odise_rt.backends.image_pipeline`, which keeps some of both, and :mod:`odise_rt.naming`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.backends.device_memory import DeviceMemory, buffer_of
from odise_rt.classification import MaskEmbeddings, MaskNames, not_numbers
from odise_rt.kernels.naming import ClassArrays, NamingKernels, SegmentArrays
from odise_rt.kernels.native import Kernels
from odise_rt.naming import Named, NamingRequest
from odise_rt.postprocessing import MergedSegment
from odise_rt.text_embeddings import normalise

_ALIGNMENT = 16
"""Bytes; of each small result within their common buffer."""


def words_key(request: NamingRequest) -> tuple[object, ...]:
    """What :class:`WordsOnGpu` of a request depend on."""
    return (request.words_id, request.classifier.first_word.tobytes())


def naming_key(
    request: NamingRequest, queries: int, network_size: tuple[int, int], original_size: tuple[int, int]
) -> tuple[object, ...]:
    """What a :class:`NamingPlan` depends on."""
    rules = (request.ranked, request.rank_all, request.wants_probabilities, len(request.isthing))
    return (queries, network_size, original_size, *rules, *words_key(request))


class WordsOnGpu:
    """A vocabulary's embeddings and classes in the memory of the GPU."""

    def __init__(self, session: CudaSession, request: NamingRequest) -> None:
        """Upload."""
        self._memory = DeviceMemory(session)
        classifier = request.classifier
        mask_text, no_object = classifier.words.mask_text, classifier.no_object_embedding
        count = len(mask_text)
        if classifier.facts.variant == "label":
            assert no_object is not None, "a label bundle's constants hold no_object_embedding"
            mask_text = np.concatenate([mask_text, normalise(no_object[None])])
        try:
            upload = self._memory.upload
            self.mask_text = upload(mask_text.astype(np.float32, copy=False))
            """float32 (L, P); (L + 1, P) with "no object" at the end in the label variant."""
            self.clip_text = upload(classifier.words.clip_text)
            """float32 (L, D)."""
            self.first_word = upload(np.append(classifier.first_word, count).astype(np.int32))
            """int32 (K + 1,)."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        self._memory.close()


class NamingPlan:
    """Buffers and launches from embeddings and mask logits to segments, for one vocabulary and size of result.

    Thresholds, weights and kinds of classes are read from memory on the way: they may be others in each run of a graph.
    """

    def __init__(
        self,
        session: CudaSession,
        kernels: Kernels,
        words: WordsOnGpu,
        request: NamingRequest,
        queries: int,
        network_size: tuple[int, int],
        original_size: tuple[int, int],
    ) -> None:
        """Set up.

        Args:
            session: where.
            kernels: on its GPU.
            words: of the request.
            request: by which words; of its rules only those matter that :func:`naming_key` has.
            queries: masks.
            network_size: height and width of the unpadded image in the network.
            original_size: height and width of the result.
        """
        self.words = words
        self._session, self._kernels, self._naming = session, kernels, NamingKernels(kernels)
        self._memory = DeviceMemory(session)
        self._network_size = network_size
        self._facts, self._rank_all = request.classifier.facts, request.rank_all
        self._with_unknown = len(request.isthing) > len(request.classifier.first_word)
        self._isthing = request.isthing
        self._from_host: dict[str, tuple[Any, np.ndarray, DeviceArray]] = {}
        try:
            self._prepare(queries, original_size, request)
        except BaseException:
            self.close()
            raise

    def feed(self, request: NamingRequest) -> None:
        """Set what the next run goes by."""
        options, rules = request.options, self._rules_on_host
        rules["overlap"][0] = options.overlap_threshold
        rules["thresholds"][:] = options.unknown or 0.0, options.object_mask_threshold
        rules["clip_weight"][:] = request.classifier.clip_weight
        rules["things"][:] = request.isthing
        self._isthing = request.isthing

    def enqueue(
        self,
        logits: DeviceArray,
        mask_embedding: DeviceArray,
        clip_embedding: DeviceArray,
        object_logits: DeviceArray | None,
    ) -> None:
        """Put everything from embeddings to the result on the stream, its way to the host included.

        Args:
            logits: float32 (Q, mh, mw).
            mask_embedding: float32 (Q, P).
            clip_embedding: float32 (Q, D).
            object_logits: float32 (Q, 2), of the caption variant.
        """
        stream, words, naming, rules = self._session.stream, self.words, self._naming, self._rules
        pinned, placed = self._rules_in
        pinned.copy_to(buffer_of(placed), stream=stream)
        naming.text_cosines(mask_embedding, words.mask_text, self._facts.mask_logit_scale, self._mask_cosines, stream)
        naming.text_cosines(clip_embedding, words.clip_text, self._facts.clip_logit_scale, self._clip_cosines, stream)
        naming.name_classes(
            self._mask_cosines, self._clip_cosines, words.first_word, rules["clip_weight"], object_logits,
            rules["thresholds"], self._classes, stream, rank_all=self._rank_all, with_unknown=self._with_unknown,
        )  # fmt: skip
        self._kernels.panoptic_merge(
            logits, self._classes.scores, self._network_size, self._tables, self._owner, self._areas, stream
        )
        naming.choose_segments(
            self._classes.labels, self._classes.scores, self._areas, rules["things"], rules["overlap"],
            self._segments, stream,
        )  # fmt: skip
        naming.paint_segments(self._owner, self._segments, self._map, stream)
        for array, (pinned, _) in self._to_host:
            buffer_of(array).copy_to(pinned, stream=stream)

    def run(self, logits: DeviceArray, embeddings: MaskEmbeddings, request: NamingRequest) -> Named:
        """Name masks whose embeddings lie on the host; waits for the result."""
        self.feed(request)
        stream = self._session.stream
        wanted = {"mask": embeddings.mask, "clip": embeddings.clip}
        if self._facts.variant == "caption":
            assert embeddings.object_logits is not None, "the caption variant's mask_decoder has them by its spec"
            wanted["object_logits"] = embeddings.object_logits
        for name, values in wanted.items():
            if name not in self._from_host:
                array = self._memory.array(values.shape)
                self._from_host[name] = (*self._memory.pinned(values.shape, "float32"), array)
            pinned, staging, array = self._from_host[name]
            np.copyto(staging, values)
            pinned.copy_to(buffer_of(array), stream=stream)
        placed = {name: self._from_host[name][2] for name in wanted}
        self.enqueue(logits, placed["mask"], placed["clip"], placed.get("object_logits"))
        stream.sync()
        return self.result()

    def result(self) -> Named:
        """What the last run found, in arrays of the caller's own. The stream must have been waited for.

        Raises:
            BackendError: embeddings were not numbers.
        """
        small = self._small_on_host
        count, broken = (int(number) for number in small["count"])
        if broken:
            raise not_numbers(broken, small["queries"].size)
        scores = small["ranked_scores"].copy()
        names = MaskNames(
            self._probabilities_on_host.copy(),
            small["ranked"].astype(np.int64),
            *(np.ascontiguousarray(scores[:, :, column]) for column in range(3)),
        )
        segments = []
        for index in range(count):
            left, top, right, bottom, area = (int(value) for value in small["facts"][:, index])
            label = int(small["classes"][index])
            segments.append(
                MergedSegment(
                    index + 1,
                    label,
                    float(small["segment_scores"][index]),
                    area,
                    (left, top, right, bottom),
                    bool(self._isthing[label]),
                    int(small["queries"][index]),
                )
            )
        return Named(names, self._map_on_host.copy(), segments)

    def close(self) -> None:
        """Release everything but the words. Safe to call twice."""
        self._memory.close()

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _prepare(self, queries: int, original_size: tuple[int, int], request: NamingRequest) -> None:
        array, pinned = self._memory.array, self._memory.pinned
        classes, (rows, columns) = len(request.classifier.first_word), original_size
        self._mask_cosines = array((queries, self.words.mask_text.shape[0]))
        self._clip_cosines = array((queries, self.words.clip_text.shape[0]))
        self._tables = (array((rows,), "int32"), array((3, rows)), array((columns,), "int32"), array((3, columns)))
        self._owner, self._areas = array(original_size, "int16"), array((3, queries), "int32")
        self._map = array(original_size, "int32")
        small, probabilities = self._prepare_small(queries, request.ranked), array((queries, len(request.isthing) + 1))
        self._prepare_rules(classes, len(request.isthing))
        self._classes = ClassArrays(
            probabilities,
            array((queries,), "int32"),
            array((queries,)),
            small["ranked"],
            small["ranked_scores"],
        )
        self._segments = SegmentArrays(
            array((queries,), "int32"),
            small["count"],
            small["queries"],
            small["classes"],
            small["segment_scores"],
            small["facts"],
        )
        on_host = pinned(original_size, "int32")
        self._map_on_host = on_host[1]
        self._to_host.append((self._map, on_host))
        self._probabilities_on_host = np.zeros((queries, 0), np.float32)
        if request.wants_probabilities:
            on_host = pinned(probabilities.shape, "float32")
            self._probabilities_on_host = on_host[1]
            self._to_host.append((probabilities, on_host))

    def _prepare_small(self, queries: int, ranked: int) -> dict[str, DeviceArray]:
        """Results that do not grow with the image: parts of one buffer, so that one copy brings them all."""
        whole, on_host, parts, self._small_on_host = self._parts(
            {
                "count": ((2,), "int32"),
                "queries": ((queries,), "int32"),
                "classes": ((queries,), "int32"),
                "segment_scores": ((queries,), "float32"),
                "facts": ((5, queries), "int32"),
                "ranked": ((queries, ranked), "int32"),
                "ranked_scores": ((queries, ranked, 3), "float32"),
            }
        )
        self._to_host = [(whole, on_host)]
        return parts

    def _prepare_rules(self, classes: int, kinds: int) -> None:
        """What may be another in each run, likewise."""
        whole, (pinned, _), self._rules, self._rules_on_host = self._parts(
            {
                "overlap": ((1,), "float64"),
                "thresholds": ((2,), "float32"),
                "clip_weight": ((classes,), "float32"),
                "things": ((kinds,), "uint8"),
            }
        )
        self._rules_in = (pinned, whole)

    def _parts(
        self, shapes: dict[str, tuple[tuple[int, ...], str]]
    ) -> tuple[DeviceArray, tuple[Any, np.ndarray], dict[str, DeviceArray], dict[str, np.ndarray]]:
        """Arrays that lie side by side in one buffer, on the GPU and on the host."""
        starts, total = {}, 0
        for name, (shape, dtype) in shapes.items():
            starts[name] = total
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        whole, on_host = self._memory.array((total,), "uint8"), self._memory.pinned((total,), "uint8")
        there, here = {}, {}
        for name, (shape, dtype) in shapes.items():
            start, kind = starts[name], np.dtype(dtype)
            there[name] = replace(whole, pointer=whole.pointer + start, shape=shape, dtype=kind)
            stop = start + int(np.prod(shape)) * kind.itemsize
            here[name] = on_host[1][start:stop].view(kind).reshape(shape)
        return whole, on_host, there, here
