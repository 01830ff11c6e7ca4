"""Naming masks: the CUDA kernels' bodies, emulated on the CPU, against what the runtime does on the host."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from odise_rt.classification import Classifier, MaskEmbeddings, class_logits, clip_weights, name_queries
from odise_rt.kernels.launch_plans import (
    COSINE_TILE,
    NAME_THREADS,
    PAINT_COLUMNS,
    PAINT_ROWS,
    plan_choose_segments,
    plan_name_classes,
    plan_paint_segments,
    plan_text_cosines,
)
from odise_rt.kernels.reference import choose_segments
from odise_rt.postprocessing import MaskResizer, merge_panoptic
from odise_rt.specs import ModelFacts
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise
from tests.odise_rt.fake_bundle import make_facts
from tests.odise_rt.kernels.compiled import Compiled
from tests.odise_rt.kernels.emulated import Emulation
from tests.odise_rt.kernels.test_panoptic_merge import blobs


def embeddings(rows: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, channels)).astype(np.float32)


# ---- cosines ---------------------------------------------------------------------------------------------------------


# Masks, channels, words: one of everything, tiles that come out even and not, more channels than a step.
@pytest.mark.parametrize("size", [(1, 1, 1), (64, 16, 64), (100, 256, 133), (65, 17, 3), (3, 33, 200)])
def test_cosines_are_those_of_the_host(implementation: Emulation | Compiled, size: tuple[int, int, int]) -> None:
    queries, channels, words = size
    masks, texts = 7 * embeddings(queries, channels, 0), normalise(embeddings(words, channels, 1))
    expected = class_logits(normalise(masks), texts, np.arange(words), 20.0)
    found = implementation.text_cosines(masks, texts, 20.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=20 * 2e-6)


def test_an_embedding_of_zeros_is_as_far_from_every_word(implementation: Emulation | Compiled) -> None:
    found = implementation.text_cosines(np.zeros((2, 8), np.float32), normalise(embeddings(3, 8, 1)), 20.0)
    assert np.array_equal(found, np.zeros((2, 3), np.float32))


# ---- classes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A vocabulary of classes with synonyms, and masks."""

    facts: ModelFacts
    masks: MaskEmbeddings
    words: EmbeddedVocabulary
    first_word: np.ndarray
    seen: np.ndarray
    no_object: np.ndarray | None

    @classmethod
    def new(cls, classes: int, queries: int = 9, variant: str = "label", seed: int = 0) -> Case:
        random = np.random.default_rng(seed)
        facts = make_facts(variant)
        synonyms = random.integers(1, 4, classes)
        first_word = np.concatenate([[0], np.cumsum(synonyms)[:-1]])
        mask_text, clip_text = (normalise(embeddings(int(synonyms.sum()), n, seed + n)) for n in (12, 20))
        label = variant == "label"
        return cls(
            facts,
            MaskEmbeddings(
                embeddings(queries, 12, seed + 1),
                embeddings(queries, 20, seed + 2),
                None if label else random.normal(0, 3, (queries, 2)).astype(np.float32),
            ),
            EmbeddedVocabulary(mask_text, clip_text),
            first_word,
            random.random(classes) < 0.5,
            embeddings(1, 12, seed + 3)[0] if label else None,
        )

    def on_host(self, best: int, unknown: float | None, rank_all: bool):  # type: ignore[no-untyped-def]
        weights = clip_weights(self.seen, 0.3, 0.7)
        classifier = Classifier(self.facts, self.no_object, self.words, self.first_word, weights)
        return name_queries(self.masks, classifier, best=best, unknown=unknown, rank_all=rank_all)

    def emulated(
        self,
        implementation: Emulation | Compiled,
        best: int,
        unknown: float | None,
        rank_all: bool,
        threshold: float = 0.0,
    ) -> dict[str, np.ndarray]:
        mask_text = self.words.mask_text
        if self.no_object is not None:
            mask_text = np.concatenate([mask_text, normalise(self.no_object[None])])
        cosines = implementation.text_cosines(self.masks.mask, mask_text, self.facts.mask_logit_scale)
        clip_cosines = implementation.text_cosines(self.masks.clip, self.words.clip_text, self.facts.clip_logit_scale)
        return implementation.name_classes(
            cosines, clip_cosines, np.append(self.first_word, len(self.words.mask_text)).astype(np.int32),
            np.where(self.seen, 0.3, 0.7).astype(np.float32), self.masks.object_logits,
            unknown=unknown, threshold=threshold, best=min(best, len(self.first_word)), rank_all=rank_all,
        )  # fmt: skip


