"""What the CUDA kernels must compute, in numpy and as plainly as it can be said; float64 unless told otherwise.

The definitions are the product's: tests hold :func:`mask_pool` and :func:`deformable_attention` to the modules in
``training/models``, :func:`panoptic_merge` and :func:`choose_segments` to ``odise_rt/postprocessing.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from odise_rt.specs import MASK_STRIDE


def mask_pool(
    mask_logits: np.ndarray, features: np.ndarray, dtype: DTypeLike = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the features under every mask, and the mask's area.

    Args:
        mask_logits: floating (B, Q, H, W); a pixel is inside where the logit is above zero (probability above one
            half). NaN is outside.
        features: floating (B, C, H, W), finite.
        dtype: of the arithmetic.

    Returns:
        ``dtype`` (B, Q, C), zeros for an empty mask; and int32 (B, Q), pixels inside.
    """
    inside = (mask_logits > 0).reshape(*mask_logits.shape[:2], -1)
    flat = features.astype(dtype).reshape(*features.shape[:2], -1)
    areas = inside.sum(axis=2, dtype=np.int64)
    sums = inside.astype(dtype) @ flat.transpose(0, 2, 1)  # (B, Q, C)
    return sums / np.maximum(areas, 1)[:, :, None].astype(dtype), areas.astype(np.int32)


def bilinear_matrix(target: int, source: int) -> np.ndarray:
    """Bilinear resize along one axis as a float64 (target, source) matrix; align_corners=False, no antialias."""
    matrix = np.zeros((target, source))
    for row in range(target):
        position = max((row + 0.5) * (source / target) - 0.5, 0.0)
        low = min(int(position), source - 1)
        high = min(low + 1, source - 1)
        matrix[row, low] += 1 - (position - low)
        matrix[row, high] += position - low
    return matrix


def resize_matrix(cells: int, test: int, original: int) -> np.ndarray:
    """Mask cells to the image's pixels along one axis: enlarge to the canvas, crop to the size in the network, resize.

    Args:
        cells: length of the mask logits.
        test: length of the unpadded image in the network, at most ``cells * MASK_STRIDE``.
        original: length of the image as given.

    Returns:
        float64 (original, cells).
    """
    canvas = bilinear_matrix(cells * MASK_STRIDE, cells)[:test]
    return canvas if original == test else bilinear_matrix(original, test) @ canvas


@dataclass(frozen=True)
class MergedPixels:
    """Which mask owns each pixel, and the areas on which the overlap test rests."""

    owner: np.ndarray
    """int16 (h, w): the mask with the largest score times probability where its own probability is at least one half,
    else -1."""
    areas: np.ndarray
    """int32 (3, Q): pixels with probability at least one half, pixels with the largest value, pixels of both."""


def panoptic_merge(
    mask_logits: np.ndarray, scores: np.ndarray, network_size: tuple[int, int], original_size: tuple[int, int]
) -> MergedPixels:
    """Give every pixel to the mask with the largest score times mask probability; of equal ones, to the first.

    Args:
        mask_logits: floating (Q, mh, mw); where one is NaN, its mask is not.
        scores: floating (Q,), in (0, 1]; a mask with a score of zero or less, or NaN, takes no part.
        network_size: height and width of the unpadded image in the network.
        original_size: height and width of the result.
    """
    owner = np.full(original_size, -1, np.int16)
    areas = np.zeros((3, len(scores)), np.int64)
    taking_part = np.flatnonzero(np.asarray(scores) > 0)
    if not len(taking_part):
        return MergedPixels(owner, areas.astype(np.int32))
    for rows, logits in _resized_rows(mask_logits, network_size, original_size):
        values = _values(logits, scores, taking_part)
        best = taking_part[values.argmax(axis=0)]
        inside = np.take_along_axis(logits, best[None], axis=0)[0] >= 0
        owner[rows] = np.where(inside, best, -1)
        areas[0, taking_part] += (logits[taking_part] >= 0).sum(axis=(1, 2))
        areas[1] += np.bincount(best.ravel(), minlength=len(scores))
        areas[2] += np.bincount(best[inside], minlength=len(scores))
    return MergedPixels(owner, areas.astype(np.int32))


