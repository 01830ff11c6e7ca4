"""COCO's run-length encoding of binary masks, in its compressed string form, without pycocotools.

Runs alternate between 0 and 1, starting with 0, down the columns. Each run length is written as the difference from the
one two before it, in groups of five bits of printable characters, least significant group first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_MAX_GROUPS = 13  # groups of five bits in 64 bits


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask.

    Args:
        mask: bool (h, w).

    Returns:
        ``{"size": [h, w], "counts": str}``, as pycocotools gives with its bytes decoded.
    """
    height, width = mask.shape
    return {"size": [height, width], "counts": _compress(run_lengths(mask))}


def encode_labels(labels: np.ndarray, values: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Encode the masks of values of a map, in one pass over it.

    Args:
        labels: integers (h, w), at least one.
        values: those whose masks are wanted.

    Yields:
        For each value what :func:`encode` gives for its pixels.
    """
    height, width = labels.shape
    flat = labels.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    edges = np.stack([starts, np.append(starts[1:], flat.size)], axis=1)  # of the runs of one value
    owners = flat[starts]
    for value in values:
        lengths = np.diff(edges[owners == value].ravel(), prepend=0, append=flat.size)
        yield {"size": [height, width], "counts": _compress(lengths if lengths[-1] else lengths[:-1])}


def decode(rle: dict[str, Any]) -> np.ndarray:
    """The mask of an encoding: bool (h, w).

    Raises:
        ValueError: the runs do not fill the size.
    """
    height, width = (int(v) for v in rle["size"])
    counts = rle["counts"]
    lengths = np.asarray(counts, np.int64) if isinstance(counts, list) else _expand(counts)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"run lengths add up to {lengths.sum()}, expected {height} x {width} = {height * width}")
    values = np.arange(len(lengths)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, lengths).reshape(width, height).T)


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Run lengths down the columns, int64, the first one of zeros (possibly of length 0)."""
    flat = np.asarray(mask, bool).ravel(order="F")
    if not flat.size:
        return np.zeros(1, np.int64)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(changes, prepend=0, append=flat.size)
    return np.concatenate([[0], lengths]) if flat[0] else lengths


def _compress(lengths: np.ndarray) -> str:
    values = lengths.astype(np.int64).copy()
    values[3:] -= lengths[1:-2]
    groups = np.zeros((len(values), _MAX_GROUPS), np.uint8)
    used = np.zeros(groups.shape, bool)
    open_ = np.ones(len(values), bool)
    for column in range(_MAX_GROUPS):
        if not open_.any():
            break
        bits = (values & 0x1F).astype(np.uint8)
        values = values >> 5
        # A number ends when only sign bits are left and the last group's top bit shows that sign.
        more = np.where(bits & 0x10, values != -1, values != 0)
        groups[:, column] = (bits | (more.astype(np.uint8) << 5)) + 48
        used[:, column] = open_
        open_ = open_ & more
    return groups[used].tobytes().decode("ascii")


def _expand(text: str | bytes) -> np.ndarray:
    raw = text.encode("ascii") if isinstance(text, str) else text
    lengths: list[int] = []
    value, shift = 0, 0
    for byte in raw:
        group = byte - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value, shift = 0, 0
    return np.array(lengths, np.int64)
