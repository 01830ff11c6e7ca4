"""Masks and words to class probabilities: two classifiers and their geometric mean (paper section 3.3, eq. 6).

The mask classifier compares a mask's embedding from diffusion features with words, CLIP's compares the mask's CLIP
embedding with prompts. Both take the best synonym of each class. The label variant has a learned "no object" embedding
as one more word of the mask classifier, the caption variant separate object logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from odise_rt.errors import BackendError
from odise_rt.products import product
from odise_rt.specs import ModelFacts
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise

BLOCK_BYTES = 16 << 20
"""Bound on one temporary of :func:`name_queries`: a hundred masks and ten thousand words stay in one block."""
EPSILON = np.float32(1e-8)
"""Added to every probability before the logarithm, so that none is log 0."""


@dataclass(frozen=True, eq=False)
class MaskEmbeddings:
    """What the graphs say of the masks of one image, unnormalised float32."""

    mask: np.ndarray
    """(Q, P): from diffusion features, for the mask classifier."""
    clip: np.ndarray
    """(Q, D): CLIP's own, for the classifier by CLIP."""
    object_logits: np.ndarray | None
    """(Q, 2): object and no object. ``None`` for the label variant."""

    def check(self) -> None:
        """Check that all of them are finite.

        Raises:
            BackendError: some are NaN or infinite.
        """
        broken = ~(np.isfinite(self.mask).all(axis=1) & np.isfinite(self.clip).all(axis=1))
        if self.object_logits is not None:
            broken |= ~np.isfinite(self.object_logits).all(axis=1)
        if broken.any():
            raise not_numbers(int(broken.sum()), len(broken))


@dataclass(frozen=True, eq=False)
class Classifier:
    """K classes of L words in all, and the weights by which the masks of a model are compared with them."""

    facts: ModelFacts
    """Scales and variant of the model."""
    no_object_embedding: np.ndarray | None
    """float32 (P,), unnormalised. ``None`` for the caption variant."""
    words: EmbeddedVocabulary
    """Text embeddings of the L words."""
    first_word: np.ndarray
    """int (K,): position of each class's first word among the L, see :attr:`Vocabulary.first_word`."""
    clip_weight: np.ndarray
    """float32 (K,): CLIP's weight for each class, see :func:`clip_weights`."""


@dataclass(frozen=True, eq=False)
class Classification:
    """Class probabilities of the masks of one image."""

    probabilities: np.ndarray
    """float32 (Q, K + 1); the last column is "no object". Rows sum to 1."""
    mask_log_probabilities: np.ndarray
    """float32 (Q, K): the mask classifier alone, over the K classes."""
    clip_log_probabilities: np.ndarray
    """float32 (Q, K): CLIP alone, over the K classes."""


@dataclass(frozen=True, eq=False)
class MaskNames:
    """What :func:`name_queries` finds for the Q masks of one image."""

    probabilities: np.ndarray
    """float32: (Q, K + 1), the last column "no object"; with ``unknown`` (Q, K + 2), "unknown" before it. (Q, 0) where
    masks were named on a GPU and no output needs the probabilities."""
    classes: np.ndarray
    """int64 (Q, N), N <= K: the best classes of each mask, best first. Zeros where "no object" is likeliest and not all
    masks are ranked."""
    scores: np.ndarray
    """float32 (Q, N): probabilities of these classes by both classifiers together."""
    mask_scores: np.ndarray
    """float32 (Q, N): their probabilities by the mask classifier alone, among the K classes."""
    clip_scores: np.ndarray
    """float32 (Q, N): their probabilities by CLIP alone, among the K classes."""


def not_numbers(broken: int, masks: int) -> BackendError:
    """The error for embeddings that are NaN or infinite."""
    return BackendError(
        f"the network gave {broken} of {masks} masks embeddings that are NaN or infinite: half precision may overflow "
        "on this image; use a bundle or engines in fp32 (python -m export.build_engines --precision fp32)"
    )


def class_logits(embedding: np.ndarray, text: np.ndarray, first_word: np.ndarray, scale: float) -> np.ndarray:
    """Scaled cosine of each mask with the best synonym of each class.

    Args:
        embedding: (Q, C), L2-normalised.
        text: (L, C), L2-normalised.
        first_word: int (K,), the position of each class's first word among the L.
        scale: factor on cosines.

    Returns:
        float32 (Q, K).
    """
    cosines = product(embedding, text.T)
    cosines *= np.float32(scale)
    if len(first_word) == len(text):
        return cosines
    return np.maximum.reduceat(cosines, first_word, axis=1)


def clip_weights(seen: np.ndarray, weight_seen: float, weight_unseen: float) -> np.ndarray:
    """CLIP's weight for each class: float32 (K,) for bool (K,)."""
    weights: np.ndarray = np.where(seen, np.float32(weight_seen), np.float32(weight_unseen)).astype(np.float32)
    return weights


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, stable for any finite logits."""
    shifted: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, stable for any finite logits."""
    exponentials: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    return exponentials


