"""Masks as polygons, exactly: the outline runs along pixel edges, so filling it gives the mask back.

Corners are where the outline turns; they are found by array operations, and only they are walked. Pixels that touch at
a corner alone belong to different parts, and no outline passes a point twice. Coordinates are those of annotation
tools: the upper left corner of the image is (0, 0), its lower right one (width, height).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RIGHT, _DOWN, _LEFT, _UP = range(4)


@dataclass(frozen=True, eq=False)
class Polygon:
    """One connected part of a mask."""

    outline: np.ndarray
    """float64 (N, 2), x and y of the corners, clockwise as seen on a screen; the last one is not the first again."""
    holes: tuple[np.ndarray, ...] = ()
    """The same for each hole, counterclockwise."""

    def as_one_ring(self) -> np.ndarray:
        """Outline and holes as one ring, float64 (N, 2), for formats without holes.

        The ring runs to a corner of each hole, around it, and back on the same way. What is passed twice in opposite
        directions encloses nothing, so the ring fills the same pixels by the even-odd and by the winding rule.
        """
        ring = self.outline
        for hole in sorted(self.holes, key=lambda h: float(h[:, 0].min())):
            start = int(hole[:, 0].argmin())
            bridge = int(((ring - hole[start]) ** 2).sum(axis=1).argmin())
            around = np.concatenate([hole[start:], hole[: start + 1]])
            ring = np.concatenate([ring[: bridge + 1], around, ring[bridge:]])
        return ring


def polygons(mask: np.ndarray, tolerance: float = 0.0) -> list[Polygon]:
    """The connected parts of a mask, largest first.

    Args:
        mask: bool (h, w).
        tolerance: how far in pixels an outline may leave the pixels' edges to save corners; 0 keeps every corner.
            At 1 the steps of slanted lines are gone.
    """
    rings = _rings(np.asarray(mask, bool))
    outer = sorted((r for r in rings if r[0] > 0), key=lambda r: -r[0])
    boxes = np.array([(*ring.min(axis=0), *ring.max(axis=0)) for _, ring in outer]).reshape(-1, 4)
    holes: list[list[np.ndarray]] = [[] for _ in outer]
    for area, ring in rings:
        if area < 0:
            holes[_surrounding(ring, outer, boxes)].append(ring)
    if tolerance > 0:
        return [
            Polygon(_simplified(ring, tolerance), tuple(_simplified(h, tolerance) for h in inside))
            for (_, ring), inside in zip(outer, holes, strict=True)
        ]
    return [Polygon(ring, tuple(inside)) for (_, ring), inside in zip(outer, holes, strict=True)]


def _rings(mask: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """All outlines with their signed areas: positive around pixels of the mask, negative around holes."""
    padded = np.pad(mask, 1)
    # The four pixels around each point of the grid.
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    turns = ((nw ^ ne) | (sw ^ se)) & ((nw ^ sw) | (ne ^ se))
    ys, xs = np.nonzero(turns)  # by rows: the next corner to the right is the next one
    count = len(ys)
    if not count:
        return []
    nw, ne, sw, se = (corner[ys, xs] for corner in (nw, ne, sw, se))
    # The way out of a corner, the mask at the right hand. Where two pixels touch there are two: the way in decides.
    way = np.select([se & ~ne, sw & ~se, nw & ~sw], [_RIGHT, _DOWN, _LEFT], _UP)
    touching = (nw == se) & (ne == sw)
    by_columns = np.lexsort((ys, xs))
    place = np.empty(count, np.int64)
    place[by_columns] = np.arange(count)
    ends = np.arange(count)
    following = np.empty((4, count), np.int64)
    following[_RIGHT], following[_LEFT] = ends + 1, ends - 1
    following[_DOWN] = by_columns[np.minimum(place + 1, count - 1)]
    following[_UP] = by_columns[np.maximum(place - 1, 0)]

    # A corner where two pixels touch is passed twice, any other once.
    steps, turn, double = following.tolist(), way.tolist(), touching.tolist()
    opposite = (_LEFT, _UP, _RIGHT, _DOWN)
    left_over = [2 if d else 1 for d in double]
    used: set[tuple[int, int]] = set()
    found: list[list[int]] = []
    for first in range(count):
        while left_over[first]:
            heading = turn[first]
            if (first, heading) in used:
                heading = opposite[heading]
            walked: list[int] = []
            passed: dict[int, int] = {}  # where two pixels touch, to its place in the walk
            corner = first
            while (corner, heading) not in used:
                if corner in passed:  # back again: what lies between is a ring of its own
                    loop = walked[passed[corner] :]
                    del walked[passed[corner] :]
                    passed = {c: p for c, p in passed.items() if p < len(walked)}
                    found.append(loop)
                if double[corner]:
                    passed[corner] = len(walked)
                used.add((corner, heading))
                left_over[corner] -= 1
                walked.append(corner)
                corner = steps[heading][corner]
                # To the right where pixels touch: it stays with its own pixel.
                heading = (heading + 1) % 4 if double[corner] else turn[corner]
            found.append(walked)
    rings = [np.stack([xs[walked], ys[walked]], axis=1).astype(np.float64) for walked in found]
    return [(_area(ring), ring) for ring in rings]


def _area(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _surrounding(hole: np.ndarray, outer: list[tuple[float, np.ndarray]], boxes: np.ndarray) -> int:
    """The outline around a hole: the smallest that holds the pixel above the hole's uppermost edge."""
    top = hole[:, 1].min()
    x, y = hole[hole[:, 1] == top, 0].min() + 0.5, top - 0.5
    near = (boxes[:, 0] < x) & (boxes[:, 1] < y) & (x < boxes[:, 2]) & (y < boxes[:, 3])
    for number in np.flatnonzero(near)[::-1]:
        if _holds(outer[number][1], x, y):
            return int(number)
    raise AssertionError("a hole is inside an outline")


def _holds(ring: np.ndarray, x: float, y: float) -> bool:
    """Even-odd rule along the ray to the left; no corner lies on it, as x and y are centres of pixels."""
    ends = np.roll(ring, -1, axis=0)
    upright = (ring[:, 1] > y) != (ends[:, 1] > y)
    return bool((ring[upright, 0] < x).sum() % 2)


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas and Peucker's algorithm, between the two corners that are farthest apart along a diagonal."""
    if len(ring) <= 4:
        return ring
    start = int((ring[:, 0] + ring[:, 1]).argmin())
    ring = np.roll(ring, -start, axis=0)
    far = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far]] = True
    open_parts = [(0, far), (far, len(ring))]
    while open_parts:
        first, last = open_parts.pop()
        if last - first < 2:
            continue
        between = closed[first + 1 : last] - closed[first]
        chord = closed[last] - closed[first]
        length = float(np.hypot(*chord))
        if length:
            distance = np.abs(between[:, 0] * chord[1] - between[:, 1] * chord[0]) / length
        else:
            distance = np.hypot(between[:, 0], between[:, 1])
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            open_parts += [(first, middle), (middle, last)]
    simple = ring[keep[:-1]]
    return simple if len(simple) >= 3 else ring