def choose_segments(
    labels: np.ndarray, scores: np.ndarray, areas: np.ndarray, things: np.ndarray, overlap_threshold: float
) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    """Which masks become segments after the merge; of stuff, one segment for each class.

    Args:
        labels: int (Q,), the class of each mask, below zero for none.
        scores: floating (Q,); a mask with a score of zero takes no part.
        areas: int (3, Q), of :func:`panoptic_merge`.
        things: (K,), not zero for things.
        overlap_threshold: least share of a mask's own pixels that it must have won.

    Returns:
        int32 (Q,), the id of each mask's segment counted from 1, or 0; and query, class and score of each segment, of
        joined ones those of the mask with the best score.
    """
    ids = np.zeros(len(labels), np.int32)
    chosen: list[tuple[int, int, float]] = []
    for query, (label, score) in enumerate(zip(labels, scores, strict=True)):
        mask, owned, kept = (int(area) for area in areas[:, query])
        if label < 0 or not score > 0 or min(mask, owned, kept) <= 0 or owned / mask < overlap_threshold:
            continue
        same = [index for index, (_, other, _) in enumerate(chosen) if other == label and not things[label]]
        if not same:
            chosen.append((query, label, score))
        elif score > chosen[same[0]][2]:
            chosen[same[0]] = (query, label, score)
        ids[query] = (same[0] if same else len(chosen) - 1) + 1
    return ids, chosen


def merge_errors(
    merged: MergedPixels,
    mask_logits: np.ndarray,
    scores: np.ndarray,
    network_size: tuple[int, int],
    original_size: tuple[int, int],
    tolerance: float = 1e-5,
) -> list[str]:
    """What is wrong with a merge that was computed in float32.

    A pixel where the best two values, or a logit and zero, are closer than float32 can tell may go either way; every
    other pixel must be right, and the areas must be those of the pixels, give or take the undecided ones.

    Args:
        merged: what is judged.
        mask_logits: as for :func:`panoptic_merge`, like the next three.
        scores: of the masks.
        network_size: height and width in the network.
        original_size: height and width of the result.
        tolerance: relative for values, and for logits in units of the largest one nearby (at least 1).

    Returns:
        One sentence for each kind of error; empty if there is none.
    """
    problems = []
    taking_part = np.flatnonzero(np.asarray(scores) > 0)
    wrong = undecided = 0
    low, high = np.zeros((2, 3, len(scores)), np.int64)
    scale = max(1.0, float(np.abs(mask_logits.astype(np.float64)).max(initial=0.0)))
    for rows, logits in _resized_rows(mask_logits, network_size, original_size):
        claimed = merged.owner[rows].astype(np.int64)
        if not len(taking_part):
            wrong += int((claimed != -1).sum())
            continue
        values = _values(logits, scores, taking_part)
        near = values >= values.max(axis=0) * (1 - tolerance) - 1e-30  # (taking part, rows, w): could be the owner
        logits = logits[taking_part]
        surely, maybe = logits >= scale * tolerance, logits >= -scale * tolerance
        alone = near & (near.sum(axis=0) == 1)
        undecided += int((near.sum(axis=0) > 1).sum() + (near & (surely != maybe)).any(axis=0).sum())
        position = np.searchsorted(taking_part, claimed).clip(0, len(taking_part) - 1)
        picked = np.take_along_axis(near & maybe, position[None], axis=0)[0] & (taking_part[position] == claimed)
        wrong += int((~np.where(claimed >= 0, picked, (near & ~surely).any(axis=0))).sum())
        for bounds, inside, owned in ((low, surely, alone), (high, maybe, near)):
            bounds[0, taking_part] += inside.sum(axis=(1, 2))
            bounds[1, taking_part] += owned.sum(axis=(1, 2))
            bounds[2, taking_part] += (owned & inside).sum(axis=(1, 2))
    if wrong:
        problems.append(f"{wrong} pixels have a wrong owner ({undecided} are undecided in float32)")
    for name, area, least, most in zip(("mask", "owned", "kept"), merged.areas, low, high, strict=True):
        bad = (area < least) | (area > most)
        if bad.any():
            q = int(np.flatnonzero(bad)[0])
            problems.append(
                f"{int(bad.sum())} {name} areas are wrong; mask {q}: {area[q]}, expected {least[q]} to {most[q]}"
            )
    kept = np.bincount(merged.owner[merged.owner >= 0].astype(np.int64), minlength=len(scores))
    if not np.array_equal(kept, merged.areas[2]):
        problems.append("the kept areas are not those of the owner map")
    return problems


