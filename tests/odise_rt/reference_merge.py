"""Slow and obvious versions of the merges, straight from their description: what `postprocessing` must agree with."""

from __future__ import annotations

import numpy as np


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, align_corners=False, no antialias, one pixel at a time; float64."""

    def axis(target: int, source: int) -> list[tuple[int, int, float]]:
        taps = []
        for i in range(target):
            position = max((i + 0.5) * source / target - 0.5, 0)
            low = min(int(position), source - 1)
            taps.append((low, min(low + 1, source - 1), position - low))
        return taps

    rows = np.stack([array[a] * (1 - f) + array[b] * f for a, b, f in axis(height, array.shape[0])])
    return np.stack([rows[:, a] * (1 - f) + rows[:, b] * f for a, b, f in axis(width, array.shape[1])], axis=1)


def enlarge(logits: np.ndarray, network_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Fourfold, crop, resize to the image: (Q, h, w), float64."""
    masks = []
    for mask in logits.astype(np.float64):
        canvas = resize(mask, 4 * mask.shape[0], 4 * mask.shape[1])
        masks.append(resize(canvas[: network_size[0], : network_size[1]], *size))
    return np.stack(masks)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def panoptic(
    masks: np.ndarray, probabilities: np.ndarray, isthing: np.ndarray, threshold: float, overlap: float
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """From enlarged mask logits (Q, h, w): the segment map, and (id, class) of each segment."""
    labels, scores = probabilities.argmax(axis=1), probabilities.max(axis=1)
    no_object = probabilities.shape[1] - 1
    kept = [q for q in range(len(labels)) if labels[q] != no_object and scores[q] > threshold]
    segment_map = np.zeros(masks.shape[1:], int)
    segments: list[tuple[int, int]] = []
    if not kept:
        return segment_map, segments
    mask = sigmoid(masks[kept])
    owner = (scores[kept, None, None] * mask).argmax(axis=0)
    stuff: dict[int, int] = {}
    for position, query in enumerate(kept):
        label = int(labels[query])
        owned, confident = owner == position, mask[position] >= 0.5
        final = owned & confident
        if not owned.sum() or not confident.sum() or not final.sum() or owned.sum() / confident.sum() < overlap:
            continue
        if not isthing[label] and label in stuff:
            segment_map[final] = stuff[label]
            continue
        identifier = len(segments) + 1
        segments.append((identifier, label))
        segment_map[final] = identifier
        if not isthing[label]:
            stuff[label] = identifier
    return segment_map, segments


def semantic(masks: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return np.einsum("qk,qhw->khw", probabilities[:, :-1], sigmoid(masks))


def instances(
    masks: np.ndarray, probabilities: np.ndarray, isthing: np.ndarray, count: int
) -> list[tuple[float, int, np.ndarray]]:
    """Score, class and binary mask of the best pairs, best first."""
    pairs = [(probabilities[q, k], q, k) for q in range(len(masks)) for k in range(probabilities.shape[1] - 1)]
    found = []
    for probability, q, k in sorted(pairs, key=lambda p: -p[0])[:count]:
        if isthing[k]:
            mask = masks[q] > 0
            mean = (sigmoid(masks[q]) * mask).sum() / (mask.sum() + 1e-6)
            found.append((float(probability * mean), k, mask))
    return sorted(found, key=lambda f: -f[0])