def classify(masks: MaskEmbeddings, classifier: Classifier) -> Classification:
    """Probabilities of K classes for Q masks from the graphs."""
    facts, words, first_word = classifier.facts, classifier.words, classifier.first_word
    mask_embedding = normalise(masks.mask)
    mask_logits = class_logits(mask_embedding, words.mask_text, first_word, facts.mask_logit_scale)
    clip_logits = class_logits(normalise(masks.clip), words.clip_text, first_word, facts.clip_logit_scale)
    no_object = _no_object_probability(mask_embedding, mask_logits, masks.object_logits, classifier)

    mask_log, clip_log = log_softmax(mask_logits), log_softmax(clip_logits)
    # log(p^(1-w) q^w) with w chosen by class; log_softmax keeps it finite where p or q underflows.
    ensemble = (1 - classifier.clip_weight) * mask_log + classifier.clip_weight * clip_log

    probabilities = np.empty((len(mask_logits), mask_logits.shape[1] + 1), np.float32)
    np.multiply(softmax(ensemble), 1 - no_object, out=probabilities[:, :-1])
    probabilities[:, -1:] = no_object
    # The published model takes log(p + 1e-8) here and softmax again in each step below: this is their product.
    probabilities += EPSILON
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Classification(probabilities, mask_log, clip_log)


def name_queries(
    masks: MaskEmbeddings,
    classifier: Classifier,
    *,
    best: int = 5,
    unknown: float | None = None,
    rank_all: bool = False,
) -> MaskNames:
    """:func:`classify` and the best names of each mask, some masks at a time.

    Beside the probabilities themselves, no array exceeds ``BLOCK_BYTES`` (or one row), however many words there are.

    Args:
        masks, classifier: as for :func:`classify`.
        best: names to rank for each mask; fewer if there are fewer classes.
        unknown: a mask whose best word is below this probability gives that probability to the class "unknown"
            instead, and none to the words. "No object" keeps its own.
        rank_all: rank the names of masks that are likeliest no object, too; they can still be instances.
    """
    queries, count = len(masks.mask), len(classifier.first_word)
    best = min(best, count)
    probabilities = np.zeros((queries, count + (1 if unknown is None else 2)), np.float32)
    classes = np.zeros((queries, best), np.int64)
    scores, mask_scores, clip_scores = (np.zeros((queries, best), np.float32) for _ in range(3))
    step = max(1, BLOCK_BYTES // (4 * len(classifier.words.mask_text)))
    for start in range(0, queries, step):
        block = slice(start, min(start + step, queries))
        objects = None if masks.object_logits is None else masks.object_logits[block]
        found = classify(MaskEmbeddings(masks.mask[block], masks.clip[block], objects), classifier)
        probabilities[block, :count] = found.probabilities[:, :-1]
        probabilities[block, -1] = found.probabilities[:, -1]
        if best:
            for row in np.flatnonzero(rank_all | (found.probabilities.argmax(axis=1) != count)):
                ranked = _best(found.probabilities[row, :-1], best)
                classes[start + row] = ranked
                scores[start + row] = found.probabilities[row, ranked]
                mask_scores[start + row] = np.exp(found.mask_log_probabilities[row, ranked])
                clip_scores[start + row] = np.exp(found.clip_log_probabilities[row, ranked])
        del found  # before the next block's are made
    if unknown is not None:
        likeliest = probabilities[:, :count].max(axis=1)
        unnamed = likeliest < unknown
        probabilities[unnamed, :count] = 0
        probabilities[unnamed, count] = likeliest[unnamed]
    return MaskNames(probabilities, classes, scores, mask_scores, clip_scores)


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of the largest values of a row, largest first; of equal ones the first, as argmax has it."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    found = np.flatnonzero(values >= least)
    ranked: np.ndarray = found[np.argsort(-values[found], kind="stable")[:count]]
    return ranked


def _no_object_probability(
    mask_embedding: np.ndarray,
    mask_logits: np.ndarray,
    object_logits: np.ndarray | None,
    classifier: Classifier,
) -> np.ndarray:
    """Probability (Q, 1) that a mask is no object."""
    if classifier.facts.variant == "caption":
        assert object_logits is not None, "the caption variant's mask_decoder has object_logits by its spec"
        return softmax(object_logits)[:, 1:2]
    embedding = classifier.no_object_embedding
    assert embedding is not None, "a label bundle's constants hold no_object_embedding"
    logit: np.ndarray = mask_embedding @ normalise(embedding[None]).T
    logit *= np.float32(classifier.facts.mask_logit_scale)
    return softmax(np.concatenate([mask_logits, logit], axis=1))[:, -1:]
