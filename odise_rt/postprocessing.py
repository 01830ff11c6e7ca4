"""Mask logits and class probabilities to panoptic, semantic and instance results at the image's own size.

As published (odise.md section 6): mask logits are enlarged fourfold to the padded canvas, cropped to the image at test
size and resized to the original image, all bilinear; the sigmoid follows. These three steps are linear and separable,
so :class:`MaskResizer` does them as one product with two matrices.

The full Q x H x W volume is never made: work goes by bands of rows, and in the panoptic merge a mask is only computed
where it can matter. Bilinear interpolation never leaves the range of its inputs, so the extremes of blocks of mask
logits bound a mask's score there; where the bound is below what another mask surely has, the mask cannot win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from odise_rt.specs import MASK_STRIDE

BAND_PIXELS = 1 << 18
"""Pixels of a mask at a time: 1 MB of float32 stays in a core's cache."""
BLOCK = 8
"""Cells of the mask logits that share one bound."""
MANY_CLASSES = 4096
"""Above so many classes, the semantic map leaves out those that cannot win."""
BEST_OF_A_MASK = 16
"""Classes that are kept for each mask then."""
_SAFETY = np.float32(1e-4)
"""Slack on the bounds for rounding, in units of score; orders above what float32 can lose here."""


@dataclass(frozen=True)
class MergedSegment:
    """One segment of the panoptic merge, before it gets a name."""

    id: int
    """Value in the segment map, counted from 1."""
    class_index: int
    score: float
    """Probability of the class; of joined stuff masks, the best one's."""
    area: int
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; right and bottom are exclusive."""
    isthing: bool
    query: int
    """The mask that it comes from; of joined stuff masks, the one with the best score."""


@dataclass(frozen=True)
class InstanceMask:
    """One instance, before it gets a name."""

    class_index: int
    score: float
    """Class probability times the mean mask probability inside the mask."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; right and bottom are exclusive. All zero for an empty mask."""
    area: int
    query: int
    bits: np.ndarray
    """uint8, the mask inside its box, row by row, eight pixels a byte (``np.packbits``)."""