def _resized_rows(
    mask_logits: np.ndarray, network_size: tuple[int, int], original_size: tuple[int, int]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Bands of rows of the resized masks in float64, so that all masks at full size never exist at once."""
    down = resize_matrix(mask_logits.shape[1], network_size[0], original_size[0])
    across = resize_matrix(mask_logits.shape[2], network_size[1], original_size[1])
    wide = mask_logits.astype(np.float64) @ across.T  # (Q, mh, w)
    step = max(1, (1 << 22) // (len(wide) * wide.shape[2]))
    for start in range(0, len(down), step):
        rows = slice(start, min(start + step, len(down)))
        logits = np.matmul(down[rows], wide)
        yield rows, np.where(np.isnan(logits), -np.inf, logits)


def _values(logits: np.ndarray, scores: np.ndarray, taking_part: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-logits[taking_part]))
    values: np.ndarray = np.asarray(scores, np.float64)[taking_part, None, None] * probability
    return values


def deformable_attention(
    value: np.ndarray,
    shapes: Sequence[tuple[int, int]],
    references: np.ndarray,
    offsets: np.ndarray,
    weight_logits: np.ndarray,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """Multi-scale deformable attention without its linear layers.

    Args:
        value: floating (B, N, heads, C), the levels flattened and concatenated.
        shapes: height and width of each level; their products sum to N.
        references: floating (1 or B, M, 2), x then y, in [0, 1] from edge to edge.
        offsets: floating (B, M, heads, levels, points, 2), x then y, in pixels of the level.
        weight_logits: floating (B, M, heads, levels * points), before the softmax over the last axis.
        dtype: of the arithmetic.

    Returns:
        ``dtype`` (B, M, heads, C): bilinear samples, zeros outside the level, weighted.
    """
    batch, queries, heads, levels, points, _ = offsets.shape
    logits = weight_logits.astype(dtype)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).reshape(batch, queries, heads, levels, points)
    out = np.zeros((batch, queries, heads, value.shape[3]), dtype)
    b = np.arange(batch)[:, None, None, None]
    h = np.arange(heads)[None, None, :, None]
    start = 0
    for level, (height, width) in enumerate(shapes):
        image = value[:, start : start + height * width].astype(dtype)
        start += height * width
        x = references[:, :, None, None, 0].astype(dtype) * width + offsets[:, :, :, level, :, 0].astype(dtype) - 0.5
        y = references[:, :, None, None, 1].astype(dtype) * height + offsets[:, :, :, level, :, 1].astype(dtype) - 0.5
        for row in (np.floor(y), np.floor(y) + 1):
            for column in (np.floor(x), np.floor(x) + 1):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                share = np.where(inside, (1 - np.abs(y - row)) * (1 - np.abs(x - column)), 0)
                pixel = np.where(inside, row * width + column, 0).astype(np.int64)  # (B, M, heads, points)
                out += (image[b, pixel, h] * (share * weights[:, :, :, level])[..., None]).sum(axis=3)
    return out