@pytest.mark.parametrize("variant", ["label", "caption"])
@pytest.mark.parametrize("classes", [1, 2, 40, 300, 1000])
@pytest.mark.parametrize(("best", "unknown", "rank_all"), [(5, None, False), (3, 0.35, True), (0, 0.99, False)])
def test_classes_are_those_of_the_host(
    implementation: Emulation | Compiled, variant: str, classes: int, best: int, unknown: float | None, rank_all: bool
) -> None:
    case = Case.new(classes, variant=variant, seed=classes)
    expected = case.on_host(best, unknown, rank_all)
    found = case.emulated(implementation, best, unknown, rank_all)
    np.testing.assert_allclose(found["probabilities"], expected.probabilities, rtol=2e-4, atol=2e-7)
    labels = expected.probabilities.argmax(axis=1)
    no_object = expected.probabilities.shape[1] - 1
    assert np.array_equal(found["labels"], np.where(labels == no_object, -1, labels))
    scores = np.where(labels == no_object, 0, expected.probabilities[np.arange(len(labels)), labels])
    np.testing.assert_allclose(found["scores"], scores, rtol=2e-4)
    assert np.array_equal(found["ranked"], expected.classes)
    for column, wanted in enumerate((expected.scores, expected.mask_scores, expected.clip_scores)):
        np.testing.assert_allclose(found["ranked_scores"][:, :, column], wanted, rtol=2e-4, atol=1e-9)
    if variant == "caption":
        assert 0 < (labels == no_object).sum() < len(labels), "both kinds of masks are tested"


def test_masks_below_the_threshold_take_no_part(implementation: Emulation | Compiled) -> None:
    case = Case.new(40, queries=30)
    free, strict = (case.emulated(implementation, 1, None, False, threshold) for threshold in (0.0, 0.5))
    assert np.array_equal(free["labels"], strict["labels"]), "the label stays"
    assert np.array_equal(strict["scores"], np.where(free["scores"] > 0.5, free["scores"], 0))
    assert 0 < (strict["scores"] > 0).sum() < (free["scores"] > 0).sum()


