"""The kernels that name masks on this GPU: compared with what the runtime does on the host, and timed beside PyTorch.

See :mod:`benchmarks.gpu_kernels`, of whose rows these are a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from odise_rt.classification import class_logits, log_softmax, softmax
from odise_rt.kernels import reference
from odise_rt.kernels.naming import ClassArrays, NamingKernels, SegmentArrays
from odise_rt.kernels.native import Kernels
from odise_rt.postprocessing import boxes_and_areas
from odise_rt.text_embeddings import normalise

NAMING_SIZES = [
    (100, 256, 768, 133, 2, (480, 640)),
    (1, 5, 3, 1, 1, (1, 1)),
    (130, 33, 70, 1000, 3, (333, 491)),
    (100, 256, 768, 10_000, 1, (1024, 1024)),
]
"""Masks, channels of the mask classifier and of CLIP, classes, synonyms at most, size of the result."""
FIXED = ("first_word", "clip_weight", "thresholds", "things", "overlap", "owner", "areas")
"""Inputs of the kernels that are single arrays."""
LEAST_SCORE, LEAST_OVERLAP = 0.05, 0.8
NAMING_TIMED = [(100, 256, 768, 133, (1024, 1024)), (100, 256, 768, 10_000, (1024, 1024))]
"""Masks, channels of both, classes of one word each, size of the result: COCO's vocabulary, and a very large one."""
SCALES = (20.0, 30.0)
"""Factors on the cosines of the mask classifier and of CLIP. Less than the published hundred, as random words are
further apart than real ones: most probabilities shall be neither 0 nor 1."""
PROBABILITY_ERROR = 2e-4
"""Relative: float32 cosines times thirty lose some 1e-5 before the exponential."""
SMALL = 1e-3
"""Added to a probability before an error is divided by it: 1 - p of "no object" is exact to 1e-7 only."""
UNDECIDED = 1e-3
"""Relative; of two classes closer than this either may win."""


