"""mask_pool: the definition, and the CUDA kernel's body emulated on the CPU against it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from odise_rt.kernels.launch_plans import FLOAT16, GpuFacts, plan_mask_pool
from odise_rt.kernels.reference import mask_pool
from tests.odise_rt.kernels.bfloat16 import from_bfloat16, to_bfloat16
from tests.odise_rt.kernels.compiled import NEWER, Compiled, chosen
from tests.odise_rt.kernels.emulated import Emulation

# Rounding of the result's type: a mean of values of size 1 may be off by half a unit in the last place, and float sums
# of n values by about 1e-7 * sqrt(n).
TOLERANCE = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 5e-3}


@pytest.fixture(params=["source", "sm_75", "sm_90", NEWER])
def implementation(request: pytest.FixtureRequest) -> Emulation | Compiled:
    """The oldest GPUs have other copies, products and sums."""
    return chosen(request)


def problem(
    batch: int, queries: int, channels: int, height: int, width: int, kind: str, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits and features as stored, and as the float32 values that these stand for."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(batch, queries, height, width)).astype(np.float32)
    features = random.normal(size=(batch, channels, height, width)).astype(np.float32)
    if kind == "bfloat16":
        stored = to_bfloat16(logits), to_bfloat16(features)
        return (*stored, from_bfloat16(stored[0]), from_bfloat16(stored[1]))
    stored = logits.astype(kind), features.astype(kind)
    return (*stored, stored[0].astype(np.float32), stored[1].astype(np.float32))


def check(
    implementation: Emulation | Compiled, arrays: tuple[np.ndarray, ...], kind: str, **options: int | bool
) -> None:
    logits, features, true_logits, true_features = arrays
    pooled, areas = implementation.mask_pool(logits, features, **options)  # type: ignore[arg-type]
    expected, expected_areas = mask_pool(true_logits, true_features)
    np.testing.assert_array_equal(areas, expected_areas)
    values = from_bfloat16(pooled) if kind == "bfloat16" else pooled.astype(np.float64)
    difference = np.abs(values - expected)
    print(f"{kind}: largest difference {difference.max():.3g}, mean {difference.mean():.3g}")
    assert difference.max() <= TOLERANCE[kind] * max(1.0, np.abs(expected).max())


def test_definition_by_hand() -> None:
    logits = np.array([[[[1.0, -1.0, 0.0, 2.0]], [[-1.0, -1.0, -0.0, np.nan]]]], np.float32)
    features = np.array([[[[1.0, 10.0, 100.0, 3.0]]]], np.float32)
    pooled, areas = mask_pool(logits, features)
    assert pooled.tolist() == [[[2.0], [0.0]]]  # zero is outside, so is NaN; an empty mask gives zero
    assert areas.tolist() == [[2, 0]]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "queries", "channels", "height", "width"),
    [
        (1, 100, 256, 16, 24),  # the model's, on a small canvas
        (2, 20, 64, 8, 8),  # odise-tiny's
        (1, 1, 1, 1, 1),
        (1, 1, 3, 5, 7),  # one query; rows of 35 pixels start unaligned
        (3, 33, 257, 3, 11),  # one more than a tile of masks and of channels
        (1, 129, 40, 6, 8),
        (1, 113, 129, 6, 8),  # without tensor cores, a tile of masks is smaller
        (1, 17, 8, 1, 40),  # a step and a half of pixels
        (1, 5, 7, 2, 129),  # odd channels: no vector in the workspace
    ],
)
def test_body_equals_the_definition(
    implementation: Emulation | Compiled, batch: int, queries: int, channels: int, height: int, width: int, kind: str
) -> None:
    arrays = problem(batch, queries, channels, height, width, kind)
    check(implementation, arrays, kind)
    check(implementation, arrays, kind, multiprocessors=132, late=False)


@pytest.mark.parametrize("shared_limit", [40_000, 50_000, 65_536, 101_376, 232_448])
def test_every_depth_of_the_pipeline(implementation: Emulation | Compiled, shared_limit: int) -> None:
    """From two stages to eight (Hopper); copies arrive as late as the waits allow."""
    for pixels in (8, 64, 72, 512):
        arrays = problem(1, 40, 32, 1, pixels, "float16", seed=pixels)
        check(implementation, arrays, "float16", shared_limit=shared_limit, multiprocessors=2)


@pytest.mark.parametrize("channels", [8, 6])
def test_more_splits_than_are_read_at_once(implementation: Emulation | Compiled, channels: int) -> None:
    """A finishing warp has twelve of 94; with other channels than fours, it reads one element at a time."""
    check(implementation, problem(1, 3, channels, 60, 50, "float16"), "float16", multiprocessors=500)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_first_with_asynchronous_copies(compiled_for: Callable[[int], Compiled], kind: str) -> None:
    """sm_80 compares bfloat16 by its bits; what else it does is what sm_90 does."""
    check(compiled_for(80), problem(1, 40, 50, 6, 8, kind), kind)


def test_bfloat16_without_its_tensor_cores(emulation: Emulation) -> None:
    check(emulation, problem(1, 40, 50, 6, 9, "bfloat16"), "bfloat16", capability=75, shared_limit=65_536)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_empty_full_and_boundary_masks(implementation: Emulation | Compiled, kind: str) -> None:
    logits, features, *_ = problem(1, 6, 16, 9, 8, kind)
    logits[0, 0] = -1  # empty
    logits[0, 1] = 3  # full
    logits[0, 2] = 0  # exactly one half: outside
    logits[0, 3] = -0.0
    logits[0, 4] = np.nan
    logits[0, 5] = np.finfo(kind).smallest_subnormal
    pooled, areas = implementation.mask_pool(logits, features)
    assert areas.tolist() == [[0, 72, 0, 0, 0, 72]]
    assert not pooled[0, [0, 2, 3, 4]].any()
    np.testing.assert_array_equal(pooled[0, 1], pooled[0, 5])
    check(implementation, (logits, features, logits.astype(np.float32), features.astype(np.float32)), kind)


def test_unaligned_pointers(implementation: Emulation | Compiled) -> None:
    logits, features, true_logits, true_features = problem(1, 10, 16, 8, 8, "float16")
    shifted = []
    for array in (logits, features):
        memory = np.empty(array.size + 1, array.dtype)[1:]
        memory[:] = array.ravel()
        shifted.append(memory.reshape(array.shape))
    check(implementation, (*shifted, true_logits, true_features), "float16")


def test_same_bits_whatever_the_copies_do(emulation: Emulation) -> None:
    logits, features, *_ = problem(1, 20, 40, 8, 32, "float16")
    early = emulation.mask_pool(logits, features, late=False)
    late = emulation.mask_pool(logits, features, late=True)
    np.testing.assert_array_equal(early[0], late[0])


def far_masks() -> tuple[np.ndarray, np.ndarray]:
    """The last mask lies more than 2^31 elements in. Virtual memory: only what the last split reads is ever touched."""
    pixels, queries = 1 << 26, 33
    logits = np.zeros((1, queries, 1, pixels), np.float16)  # 4.4 GB, untouched pages are not there
    features = np.zeros((1, 1, 1, pixels), np.float16)
    logits[0, -1, 0, -40:] = 1
    features[0, 0, 0, -30:] = 2
    return logits, features


SPLITS = 1 << 14


def test_indices_beyond_32_bits(emulation: Emulation) -> None:
    sums, counts, plan = emulation.pool_one_split(*far_masks(), SPLITS, SPLITS - 1)
    assert plan[3] == SPLITS
    assert sums[-1, 0] == 60.0
    assert counts.tolist() == [0] * 32 + [40]


@pytest.mark.parametrize("capability", [75, 90])
def test_compiled_indices_beyond_32_bits(compiled_for: Callable[[int], Compiled], capability: int) -> None:
    kernels = compiled_for(capability).kernels
    logits, features = far_masks()
    plan = plan_mask_pool(FLOAT16, 1, 33, 1, 1 << 26, GpuFacts(SPLITS, 65_536, capability))
    assert plan.splits == SPLITS
    sums, counts = np.full((SPLITS, 33, 1), np.nan, np.float32), np.full((SPLITS, 33), -7, np.int32)
    arrays = (logits, features, sums, counts)
    pointers = [array.ctypes.data for array in arrays]
    sizes = map(np.int32, (33, 1, 1 << 26, SPLITS, plan.stages))
    blocks = (SPLITS - 1, SPLITS)
    kernels.run(plan.sums, (*pointers[:2], *sizes, *pointers[2:]), arrays, watch=False, blocks=blocks)
    assert sums[-1, -1, 0] == 60.0
    assert counts[-1].tolist() == [0] * 32 + [40]
    assert np.isnan(sums[:-1]).all()


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (0, (0, 1, 1, 1)),
        (1, (1, 0, 1, 1)),
        (1, (1, 1, 0, 1)),
        (1, (1, 1, 1, 0)),
        (1, (1, 1, 1, 1 << 31)),
        (1, (70_000, 1, 1, 1)),
        (3, (1, 1, 1, 1)),
        (-1, (1, 1, 1, 1)),
    ],
)
def test_sizes_out_of_range_are_refused(emulation: Emulation, dtype: int, sizes: tuple[int, ...]) -> None:
    assert emulation.pool_plan(dtype, *sizes, 132, 232_448, 90)[0] == 1


def test_conversions_are_numpys(emulation: Emulation) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)
    random = np.random.default_rng(0)
    floats = (random.normal(size=1 << 16) * 10.0 ** random.integers(-9, 6, 1 << 16)).astype(np.float32)
    finite = halves[:0x7C00].astype(np.float32)
    floats[:0x7C00] = finite * np.float32(1 + 2**-11)  # ties, and next to them
    floats[0x8000:0xFC00] = -finite * np.float32(1 + 3 * 2**-11)
    floats[:6] = 0, -0.0, np.inf, -np.inf, 65519.996, 65520
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    widened, narrowed = emulation.convert(bits, floats, 1)
    np.testing.assert_array_equal(widened, halves.astype(np.float32))
    np.testing.assert_array_equal(narrowed, expected.view(np.uint16))
    widened, narrowed = emulation.convert(bits, floats, 2)
    np.testing.assert_array_equal(widened.view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(narrowed, to_bfloat16(floats))