def test_of_equal_classes_the_first_is_best(implementation: Emulation | Compiled) -> None:
    case = Case.new(300, queries=2)
    words = int(case.first_word[-1]) + 1
    same = (
        np.broadcast_to(case.words.mask_text[:1], (words, 12)),
        np.broadcast_to(case.words.clip_text[:1], (words, 20)),
    )
    case.words = EmbeddedVocabulary(*(np.ascontiguousarray(text) for text in same))
    case.first_word, case.seen = np.arange(words), np.zeros(words, bool)
    found = case.emulated(implementation, 4, None, True)
    assert np.array_equal(found["ranked"], [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("largest", [3e4, -3e4])
def test_no_logit_overflows(implementation: Emulation | Compiled, largest: float) -> None:
    cosines = np.full((1, 5), 0, np.float32)
    cosines[0, 2] = largest
    found = implementation.name_classes(
        cosines, np.ascontiguousarray(cosines[:, :4]), np.arange(5, dtype=np.int32), np.full(4, 0.5, np.float32), None,
        unknown=None, threshold=0, best=1, rank_all=True,
    )  # fmt: skip
    assert np.isfinite(found["probabilities"]).all()
    assert found["probabilities"].sum() == pytest.approx(1, abs=1e-6)
    assert (found["ranked"][0, 0] == 2) == (largest > 0)


def test_a_mask_that_is_not_a_number_is_told(implementation: Emulation | Compiled) -> None:
    case = Case.new(40, queries=3)
    good = case.emulated(implementation, 3, None, True)
    case.masks.mask[1, 5] = np.nan
    found = case.emulated(implementation, 3, None, True)
    assert found["labels"][1] == -2
    assert found["scores"][1] == 0
    assert not found["ranked"][1].any()
    for name, array in found.items():
        assert np.array_equal(array[[0, 2]], good[name][[0, 2]]), "the other masks are as ever"
    areas = np.full((3, 3), 10, np.int32)
    owner = np.array([[0, 1, 2]], np.int16)
    segment_map, _ = implementation.segments(
        found["labels"], np.ones(3, np.float32), owner, areas, np.ones(41, np.uint8), 0
    )
    assert segment_map[0, 1] == 0


# ---- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (1, 1), (33, 65), (8, 31), (120, 47)])
@pytest.mark.parametrize("overlap", [0.0, 0.8])
def test_segments_are_those_of_the_host(
    implementation: Emulation | Compiled, size: tuple[int, int], overlap: float
) -> None:
    queries, classes = 20, 6
    logits, _ = blobs(queries, (32, 32), seed=size[0])
    random = np.random.default_rng(size[1])
    probabilities = random.dirichlet(np.full(classes + 1, 0.3), queries).astype(np.float32)
    isthing = np.array([True, False, True, False, False, True])
    network_size = (100, 128)
    resizer = MaskResizer((32, 32), network_size, size)
    expected_map, expected = merge_panoptic(logits, probabilities, isthing, resizer, 0.3, overlap)

    labels = probabilities.argmax(axis=1).astype(np.int32)
    scores = probabilities.max(axis=1)
    scores = np.where((labels != classes) & (scores > 0.3), scores, 0).astype(np.float32)
    owner, areas = implementation.panoptic_merge(logits, scores, network_size, size)
    labels[labels == classes] = -1
    segment_map, found = implementation.segments(labels, scores, owner, areas, isthing.astype(np.uint8), overlap)
    ids, chosen = choose_segments(labels, scores, areas, isthing, overlap)
    assert chosen == [(s.query, s.class_index, s.score) for s in expected]
    assert np.array_equal(np.where(owner >= 0, ids[owner], 0), expected_map)
    assert np.array_equal(segment_map, expected_map), "no pixel is undecided in these cases"
    assert [(q, c) for q, c, _, _ in found] == [(s.query, s.class_index) for s in expected]
    assert [s for _, _, s, _ in found] == [s.score for s in expected]
    assert [facts for *_, facts in found] == [(*s.box, s.area) for s in expected]
    if size == (64, 96) and overlap == 0:
        assert len(expected) >= 4
        joined = {s.class_index for s in expected if not s.isthing}
        assert any(((labels == c) & (scores > 0)).sum() > 1 for c in joined), "stuff of one class is joined"


def test_a_result_without_segments(implementation: Emulation | Compiled) -> None:
    labels, scores = np.full(3, -1, np.int32), np.zeros(3, np.float32)
    owner, areas = np.full((9, 40), -1, np.int16), np.zeros((3, 3), np.int32)
    segment_map, found = implementation.segments(labels, scores, owner, areas, np.ones(2, np.uint8), 0.8)
    assert found == []
    assert not segment_map.any()


@pytest.mark.parametrize("queries", [1, 100, 600])
def test_segments_of_masks_at_random(implementation: Emulation | Compiled, queries: int) -> None:
    """Among them equal scores, shares of exactly the least overlap, masks without pixels and those that are broken."""
    random = np.random.default_rng(queries)
    isthing = np.arange(9) % 2 == 0
    labels = random.integers(-2, 9, queries).astype(np.int32)
    scores = (random.integers(0, 5, queries) / 4).astype(np.float32)
    areas = random.integers(0, 6, (3, queries)).astype(np.int32)
    owner = np.resize(np.arange(queries, dtype=np.int16), (20, 40))
    segment_map, found = implementation.segments(labels, scores, owner, areas, isthing.astype(np.uint8), 0.5)
    ids, chosen = choose_segments(labels, scores, areas, isthing, 0.5)
    assert [(q, c, s) for q, c, s, _ in found] == chosen
    assert np.array_equal(segment_map, ids[owner])


def test_as_many_segments_as_masks(implementation: Emulation | Compiled) -> None:
    queries = 2048
    owner = np.arange(queries, dtype=np.int16).reshape(32, 64)
    areas = np.ones((3, queries), np.int32)
    labels, scores = np.zeros(queries, np.int32), np.ones(queries, np.float32)
    segment_map, found = implementation.segments(labels, scores, owner, areas, np.ones(1, np.uint8), 0.8)
    assert np.array_equal(segment_map, owner.astype(np.int32) + 1)
    assert [facts for *_, facts in found] == [(x, y, x + 1, y + 1, 1) for y in range(32) for x in range(64)]


def test_plans_are_the_sizes_that_the_bodies_expect() -> None:
    cosines = plan_text_cosines(100, 256, 134)
    assert (cosines.grid, cosines.threads) == ((3, 2, 1), NAME_THREADS)
    assert cosines.shared_bytes == (2 * 16 * (COSINE_TILE + 4) + NAME_THREADS) * 4
    assert plan_name_classes(100, 250, 133, 5).grid == (100, 1, 1)
    assert plan_choose_segments(100).grid == (1, 1, 1)
    assert plan_choose_segments(2048).shared_bytes <= 48 << 10, "what every block may have"
    paint = plan_paint_segments(100, (1024, 1365))
    assert paint.grid == (-(-1365 // PAINT_COLUMNS), 1024 // PAINT_ROWS, 1)
    assert plan_paint_segments(2048, (1, 1)).shared_bytes <= 48 << 10, "what every block may have"