def bilinear_taps(target: int, source: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resize along one axis, ``align_corners=False``, no antialias.

    Returns:
        int64 (target, 2) source positions and their float64 (target, 2) weights, which sum to 1.
    """
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = position.astype(np.int64)
    fraction = position - low
    return np.stack([low, np.minimum(low + 1, source - 1)], axis=1), np.stack([1 - fraction, fraction], axis=1)


class MaskResizer:
    """Brings mask logits to the original image's pixels: fourfold enlargement, crop and resize as one step."""

    def __init__(self, cells: tuple[int, int], network_size: tuple[int, int], original_size: tuple[int, int]) -> None:
        """Prepare the weights of both axes.

        Args:
            cells: height and width of the mask logits.
            network_size: height and width of the unpadded image in the network.
            original_size: height and width of the result.
        """
        self.cells = cells
        self.network_size = network_size
        self.original_size = original_size
        self._vertical, self._horizontal = (
            _Axis(*lengths) for lengths in zip(cells, network_size, original_size, strict=True)
        )

    def __call__(self, logits: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """Part of one or more enlarged masks.

        Args:
            logits: float32 (..., mh, mw).
            rows: pixel rows of the result, with start and stop.
            columns: pixel columns, likewise.

        Returns:
            float32 (..., rows, columns), owned by the caller.
        """
        cells = self._vertical.cells(rows)
        across = self._horizontal.interpolate(logits[..., cells, :], columns, axis=-1)
        return self._vertical.interpolate(across, rows, axis=-2, origin=cells.start)

    def bands(self) -> Iterator[slice]:
        """Row bands of the result, of about ``BAND_PIXELS`` each."""
        height, width = self.original_size
        step = max(1, BAND_PIXELS // width)
        for start in range(0, height, step):
            yield slice(start, min(start + step, height))

    def pixels_of_blocks(self, axis: int, first: int, last: int) -> slice:
        """Pixels along an axis that blocks ``first`` to ``last`` (inclusive) of mask logits can influence."""
        return self._axis(axis).influenced(first * BLOCK, min((last + 1) * BLOCK, self.cells[axis]))

    def blocks_of_pixels(self, axis: int, pixels: slice) -> slice:
        """Blocks along an axis whose cells the pixels are interpolated from."""
        cells = self._axis(axis).cells(pixels)
        return slice(cells.start // BLOCK, (cells.stop - 1) // BLOCK + 1)

    def _axis(self, axis: int) -> _Axis:
        return self._horizontal if axis else self._vertical


class _Axis:
    """Fourfold enlargement, crop and resize along one axis, as a few taps a pixel.

    Taps rather than matrix products: the matrices are nearly empty, and many small products through a threaded BLAS
    are slowest just where it hurts, on a busy machine.
    """

    def __init__(self, cells: int, test: int, original: int) -> None:
        positions, weights = bilinear_taps(cells * MASK_STRIDE, cells)  # of the canvas; below cropped to the image
        if original != test:
            outer, outer_weights = bilinear_taps(original, test)
            positions = positions[outer].reshape(original, 4)
            weights = (weights[outer] * outer_weights[:, :, None]).reshape(original, 4)
        else:
            positions, weights = positions[:test], weights[:test]
        # Positions repeat and are adjacent: gather them into runs of the same length for every pixel.
        taps = int((positions.max(axis=1) - positions.min(axis=1)).max()) + 1
        self._first = np.minimum(positions.min(axis=1), cells - taps)
        self._weights = [
            np.where(positions == self._first[:, None] + t, weights, 0).sum(axis=1).astype(np.float32)
            for t in range(taps)
        ]

    def cells(self, pixels: slice) -> slice:
        """The cells that some pixels read."""
        return slice(int(self._first[pixels.start]), int(self._first[pixels.stop - 1]) + len(self._weights))

    def influenced(self, start: int, stop: int) -> slice:
        """Pixels that may read any of the cells ``start`` to ``stop``; both ends grow with the pixel."""
        after = np.searchsorted(self._first + len(self._weights), start, side="right")
        return slice(int(after), int(np.searchsorted(self._first, stop, side="left")))

    def interpolate(self, values: np.ndarray, pixels: slice, axis: int, origin: int = 0) -> np.ndarray:
        """Pixels of an array of cells along ``axis`` (-1 or -2); ``origin`` is the cell at its start."""
        first = self._first[pixels] - origin
        shape = (1, -1) if axis == -1 else (-1, 1)
        total: np.ndarray = np.take(values, first, axis=axis)
        total *= self._weights[0][pixels].reshape(shape)
        for offset, weights in enumerate(self._weights[1:], 1):
            term = np.take(values, first + offset, axis=axis)
            term *= weights[pixels].reshape(shape)
            total += term
        return total


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function, computed in place: the argument is overwritten and returned."""
    np.negative(logits, out=logits)
    # exp overflows to inf from a logit of -88, whose sigmoid is then exactly the 0 that float32 would round to anyway.
    with np.errstate(over="ignore"):
        np.exp(logits, out=logits)
    logits += 1
    np.reciprocal(logits, out=logits)
    return logits


# ---- panoptic --------------------------------------------------------------------------------------------------------


def merge_panoptic(
    mask_logits: np.ndarray,
    probabilities: np.ndarray,
    isthing: np.ndarray,
    resizer: MaskResizer,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[np.ndarray, list[MergedSegment]]:
    """Give every pixel to one mask or none.

    A mask takes part when its best class is not "no object" and scores above ``object_mask_threshold``. A pixel belongs
    to the mask with the largest score times mask probability. A mask becomes a segment of those of its pixels where its
    probability is at least one half, if it won at least ``overlap_threshold`` of the pixels where that is so. Stuff
    segments of one class are joined.

    Args:
        mask_logits: float32 (Q, mh, mw).
        probabilities: float32 (Q, K + 1), the last column "no object".
        isthing: bool (K,).
        resizer: for these mask logits and the image's size.
        object_mask_threshold: in [0, 1].
        overlap_threshold: in [0, 1].

    Returns:
        int32 (h, w) segment map, 0 where no segment is, and the segments in order of their ids.
    """
    labels = probabilities.argmax(axis=1)
    scores = probabilities[np.arange(len(labels)), labels]
    kept = np.flatnonzero((labels != len(isthing)) & (scores > object_mask_threshold))
    segment_map = np.zeros(resizer.original_size, np.int32)
    if not len(kept):
        return segment_map, []
    owner, mask_areas, owned_areas, final_areas = _assign_pixels(mask_logits, scores, kept, resizer)

    ids = np.zeros(len(kept) + 1, np.int32)  # segment id of each owner; the last entry is for "no mask"
    found: list[tuple[int, int]] = []  # query and class of each segment, in order of ids
    stuff_ids: dict[int, int] = {}
    best: dict[int, float] = {}
    for position, query in enumerate(kept):
        mask_area, owned, final = mask_areas[position], owned_areas[position], final_areas[position]
        if not (mask_area > 0 and owned > 0 and final > 0) or owned / mask_area < overlap_threshold:
            continue
        label = int(labels[query])
        identifier = stuff_ids.get(label)
        if identifier is None:
            found.append((int(query), label))
            identifier = len(found)
            if not isthing[label]:
                stuff_ids[label] = identifier
        ids[position] = identifier
        score = float(scores[query])
        if score > best.setdefault(identifier, score):
            best[identifier] = score
            found[identifier - 1] = (int(query), label)
    np.take(ids, owner, out=segment_map, mode="wrap")  # -1, no mask, wraps to the last entry
    boxes, areas = boxes_and_areas(segment_map, len(found))
    segments = [
        MergedSegment(i, label, best[i], areas[i - 1], boxes[i - 1], bool(isthing[label]), query)
        for i, (query, label) in enumerate(found, 1)
    ]
    return segment_map, segments


def _assign_pixels(
    mask_logits: np.ndarray, scores: np.ndarray, kept: np.ndarray, resizer: MaskResizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which kept mask owns each pixel, and the areas on which the overlap test rests.

    Returns:
        int16 (h, w) position in ``kept`` of the owner where the owner's probability is at least one half, else -1; then
        for each kept mask the pixels with probability at least one half, the pixels owned, and the pixels of both.
    """
    height, width = resizer.original_size
    bounds = [_block_extremes(mask_logits[q]) for q in kept]
    high = np.stack([b[0] for b in bounds])  # (kept, blocks y, blocks x)
    low = np.stack([b[1] for b in bounds])
    score = scores[kept].astype(np.float32)
    upper = score[:, None, None] * sigmoid(high.copy())
    surely = np.fmax.reduce(score[:, None, None] * sigmoid(low), axis=0, initial=0)  # where NaN is, nothing is sure
    # A mask matters in a block where it may win, or where its own area (probability at least one half) may lie.
    matters = (upper + _SAFETY >= surely) | (high >= -_SAFETY)

    owner = np.full((height, width), -1, np.int16)
    mask_areas, owned, final = (np.zeros(len(kept), np.int64) for _ in range(3))
    for band in resizer.bands():
        best = np.full((band.stop - band.start, width), -1, np.float32)
        band_owner = owner[band]
        inside = np.zeros(best.shape, bool)
        for position, query in enumerate(kept):
            region = _region(matters[position], resizer, band)
            if region is None:
                continue
            rows, columns = region
            value = resizer(mask_logits[query], rows, columns)
            own = value >= 0
            mask_areas[position] += np.count_nonzero(own)
            sigmoid(value)
            value *= score[position]
            local = (slice(rows.start - band.start, rows.stop - band.start), columns)
            # Strictly greater: of equal masks the first one keeps the pixel, as argmax has it.
            wins = value > best[local]
            np.copyto(best[local], value, where=wins)
            np.copyto(band_owner[local], np.int16(position), where=wins)
            np.copyto(inside[local], own, where=wins)
        owned += np.bincount(band_owner.ravel().astype(np.int64) + 1, minlength=len(kept) + 1)[1:]
        band_owner[~inside] = -1
        final += np.bincount(band_owner.ravel().astype(np.int64) + 1, minlength=len(kept) + 1)[1:]
    return owner, mask_areas, owned, final


def _block_extremes(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest and smallest mask logit of every block and those before it, above and to the left.

    A pixel reads two blocks along an axis at most, so these are bounds for it at the last block that it reads.
    """
    high, low = logits, logits
    for axis in (0, 1):
        starts = np.arange(0, logits.shape[axis], BLOCK)
        high = np.fmax.reduceat(high, starts, axis=axis)  # passes over NaN
        low = np.minimum.reduceat(low, starts, axis=axis)
    for axis in (0, 1):
        high, low = _spread(high, np.fmax, axis), _spread(low, np.minimum, axis)
    return high, low


def _spread(blocks: np.ndarray, extreme: np.ufunc, axis: int) -> np.ndarray:
    """Each entry combined with the one before it along an axis."""
    spread: np.ndarray = blocks.copy()
    here, before = [slice(None)] * 2, [slice(None)] * 2
    here[axis], before[axis] = slice(1, None), slice(None, -1)
    extreme(blocks[tuple(here)], blocks[tuple(before)], out=spread[tuple(here)])
    return spread


def _region(matters: np.ndarray, resizer: MaskResizer, band: slice) -> tuple[slice, slice] | None:
    """The rectangle of pixels of a band in which a mask can matter."""
    block_rows = resizer.blocks_of_pixels(0, band)
    part = matters[block_rows]
    rows = np.flatnonzero(part.any(axis=1))
    if not len(rows):
        return None
    columns = np.flatnonzero(part.any(axis=0))
    top = resizer.pixels_of_blocks(0, block_rows.start + int(rows[0]), block_rows.start + int(rows[-1]))
    across = resizer.pixels_of_blocks(1, int(columns[0]), int(columns[-1]))
    down = slice(max(top.start, band.start), min(top.stop, band.stop))
    if down.start >= down.stop or across.start >= across.stop:
        return None
    return down, across


def boxes_and_areas(segment_map: np.ndarray, count: int) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Boxes (left, top, right, bottom; exclusive) and areas of the ids 1 to ``count`` of a segment map."""
    height, width = segment_map.shape
    flat = segment_map.ravel()
    is_start = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
    is_start[::width] = True
    starts = np.flatnonzero(is_start)  # of runs of one id within a row: far fewer than pixels
    lengths = np.diff(starts, append=flat.size)
    ids, rows = flat[starts], starts // width
    columns = starts - rows * width
    left, top = np.full(count + 1, width), np.full(count + 1, height)
    right, bottom = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    np.minimum.at(left, ids, columns)
    np.minimum.at(top, ids, rows)
    np.maximum.at(right, ids, columns + lengths)
    np.maximum.at(bottom, ids, rows + 1)
    areas = np.bincount(ids, weights=lengths, minlength=count + 1)
    boxes = [
        (int(left[i]), int(top[i]), int(right[i]), int(bottom[i])) if areas[i] else (0, 0, 0, 0)
        for i in range(1, count + 1)
    ]
    return boxes, [int(a) for a in areas[1 : count + 1]]


# ---- semantic --------------------------------------------------------------------------------------------------------


def semantic_map(mask_logits: np.ndarray, probabilities: np.ndarray, resizer: MaskResizer) -> np.ndarray:
    """The best class of every pixel: argmax over classes of the sum over masks of class times mask probability.

    Args:
        mask_logits: float32 (Q, mh, mw).
        probabilities: float32 (Q, K + 1).
        resizer: for these mask logits and the image's size.

    Returns:
        int32 (h, w), class indices.
    """
    height, width = resizer.original_size
    table = _ClassTable(probabilities[:, :-1])
    result = np.empty((height, width), np.int32)
    pixels = max(1, 8 * BAND_PIXELS // max(len(mask_logits), table.width))
    down, across = max(1, pixels // width), min(pixels, width)
    for top in range(0, height, down):
        for left in range(0, width, across):
            rows, columns = slice(top, min(top + down, height)), slice(left, min(left + across, width))
            masks = sigmoid(resizer(mask_logits, rows, columns))
            # Pixels first: argmax over the last axis is many times faster than over the first.
            best = table.best(masks.reshape(len(masks), -1).T)
            result[rows, columns] = best.reshape(masks.shape[1:])
    return result


class _ClassTable:
    """The best class for each of many pixels; of a large vocabulary only the classes that can win are computed.

    Classes that are among the best of no mask are left out. What they could reach at a pixel is bounded by the sum over
    masks of the mask probability times the largest probability left out; where no kept class exceeds that, all are
    computed. So the result is exact.
    """

    def __init__(self, probabilities: np.ndarray) -> None:
        """Prepare for float32 (Q, K)."""
        self._all = probabilities
        self._kept: np.ndarray | None = None
        classes = probabilities.shape[1]
        if classes > max(MANY_CLASSES, BEST_OF_A_MASK * len(probabilities)):
            best = np.argpartition(probabilities, classes - BEST_OF_A_MASK, axis=1)[:, -BEST_OF_A_MASK:]
            self._kept = np.unique(best)
            left_out = np.ones(classes, bool)
            left_out[self._kept] = False
            self._columns = np.ascontiguousarray(probabilities[:, self._kept])
            self._largest_left_out = probabilities[:, left_out].max(axis=1)
        self.width = classes if self._kept is None else len(self._kept)
        """Values that are computed for a pixel."""

    def best(self, masks: np.ndarray) -> np.ndarray:
        """Class indices, int (pixels,), for mask probabilities float32 (pixels, Q)."""
        if self._kept is None:
            found: np.ndarray = (masks @ self._all).argmax(axis=1)
            return found
        scores = masks @ self._columns
        winner = scores.argmax(axis=1)
        bound = masks @ self._largest_left_out
        classes: np.ndarray = self._kept[winner]
        unsure = np.flatnonzero(scores[np.arange(len(winner)), winner] <= bound * (1 + _SAFETY) + _SAFETY**2)
        step = max(1, 8 * BAND_PIXELS // self._all.shape[1])
        for start in range(0, len(unsure), step):
            some = unsure[start : start + step]
            classes[some] = (masks[some] @ self._all).argmax(axis=1)
        return classes


# ---- instance --------------------------------------------------------------------------------------------------------


def find_instances(
    mask_logits: np.ndarray, probabilities: np.ndarray, isthing: np.ndarray, resizer: MaskResizer, count: int
) -> list[InstanceMask]:
    """The best pairs of mask and thing class.

    The ``count`` best pairs over all classes are taken, then those of thing classes with a probability above 0 are
    kept. The mask is where the logit is positive; the score is the class probability times the mean mask probability
    there.

    Args:
        mask_logits: float32 (Q, mh, mw).
        probabilities: float32 (Q, K + 1).
        isthing: bool (K,).
        resizer: for these mask logits and the image's size.
        count: pairs taken, at least 1.

    Returns:
        The instances, best first.
    """
    queries, labels = _best_pairs(probabilities[:, :-1], count)
    pairs = probabilities[queries, labels]
    # A pair of probability 0 is a word that was taken from a mask which no word fits.
    things = isthing[labels] & (pairs > 0)
    pairs, queries, labels = pairs[things], queries[things], labels[things]
    masks = {int(q): _binary_mask(mask_logits[q], resizer) for q in np.unique(queries)}
    instances = []
    for pair, query, label in zip(pairs, queries, labels, strict=True):
        mean, box, area, bits = masks[int(query)]
        instances.append(InstanceMask(int(label), float(pair * mean), box, area, int(query), bits))
    return sorted(instances, key=lambda i: -i.score)


def _best_pairs(probabilities: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and classes of the ``count`` largest probabilities (Q, K), in no order."""
    classes = probabilities.shape[1]
    if classes <= max(MANY_CLASSES, count):
        flat = probabilities.ravel()
        count = min(count, flat.size)
        return np.divmod(np.argpartition(-flat, count - 1)[:count], classes)
    # The best pairs are among the best of each mask: no copy of the whole is made.
    columns = np.stack([np.argpartition(row, classes - count)[-count:] for row in probabilities])
    values = np.take_along_axis(probabilities, columns, axis=1).ravel()
    best = np.argpartition(-values, count - 1)[:count]
    return best // count, columns.ravel()[best]


def _binary_mask(logits: np.ndarray, resizer: MaskResizer) -> tuple[float, tuple[int, int, int, int], int, np.ndarray]:
    """Mean probability inside the mask, box, area and packed pixels of one mask."""
    high = _block_extremes(logits)[0]
    parts: list[tuple[int, int, np.ndarray]] = []
    area, total = 0, 0.0
    for band in resizer.bands():
        region = _region(high >= -_SAFETY, resizer, band)
        if region is None:
            continue
        rows, columns = region
        value = resizer(logits, rows, columns)
        mask = value > 0
        area += int(np.count_nonzero(mask))
        total += float(sigmoid(value).sum(where=mask, dtype=np.float64))
        parts.append((rows.start, columns.start, mask))
    if not area:
        return 0.0, (0, 0, 0, 0), 0, np.zeros(0, np.uint8)
    box = _box_of_parts(parts)
    left, top, right, bottom = box
    crop = np.zeros((bottom - top, right - left), bool)
    for y, x, mask in parts:
        y0, y1 = max(y, top), min(y + mask.shape[0], bottom)
        x0, x1 = max(x, left), min(x + mask.shape[1], right)
        if y0 < y1 and x0 < x1:
            crop[y0 - top : y1 - top, x0 - left : x1 - left] = mask[y0 - y : y1 - y, x0 - x : x1 - x]
    return total / (area + 1e-6), box, area, np.packbits(crop)


def _box_of_parts(parts: list[tuple[int, int, np.ndarray]]) -> tuple[int, int, int, int]:
    left, top, right, bottom = 1 << 62, 1 << 62, 0, 0
    for y, x, mask in parts:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            top, bottom = min(top, y + int(rows[0])), max(bottom, y + int(rows[-1]) + 1)
            left, right = min(left, x + int(columns[0])), max(right, x + int(columns[-1]) + 1)
    return left, top, right, bottom