class NamingInputs:
    """Random masks and words on the host, and arrays for them and for the results on the GPU."""

    def __init__(self, gpu: Any, size: tuple[Any, ...], unknown: float | None, seed: int) -> None:
        queries, mask_channels, clip_channels, classes, synonyms, shape = size
        random = np.random.default_rng(seed)
        counts = random.integers(1, synonyms + 1, classes)
        words = int(counts.sum())
        self.classes, self.unknown, self.best = classes, unknown, min(5, classes)
        self.first_word = np.append(0, np.cumsum(counts)).astype(np.int32)

        def normal(rows: int, channels: int) -> np.ndarray:
            return random.normal(size=(rows, channels)).astype(np.float32)

        self.embeddings = normal(queries, mask_channels), normal(queries, clip_channels)
        # The last word of the mask classifier is "no object".
        self.texts = normalise(normal(words + 1, mask_channels)), normalise(normal(words, clip_channels))
        self.clip_weight = np.where(random.random(classes) < 0.5, 0.35, 0.65).astype(np.float32)
        self.things = (random.random(classes + 1) < 0.5).astype(np.uint8)
        # Most masks look like some word, and some like no object.
        for query in range(queries):
            word = int(random.integers(words + 1))
            clearly = random.uniform(0, 9)
            self.embeddings[0][query] += clearly * self.texts[0][word]
            if word < words:
                self.embeddings[1][query] += clearly * self.texts[1][word]
        self.thresholds = np.array([unknown or 0, LEAST_SCORE], np.float32)
        self.overlap = np.array([LEAST_OVERLAP])
        self.owner = random.integers(-1, queries, shape).astype(np.int16)
        self.owner.ravel()[: self.owner.size // 2] = -1  # the upper half is nobody's
        kept = np.bincount(self.owner.ravel() + 1, minlength=queries + 1)[1:]
        self.areas = np.stack([kept + random.integers(0, 9, queries), kept, kept]).astype(np.int32)

        def put(array: np.ndarray) -> Any:
            return gpu.torch.from_numpy(array).to(gpu.device)

        def new(shape_: tuple[int, ...], kind: str = "float32") -> Any:
            return gpu.poisoned(shape_, getattr(gpu.torch, kind))

        self.placed = {
            "embeddings": [put(array) for array in self.embeddings],
            "texts": [put(array) for array in self.texts],
            "cosines": [new((queries, words + 1)), new((queries, words))],
            **{name: put(getattr(self, name)) for name in FIXED},
        }
        ranked = (queries, self.best)
        self.found = {
            "probabilities": new((queries, classes + (1 if unknown is None else 2))),
            "labels": new((queries,), "int32"),
            "scores": new((queries,)),
            "ranked": new(ranked, "int32"),
            "ranked_scores": new((*ranked, 3)),
        }
        self.segments = {
            "ids": new((queries,), "int32"),
            "count": new((2,), "int32"),
            "queries": new((queries,), "int32"),
            "classes": new((queries,), "int32"),
            "scores": new((queries,)),
            "facts": new((5, queries), "int32"),
        }
        self.segment_map = new(shape, "int32")

    def call(self, gpu: Any, kernels: Kernels) -> Callable[[], None]:
        """A call that launches everything but the merge, whose owners and areas are given."""
        naming, placed = NamingKernels(kernels), self.placed
        arrays = ClassArrays(**{name: gpu.array(array) for name, array in self.found.items()})
        segments = SegmentArrays(**{name: gpu.array(array) for name, array in self.segments.items()})
        inputs = {name: gpu.array(array) for name, array in placed.items() if not isinstance(array, list)}
        pairs = [[gpu.array(part) for part in placed[name]] for name in ("embeddings", "texts", "cosines")]
        (mask_cosines, clip_cosines), segment_map = pairs[2], gpu.array(self.segment_map)

        def run() -> None:
            for embedding, text, scale, out in zip(*pairs[:2], SCALES, pairs[2], strict=True):
                naming.text_cosines(embedding, text, scale, out, gpu.handle)
            naming.name_classes(
                mask_cosines, clip_cosines, inputs["first_word"], inputs["clip_weight"], None, inputs["thresholds"],
                arrays, gpu.handle, with_unknown=self.unknown is not None,
            )  # fmt: skip
            naming.choose_segments(
                arrays.labels, arrays.scores, inputs["areas"], inputs["things"], inputs["overlap"], segments, gpu.handle
            )
            naming.paint_segments(inputs["owner"], segments, segment_map, gpu.handle)

        return run

    def problems(self) -> tuple[float, list[str]]:
        """Largest error of a probability, relative to it (and :data:`SMALL`), and what else is wrong."""
        found = {name: array.cpu().numpy() for name, array in self.found.items()}
        expected, alone = self._probabilities()
        probabilities = found["probabilities"]
        problems = [] if np.isfinite(probabilities).all() else ["there are NaN or infinite probabilities"]
        unnamed = found["labels"] == self.classes
        best = expected[:, :-1].max(axis=1)
        if self.unknown is not None:
            given = probabilities[:, self.classes]
            for_words = np.where((given > 0)[:, None], 0, expected[:, :-1])
            expected_given = np.where(given > 0, best, 0)
            wanted = np.concatenate([for_words, expected_given[:, None], expected[:, -1:]], axis=1)
            if ((given > 0) != (best < self.unknown))[np.abs(best / self.unknown - 1) > UNDECIDED].any():
                problems.append("other masks are unknown")
        else:
            wanted = expected
        error = float((np.abs(probabilities - wanted) / (wanted + SMALL)).max())
        is_object = best >= expected[:, -1]
        sure = np.abs(best / expected[:, -1] - 1) > UNDECIDED
        wants_unknown = np.zeros(len(best), bool)
        if self.unknown is not None:
            wants_unknown = is_object & (best < self.unknown)
            sure &= np.abs(best / self.unknown - 1) > UNDECIDED
        rows = np.arange(len(best))
        taken = expected[rows, found["labels"].clip(0, self.classes - 1)]
        right = np.where(
            ~is_object,
            found["labels"] == -1,
            np.where(wants_unknown, unnamed, (found["labels"] >= 0) & (taken >= best * (1 - UNDECIDED))),
        )
        if (sure & ~right).any():
            problems.append(f"{int((sure & ~right).sum())} masks have a wrong label")
        scores = np.where((found["labels"] >= 0) & (best > LEAST_SCORE), best, 0)
        if not np.allclose(found["scores"], scores, rtol=PROBABILITY_ERROR):
            problems.append("scores for the merge are wrong")
        which = found["ranked"].astype(np.int64).clip(0, self.classes - 1)
        ranked = np.take_along_axis(expected, which, axis=1)
        top = -np.sort(-expected[:, :-1], axis=1)[:, : self.best]
        if not np.allclose(ranked[is_object & sure], top[is_object & sure], rtol=PROBABILITY_ERROR):
            problems.append("the best classes are not the best")
        told = np.stack([np.take_along_axis(p, which, axis=1) for p in (expected, *alone)])
        close = np.isclose(found["ranked_scores"].transpose(2, 0, 1), told, rtol=PROBABILITY_ERROR, atol=1e-7)
        if not close[:, is_object & sure].all():
            problems.append("the probabilities of the best classes are wrong")
        return error, problems + self._segment_problems(found)

    def _probabilities(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """float64 (Q, K + 1), by the definition in :func:`odise_rt.classification.classify`; and of each classifier
        alone (Q, K)."""
        wide = [normalise(array).astype(np.float64) for array in self.embeddings]
        first = self.first_word[:-1]
        mask, clip = (
            class_logits(embedding, text.astype(np.float64)[: self.first_word[-1]], first, scale)
            for embedding, text, scale in zip(wide, self.texts, SCALES, strict=True)
        )
        none = wide[0] @ self.texts[0][-1:].T * SCALES[0]
        no_object = softmax(np.concatenate([mask, none], axis=1))[:, -1:]
        weight = self.clip_weight.astype(np.float64)
        both = softmax((1 - weight) * log_softmax(mask) + weight * log_softmax(clip))
        joined = np.concatenate([both * (1 - no_object), no_object], axis=1) + 1e-8
        return joined / joined.sum(axis=1, keepdims=True), (softmax(mask), softmax(clip))

    def _segment_problems(self, found: dict[str, np.ndarray]) -> list[str]:
        """Segments held to the labels and scores that the GPU found itself: these are exact."""
        segments = {name: array.cpu().numpy() for name, array in self.segments.items()}
        ids, chosen = reference.choose_segments(
            found["labels"], found["scores"], self.areas, self.things, LEAST_OVERLAP
        )
        count, problems = len(chosen), []
        got = zip(segments["queries"], segments["classes"], segments["scores"], strict=True)
        if (
            segments["count"].tolist() != [count, 0]
            or list(got)[:count] != chosen
            or not np.array_equal(segments["ids"], ids)
        ):
            problems.append("other masks became segments")
            return problems
        expected = np.where(self.owner >= 0, ids[self.owner], 0)
        if not np.array_equal(self.segment_map.cpu().numpy(), expected):
            problems.append("the segment map is wrong")
        boxes, areas = boxes_and_areas(expected, count)
        facts = [tuple(int(v) for v in segments["facts"][:, index]) for index in range(count)]
        wanted = [(*box, area) for box, area in zip(boxes, areas, strict=True) if area]
        if [fact for fact in facts if fact[4]] != wanted:
            problems.append("boxes or areas are wrong")
        return problems


def naming_cases(
    gpu: Any, kernels: Kernels, quick: bool
) -> Iterator[tuple[str, Callable[[], tuple[float, float, list[str]]]]]:
    """Correctness cases: name, and what gives error, allowed error and problems."""

    def case(size: tuple[Any, ...], unknown: float | None) -> Callable[[], tuple[float, float, list[str]]]:
        def run() -> tuple[float, float, list[str]]:
            seed = int(gpu.torch.randint(1 << 30, (1,)))
            inputs = NamingInputs(gpu, size, unknown, seed)
            inputs.call(gpu, kernels)()
            gpu.synchronize()
            error, problems = inputs.problems()
            return error, PROBABILITY_ERROR, problems

        return run

    for size in NAMING_SIZES[: 3 if quick else None]:
        for unknown in (None, 0.4):
            name = f"naming {size[0]} masks, {size[3]} classes" + (", unknown" if unknown else "")
            yield name, case(size, unknown)


def time_naming(gpu: Any, kernels: Kernels) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], float]]:
    """Name, our call, PyTorch's operations for the same, and bytes that must be moved."""
    torch = gpu.torch
    for queries, mask_channels, clip_channels, classes, shape in NAMING_TIMED:
        size = (queries, mask_channels, clip_channels, classes, 1, shape)
        inputs = NamingInputs(gpu, size, None, seed=0)
        placed = inputs.placed
        ids = torch.arange(queries + 1, dtype=torch.int32, device=gpu.device)
        ones = torch.ones(inputs.owner.size, dtype=torch.int32, device=gpu.device)

        def baseline(placed: Any = placed, ids: Any = ids, ones: Any = ones, classes: int = classes) -> Any:
            mask, clip = (
                torch.nn.functional.normalize(e) @ t.T * s
                for e, t, s in zip(placed["embeddings"], placed["texts"], SCALES, strict=True)
            )
            no_object = mask.softmax(1)[:, -1:]
            weight = placed["clip_weight"]
            both = (1 - weight) * mask[:, :classes].log_softmax(1) + weight * clip.log_softmax(1)
            joined = torch.cat([both.softmax(1) * (1 - no_object), no_object], dim=1) + 1e-8
            joined = joined / joined.sum(1, keepdim=True)
            painted = ids[placed["owner"].long()]
            areas = torch.zeros_like(ids).scatter_add_(0, painted.flatten().long(), ones)
            return joined.max(1), joined[:, :-1].topk(5), painted, areas

        moved = sum(t.numel() * t.element_size() for t in placed["texts"])
        moved += 4 * queries * classes + inputs.owner.size * (2 + 4)
        name = f"naming {queries} masks, {classes} classes, {shape[0]}x{shape[1]}"
        yield name, inputs.call(gpu, kernels), baseline, float(moved)
