"""Finds the blocks of a graph that do not bear half precision (fp16 or bf16).

If all of a graph in half precision leaves its bounds, there is a first block whose conversion does it: with every
block before it converted and everything behind in float32 the graph agrees, with that block, too, it does not.
Bisection finds it in log2(blocks) runs. It stays in float32, and the search goes on until the whole graph agrees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from odise_rt.errors import ExportError

logger = logging.getLogger(__name__)

MAX_KEPT = 16
"""Most blocks that may stay in float32: with more, float32 for the whole graph is the honest choice."""


@dataclass(frozen=True)
class PrecisionSearch:
    """What a search found."""

    kept: tuple[str, ...]
    """The blocks that stay in float32, in the order in which they were found."""
    trials: int
    """How many graphs were made and compared."""


def search_precision(
    blocks: Iterable[str], agrees: Callable[[Collection[str]], bool], stage: str, advice: str, problem: str = ""
) -> PrecisionSearch:
    """Find the blocks to keep in float32, of a graph that does not agree with all of them in half precision.

    Args:
        blocks: of the graph's nodes (:func:`export.precision.node_blocks`) in topological order.
        agrees: whether the graph agrees when the given blocks, and only they, stay in float32.
        stage: for messages.
        advice: what to do when too many blocks are bad, for messages.
        problem: what is wrong with the whole graph in half precision, for messages.

    Raises:
        ExportError: the graph does not agree in float32 either, or too many blocks are bad.
    """
    blocks = list(dict.fromkeys(blocks))
    kept: list[str] = []
    trials = 0

    def try_first(count: int) -> bool:
        """Only the first ``count`` blocks in half precision."""
        nonlocal trials
        trials += 1
        return agrees({*blocks[count:], *kept})

    if not try_first(0):
        raise ExportError(f"stage {stage}: the graph does not agree in float32 either: {problem}")
    while True:  # all of it in half precision is known not to agree: that is why callers search
        if len(kept) == MAX_KEPT:
            raise ExportError(
                f"stage {stage}: {MAX_KEPT} blocks do not bear half precision ({', '.join(kept)}) and it still does "
                f"not agree ({problem}): {advice}"
            )
        good, bad = 0, len(blocks)  # the invariant of the bisection
        while bad - good > 1:
            middle = (good + bad) // 2
            if try_first(middle):
                good = middle
            else:
                bad = middle
        block = blocks[bad - 1]
        if block in kept:
            raise ExportError(
                f"stage {stage}: block {block!r} stays in float32 and is bad all the same ({problem}): comparisons do "
                f"not repeat; {advice}"
            )
        kept.append(block)
        logger.warning("stage %s: block %r does not bear half precision and stays in float32", stage, block)
        if try_first(len(blocks)):
            return PrecisionSearch(tuple(kept), trials)
