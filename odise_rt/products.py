"""Matrix products that leave no thread spinning behind.

The threads of numpy's BLAS wait for more work in a busy loop for some 30 ms after a large product. On a machine of few
cores they then take turns with the engine's threads just when the next picture's network starts, which costs it many
times what they saved here. So large products run in one thread.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np

THREADED_FROM = 1 << 18
"""Multiplications from which OpenBLAS uses its threads."""

_limiting = threading.Lock()
"""Held while the limit is on: it is one for the process, and two that overlap could restore each other's value."""


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right`` of matrices (m, k) and (k, n), in the calling thread."""
    result: np.ndarray
    if left.shape[0] * left.shape[1] * right.shape[1] < THREADED_FROM:
        result = left @ right
        return result
    with _limiting, _blas().limit(limits=1):
        result = left @ right
    return result


@functools.cache
def _blas() -> Any:
    """Controls the threads of the BLAS libraries of this process; numpy has loaded its own by now."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
