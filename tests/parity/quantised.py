"""How recorded tensors are stored: uniform steps, the top byte compressed, the noisy rest packed as it is.

A tensor with many exact zeros (what a ReLU leaves) stores where they are, and values for the others only.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

_TOP_BITS = 8


@dataclass(frozen=True)
class Steps:
    """``value = offset + step * code``, with ``bits`` to a code."""

    bits: int
    offset: float
    step: float
    sparse: bool = False
    """Zeros are stored apart, as a bit mask."""

    def to_dict(self) -> dict[str, float | int | bool]:
        """Plain JSON types."""
        return asdict(self)


def spread(array: np.ndarray, bits: int, phase: float = 0.5) -> Steps:
    """Steps over the range of an array; ``phase`` in [0, 1) shifts all of them by this part of a step."""
    low, high = float(array.min()), float(array.max())
    step = (high - low) / (2**bits - 2)
    return Steps(bits, low - phase * step, step)


def spread_keeping_signs(array: np.ndarray, bits: int) -> Steps:
    """Steps with zero halfway between two of them, so that no value changes its sign."""
    low, high = float(array.min()), float(array.max())
    step = (high - low) / (2**bits - 3)
    return Steps(bits, -(math.ceil(-low / step) + 0.5) * step, step)


def spread_positive(array: np.ndarray, bits: int) -> Steps:
    """Steps from zero up, for an array without negative values in which zeros are exact."""
    assert array.min() >= 0.0, "only for the output of a ReLU"
    return Steps(bits, 0.0, float(array.max()) / (2**bits - 1), sparse=True)


def rounded(array: np.ndarray, steps: Steps) -> np.ndarray:
    """What :func:`decode` gives back of a dense array, float32."""
    codes = np.rint((array.astype(np.float64) - steps.offset) / steps.step)
    return (steps.offset + steps.step * codes).astype(np.float32)


def encode(array: np.ndarray, steps: Steps) -> dict[str, bytes]:
    """The parts of a stored array: ``zeros`` (if sparse), ``top`` and ``rest``."""
    values = array.ravel().astype(np.float64)
    parts: dict[str, bytes] = {}
    if steps.sparse:
        parts["zeros"] = compress(np.packbits(values == 0.0).tobytes())
        values = values[values != 0.0]
    codes = np.rint((values - steps.offset) / steps.step).astype(np.int64)
    assert ((codes >= 0) & (codes < 2**steps.bits)).all(), "an array beyond its own range"
    rest = steps.bits - _TOP_BITS
    parts["top"] = compress((codes >> rest).astype(np.uint8).tobytes())
    places = np.arange(rest - 1, -1, -1)
    parts["rest"] = np.packbits(((codes[:, None] >> places) & 1).astype(np.uint8)).tobytes()
    return parts


def decode(parts: Mapping[str, bytes], steps: Steps, shape: tuple[int, ...]) -> np.ndarray:
    """The array, float32, from what :func:`encode` made of it."""
    top = np.frombuffer(decompress(parts["top"]), np.uint8).astype(np.int64)
    rest = steps.bits - _TOP_BITS
    bits = np.unpackbits(np.frombuffer(parts["rest"], np.uint8), count=top.size * rest).reshape(top.size, rest)
    codes = (top << rest) | (bits.astype(np.int64) @ (1 << np.arange(rest - 1, -1, -1)))
    values = (steps.offset + steps.step * codes).astype(np.float32)
    if not steps.sparse:
        return values.reshape(shape)
    zeros = np.unpackbits(np.frombuffer(decompress(parts["zeros"]), np.uint8), count=math.prod(shape)).astype(bool)
    whole = np.zeros(math.prod(shape), np.float32)
    whole[~zeros] = values
    return whole.reshape(shape)


def compress(data: bytes) -> bytes:
    """An xz stream; literals have no context, which suits quantised numbers."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def decompress(data: bytes) -> bytes:
    """The inverse of :func:`compress`."""
    return lzma.decompress(data)
