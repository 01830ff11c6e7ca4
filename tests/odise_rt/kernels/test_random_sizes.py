"""The kernels as nvcc makes them on sizes that nobody chose; what the chosen ones leave out shows here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odise_rt.kernels.reference import MergedPixels, merge_errors
from tests.odise_rt.kernels import test_deformable_attention, test_mask_pooling
from tests.odise_rt.kernels.bfloat16 import from_bfloat16, to_bfloat16
from tests.odise_rt.kernels.compiled import Compiled
from tests.odise_rt.kernels.test_panoptic_merge import blobs

pytestmark = pytest.mark.slow

KINDS = st.sampled_from(["float32", "float16", "bfloat16"])
SEEDS = st.integers(0, 1 << 20)
CELLS = st.integers(1, 3) | st.integers(1, 24)
PIXELS = st.integers(1, 12) | st.integers(1, 200)


@pytest.fixture(scope="module", params=[75, 80, 90, 100])
def compiled(request: pytest.FixtureRequest, compiled_for: Callable[[int], Compiled]) -> Compiled:
    return compiled_for(request.param)


@settings(max_examples=120)
@given(
    kind=KINDS,
    sizes=st.tuples(
        st.integers(1, 2), st.integers(1, 130), st.integers(1, 300), st.integers(1, 20), st.integers(1, 70)
    ),
    multiprocessors=st.integers(1, 12),
    shared_limit=st.sampled_from([65_536, 101_376, 166_912, 232_448]),
    seed=SEEDS,
)
def test_mask_pool(
    compiled: Compiled,
    kind: str,
    sizes: tuple[int, int, int, int, int],
    multiprocessors: int,
    shared_limit: int,
    seed: int,
) -> None:
    """Sizes are B, Q, C, H, W."""
    arrays = test_mask_pooling.problem(*sizes, kind, seed)
    test_mask_pooling.check(compiled, arrays, kind, multiprocessors=multiprocessors, shared_limit=shared_limit)


@settings(max_examples=200)
@given(
    kind=KINDS,
    cells=st.tuples(CELLS, CELLS),
    cropped=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    original=st.none() | st.tuples(PIXELS, PIXELS),
    queries=st.integers(1, 70),
    noise=st.booleans(),
    seed=SEEDS,
)
def test_panoptic_merge(
    compiled: Compiled,
    kind: str,
    cells: tuple[int, int],
    cropped: tuple[int, int],
    original: tuple[int, int] | None,
    queries: int,
    noise: bool,
    seed: int,
) -> None:
    rows, columns = (max(1, 4 * cell - less) for cell, less in zip(cells, cropped, strict=True))
    result = original or (rows, columns)
    logits, scores = blobs(queries, cells, seed)
    random = np.random.default_rng(seed)
    if noise:
        logits = random.normal(0, 3, logits.shape).astype(np.float32)
    scores[random.random(queries) < 0.1] = 0
    stored = to_bfloat16(logits) if kind == "bfloat16" else logits.astype(kind)
    true = from_bfloat16(stored) if kind == "bfloat16" else stored.astype(np.float32)
    merged = MergedPixels(*compiled.panoptic_merge(stored, scores, (rows, columns), result))
    assert merge_errors(merged, true, scores, (rows, columns), result) == []


@settings(max_examples=80)
@given(
    kind=KINDS,
    sizes=st.tuples(
        st.integers(1, 2), st.integers(1, 40), st.integers(1, 4),
        st.integers(1, 20) | st.sampled_from([16, 24, 32]), st.integers(1, 5),
    ),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    seed=SEEDS,
)  # fmt: skip
def test_attention(
    compiled: Compiled, kind: str, sizes: tuple[int, int, int, int, int], shapes: list[tuple[int, int]], seed: int
) -> None:
    """Sizes are B, M, heads, C, points."""
    test_deformable_attention.check(
        compiled, test_deformable_attention.problem(kind, *sizes, shapes, seed), kind, shapes
    )
