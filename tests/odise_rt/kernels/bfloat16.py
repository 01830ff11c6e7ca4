"""bfloat16 in numpy, which has no such type: its bits as uint16, as the kernels are given them."""

from __future__ import annotations

import numpy as np


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16 as uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    narrow: np.ndarray = np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))
    return narrow


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 as uint16 to float32, exactly."""
    values: np.ndarray = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values
