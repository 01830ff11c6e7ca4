"""deformable_attention: the CUDA kernel's body emulated on the CPU against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from odise_rt.kernels.reference import deformable_attention
from tests.odise_rt.kernels.bfloat16 import from_bfloat16, to_bfloat16
from tests.odise_rt.kernels.compiled import Compiled
from tests.odise_rt.kernels.emulated import Emulation

TOLERANCE = {"float32": 3e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def problem(
    kind: str,
    batch: int,
    queries: int,
    heads: int,
    channels: int,
    points: int,
    shapes: list[tuple[int, int]],
    seed: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Value, references, offsets and weight logits as stored, and the values that they stand for."""
    random = np.random.default_rng(seed)
    memory = sum(h * w for h, w in shapes)
    samples = len(shapes) * points
    value = random.normal(size=(batch, memory, heads, channels))
    references = random.uniform(-0.1, 1.1, (1, queries, 2)).astype(np.float32)
    offsets = random.normal(0, 2, (batch, queries, heads, len(shapes), points, 2))
    logits = random.normal(0, 2, (batch, queries, heads, samples))
    stored, true = [], []
    for array in (value, offsets, logits):
        if kind == "bfloat16":
            stored.append(to_bfloat16(array.astype(np.float32)))
            true.append(from_bfloat16(stored[-1]))
        else:
            stored.append(array.astype(kind))
            true.append(stored[-1])
    return [stored[0], references, *stored[1:]], [true[0], references, *true[1:]]


def check(
    implementation: Emulation | Compiled,
    arrays: tuple[list[np.ndarray], list[np.ndarray]],
    kind: str,
    shapes: list[tuple[int, int]],
) -> None:
    stored, true = arrays
    out = implementation.deformable_attention(stored[0], shapes, *stored[1:])
    expected = deformable_attention(true[0], shapes, *true[1:])
    values = from_bfloat16(out) if kind == "bfloat16" else out.astype(np.float64)
    difference = np.abs(values - expected)
    print(f"{kind}: largest difference {difference.max():.3g}, mean {difference.mean():.3g}")
    assert difference.max() <= TOLERANCE[kind] * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "channels", "points", "shapes"),
    [
        (1, 84, 8, 32, 4, [(2, 2), (4, 4), (8, 8)]),  # the model's heads and points
        (2, 13, 4, 16, 4, [(3, 5), (1, 7)]),
        (1, 1, 1, 1, 1, [(1, 1)]),
        (3, 5, 2, 5, 3, [(4, 6), (2, 3), (1, 1), (5, 1)]),  # channels that no vector divides
        (2, 7, 3, 24, 2, [(6, 6)] * 8),  # the most levels
    ],
)
def test_body_equals_the_definition(
    implementation: Emulation | Compiled,
    batch: int,
    queries: int,
    heads: int,
    channels: int,
    points: int,
    shapes: list[tuple[int, int]],
    kind: str,
) -> None:
    check(implementation, problem(kind, batch, queries, heads, channels, points, shapes, seed=batch), kind, shapes)


def test_references_of_every_image(implementation: Emulation | Compiled) -> None:
    shapes = [(4, 4)]
    stored, _ = problem("float32", 2, 6, 2, 8, 2, shapes, seed=0)
    stored[1] = np.random.default_rng(1).uniform(0, 1, (2, 6, 2)).astype(np.float32)
    out = implementation.deformable_attention(stored[0], shapes, *stored[1:])
    np.testing.assert_allclose(out, deformable_attention(stored[0], shapes, *stored[1:]), atol=3e-5)


@pytest.mark.parametrize("far", [-1e30, 1e30, np.inf, -np.inf, np.nan, 3e9, -3e9])
def test_samples_far_outside_or_undefined_add_nothing(implementation: Emulation | Compiled, far: float) -> None:
    shapes = [(4, 4)]
    stored, _ = problem("float32", 1, 3, 1, 4, 2, shapes, seed=3)
    value, references, offsets, logits = stored
    offsets[0, 1, 0, 0, 0, 0] = far
    out = implementation.deformable_attention(value, shapes, references, offsets, logits)
    offsets[0, 1, 0, 0, 0, 0] = 100  # as far outside as it matters
    np.testing.assert_array_equal(out, implementation.deformable_attention(value, shapes, references, offsets, logits))


def test_large_weight_logits_do_not_overflow(implementation: Emulation | Compiled) -> None:
    shapes = [(2, 2)]
    stored, _ = problem("float32", 1, 2, 1, 4, 2, shapes, seed=4)
    stored[3][:] = [1e4, -1e4]
    out = implementation.deformable_attention(stored[0], shapes, *stored[1:])
    np.testing.assert_allclose(out, deformable_attention(stored[0], shapes, *stored[1:]), atol=3e-5)


def test_indices_beyond_32_bits(implementation: Emulation | Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last head's channels lie more than 2^31 elements in; untouched pages of the array are not there."""
    if isinstance(implementation, Compiled):
        monkeypatch.setitem(implementation.kernels.options, "watch", False)  # it would take 24 times as much
    height, width, heads, channels = 4096, 4097, 4, 40
    value = np.zeros((1, height * width, heads, channels), np.float16)
    assert value.size > 1 << 31
    value[0, -1, -1] = 3
    queries = 2
    references = np.full((1, queries, 2), 0.5, np.float32)
    references[0, -1] = (width - 0.5) / width, (height - 0.5) / height  # the centre of the last pixel
    offsets = np.zeros((1, queries, heads, 1, 1, 2), np.float16)
    logits = np.zeros((1, queries, heads, 1), np.float16)
    out = implementation.deformable_attention(value, [(height, width)], references, offsets, logits)
    np.testing.assert_allclose(out[0, -1, -1], 3, atol=0.01)
    assert not out[0, 0].any()
