"""Class probabilities against the formulas of the paper, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odise_rt.classification import (
    Classification,
    Classifier,
    MaskEmbeddings,
    class_logits,
    classify,
    clip_weights,
    log_softmax,
    softmax,
)
from odise_rt.errors import BackendError
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise
from tests.odise_rt.fake_bundle import make_facts


def by_the_book(
    mask: np.ndarray,
    clip: np.ndarray,
    mask_text: np.ndarray,
    clip_text: np.ndarray,
    sizes: list[int],
    seen: np.ndarray,
    weights: tuple[float, float],
    scales: tuple[float, float],
    no_object: np.ndarray | None,
    object_logits: np.ndarray | None,
) -> np.ndarray:
    """softmax(log([softmax(log(p^(1-w) q^w)) (1 - n), n] + 1e-8)), one mask and class at a time."""

    def unit(v: np.ndarray) -> np.ndarray:
        return v.astype(np.float64) / np.linalg.norm(v.astype(np.float64))

    def soft(v: np.ndarray) -> np.ndarray:
        e = np.exp(v - v.max())
        return np.asarray(e / e.sum())

    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows = []
    for q in range(len(mask)):
        a, b = np.zeros(len(sizes)), np.zeros(len(sizes))
        for k in range(len(sizes)):
            words = range(starts[k], starts[k + 1])
            a[k] = max(unit(mask[q]) @ unit(mask_text[w]) for w in words) * scales[0]
            b[k] = max(unit(clip[q]) @ unit(clip_text[w]) for w in words) * scales[1]
        if object_logits is not None:
            no_object_share = soft(object_logits[q].astype(np.float64))[1]
        else:
            assert no_object is not None
            no_object_share = soft(np.append(a, unit(mask[q]) @ unit(no_object) * scales[0]))[-1]
        p, r = soft(a), soft(b)
        w = np.where(seen, *weights)
        joint = soft(np.log(p) * (1 - w) + np.log(r) * w)
        rows.append(soft(np.log(np.append(joint * (1 - no_object_share), no_object_share) + 1e-8)))
    return np.array(rows)


def random_case(seed: int, variant: str) -> tuple[np.ndarray, Classification]:
    rng = np.random.default_rng(seed)
    sizes = [1, 3, 2, 1]
    mask, clip = rng.standard_normal((5, 7), np.float32), rng.standard_normal((5, 9), np.float32)
    mask_text, clip_text = rng.standard_normal((7, 7), np.float32), rng.standard_normal((7, 9), np.float32)
    seen = rng.random(4) < 0.5
    no_object = rng.standard_normal(7, np.float32) if variant == "label" else None
    objects = rng.standard_normal((5, 2), np.float32) if variant == "caption" else None
    facts = make_facts(variant, mask_logit_scale=14.0, clip_logit_scale=100.0)
    expected = by_the_book(mask, clip, mask_text, clip_text, sizes, seen, (0.3, 0.7), (14.0, 100.0), no_object, objects)
    first_word = np.array([0, 1, 4, 6])
    words = EmbeddedVocabulary(normalise(mask_text), normalise(clip_text))
    masks = MaskEmbeddings(mask, clip, objects)
    return expected, classify(masks, Classifier(facts, no_object, words, first_word, clip_weights(seen, 0.3, 0.7)))


@pytest.mark.parametrize("variant", ["label", "caption"])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_formulas(variant: str, seed: int) -> None:
    expected, ours = random_case(seed, variant)
    np.testing.assert_allclose(ours.probabilities, expected, rtol=1e-3, atol=1e-10)  # the small ones, too
    np.testing.assert_allclose(ours.probabilities, expected, atol=2e-6)
    np.testing.assert_allclose(ours.probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(ours.mask_log_probabilities).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.exp(ours.clip_log_probabilities).sum(axis=1), 1, atol=1e-5)


def test_probabilities_of_many_words_sum_to_one() -> None:
    """Each has something added to it, which is not to add up."""
    rng = np.random.default_rng(0)
    text = normalise(rng.standard_normal((5000, 3), np.float32))
    masks = MaskEmbeddings(rng.standard_normal((2, 3), np.float32), rng.standard_normal((2, 3), np.float32), None)
    words, weights = EmbeddedVocabulary(text, text), np.full(5000, 0.7, np.float32)
    found = classify(masks, Classifier(make_facts(), text[0], words, np.arange(5000), weights))
    np.testing.assert_allclose(found.probabilities.sum(axis=1, dtype=np.float64), 1, atol=1e-5)


def test_opposed_classifiers_do_not_give_nan() -> None:
    """A class that one classifier rules out underflows to p = 0; log p = -inf times weight 0 would be NaN."""
    axes = np.eye(3, dtype=np.float32)
    words = EmbeddedVocabulary(axes, axes)
    masks = MaskEmbeddings(axes[:1] - axes[1:2], axes[1:2] - axes[:1], None)
    facts = make_facts(mask_logit_scale=100.0, clip_logit_scale=100.0)

    def run(clip_weight: float) -> np.ndarray:
        weights = np.full(3, clip_weight, np.float32)
        return classify(masks, Classifier(facts, axes[2], words, np.arange(3), weights)).probabilities

    for weight in (0.0, 0.5, 1.0):
        assert np.isfinite(run(weight)).all()
    assert run(0.0)[0].argmax() == 0
    assert run(1.0)[0].argmax() == 1


def test_seen_and_unseen_classes_are_weighted_apart() -> None:
    rng = np.random.default_rng(0)
    text = normalise(rng.standard_normal((4, 7), np.float32))
    masks = MaskEmbeddings(rng.standard_normal((3, 7), np.float32), rng.standard_normal((3, 7), np.float32), None)
    words, facts, no_object = EmbeddedVocabulary(text, text), make_facts(), rng.standard_normal(7, np.float32)

    def run(seen: list[bool], a: float, b: float) -> np.ndarray:
        weights = clip_weights(np.array(seen), a, b)
        return classify(masks, Classifier(facts, no_object, words, np.arange(4), weights)).probabilities

    assert np.array_equal(run([True] * 4, 0.2, 0.9), run([False] * 4, 0.9, 0.2))
    assert np.array_equal(run([True] * 4, 0.2, 0.9), run([True] * 4, 0.2, 0.1))
    assert not np.allclose(run([True, False, True, False], 0.2, 0.9), run([True] * 4, 0.2, 0.9))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("broken", ["mask", "clip", "object_logits"])
def test_what_is_no_number_is_an_error(broken: str, value: float) -> None:
    arrays = {name: np.ones((4, size), np.float32) for name, size in (("mask", 7), ("clip", 9), ("object_logits", 2))}
    MaskEmbeddings(**arrays).check()
    MaskEmbeddings(arrays["mask"], arrays["clip"], None).check()
    arrays[broken][1, 0] = arrays[broken][2, 1] = arrays[broken][2, 0] = value
    with pytest.raises(BackendError, match="2 of 4 masks"):
        MaskEmbeddings(**arrays).check()


def test_best_synonym_counts() -> None:
    embedding = normalise(np.array([[1, 0.2, 0]], np.float32))
    text = np.eye(3, dtype=np.float32)
    logits = class_logits(embedding, text, np.array([0, 2]), 10.0)
    assert logits.shape == (1, 2)
    assert logits[0, 0] == pytest.approx(10 * embedding[0, 0], rel=1e-6)


def test_a_mask_that_is_no_object_says_so() -> None:
    axes = np.eye(3, dtype=np.float32)
    words = EmbeddedVocabulary(axes[:2], axes[:2])
    weights = np.full(2, 0.3, np.float32)
    classifier = Classifier(make_facts(mask_logit_scale=100.0), axes[2], words, np.arange(2), weights)
    result = classify(MaskEmbeddings(axes[2:], axes[:1], None), classifier)
    assert result.probabilities[0].argmax() == 2
    assert result.probabilities[0, 2] > 0.999


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_softmax_is_stable(values: list[float]) -> None:
    logits = np.array([values], np.float32)
    assert softmax(logits).sum() == pytest.approx(1, abs=1e-5)
    assert np.isfinite(log_softmax(logits)).all()
    np.testing.assert_allclose(np.exp(log_softmax(logits)), softmax(logits), atol=1e-6)
