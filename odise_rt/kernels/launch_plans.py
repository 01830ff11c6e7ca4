"""How each kernel is launched: its name, grid, shared memory and numbers, from sizes alone.

The same arithmetic stands in ``mask_pool_plan`` and the launchers of the ``.cu`` files, for callers in C; a test holds
the two together. Nothing here needs CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from odise_rt.errors import BackendError

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
"""Element types, as numbered in ``elements.cuh``."""
SUFFIX = {FLOAT32: "f32", FLOAT16: "f16", BFLOAT16: "bf16"}
ITEM_BYTES = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2}

POOL_THREADS, POOL_WARPS, POOL_CHANNELS, POOL_PIXELS, POOL_STAGES, FINISH_CHANNELS = 256, 8, 256, 32, 8, 128
MERGE_THREADS, MERGE_WARPS, MERGE_COLUMNS, MERGE_ROWS, MERGE_TAPS, MERGE_QUERIES = 256, 8, 64, 32, 3, 2048
ATTENTION_THREADS, ATTENTION_LEVELS = 256, 8
_INT32 = (1 << 31) - 1


@dataclass(frozen=True)
class GpuFacts:
    """What a plan must know of a GPU."""

    multiprocessors: int
    shared_limit: int
    """Bytes of shared memory that a block can ask for."""
    compute_capability: int
    """90 for 9.0."""


@dataclass(frozen=True)
class Launch:
    """One kernel, ready to be launched once pointers are added."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class MaskPoolPlan:
    """Both kernels of mask pooling."""

    sums: Launch
    finish: Launch
    row_tiles: int
    simt: bool
    """Ordinary float arithmetic instead of tensor cores."""
    splits: int
    stages: int
    workspace_bytes: int
    counts_offset: int
    """Bytes from the start of the workspace to the counts."""


def plan_mask_pool(dtype: int, batch: int, queries: int, channels: int, pixels: int, gpu: GpuFacts) -> MaskPoolPlan:
    """Sizes (B, Q, C, H * W) to launches.

    Raises:
        BackendError: a size is out of range.
    """
    limits = {
        "batch": (batch, 65_535),
        "queries": (queries, 65_535),
        "channels": (channels, 1 << 20),
        "pixels": (pixels, _INT32),
    }
    for name, (value, most) in limits.items():
        if not 1 <= value <= most:
            raise BackendError(f"mask_pool: {name} is {value}, expected 1 to {most}")
    row_tiles = 2 if queries <= 32 else 7
    simt = dtype == FLOAT32 or (dtype == BFLOAT16 and gpu.compute_capability < 80)
    masks = 16 * row_tiles
    tiles = -(-queries // masks) * -(-channels // POOL_CHANNELS)
    if tiles > 65_535:
        raise BackendError(f"mask_pool: {queries} queries of {channels} channels are too many for one launch")
    steps = -(-pixels // POOL_PIXELS)
    # One block for each multiprocessor; but no split so long that a float could not count its pixels.
    splits = max(1, min(max(gpu.multiprocessors // (tiles * batch), -(-pixels // (1 << 23))), steps))
    rows = masks + POOL_CHANNELS
    stages = 0
    if simt:
        shared_bytes = rows * (POOL_PIXELS + 1) * 4
    else:
        stage = rows * POOL_PIXELS * 2
        stages = max(2, min(gpu.shared_limit // stage, POOL_STAGES))
        shared_bytes = stages * stage
    if shared_bytes > gpu.shared_limit:
        raise BackendError(
            f"mask_pool needs {shared_bytes} bytes of shared memory a block, this GPU has {gpu.shared_limit}"
        )
    suffix = SUFFIX[dtype]
    counts_offset = batch * splits * queries * channels * 4
    return MaskPoolPlan(
        sums=Launch(
            f"odise_pool_{'simt' if simt else 'sums'}_{suffix}_{row_tiles}",
            (splits, tiles, batch),
            POOL_THREADS,
            shared_bytes,
        ),
        finish=Launch(
            f"odise_pool_finish_{suffix}",
            (-(-channels // FINISH_CHANNELS), queries, batch),
            POOL_THREADS,
            (POOL_WARPS * FINISH_CHANNELS + 1) * 4,
        ),
        row_tiles=row_tiles,
        simt=simt,
        splits=splits,
        stages=stages,
        workspace_bytes=counts_offset + batch * splits * queries * 4,
        counts_offset=counts_offset,
    )


@dataclass(frozen=True)
class MergePlan:
    """Both kernels of the panoptic merge."""

    prepare: Launch
    merge: Launch


def plan_panoptic_merge(
    dtype: int,
    queries: int,
    cells: tuple[int, int],
    test_size: tuple[int, int],
    original_size: tuple[int, int],
    stride: int,
) -> MergePlan:
    """Sizes of masks, image in the network and result to launches.

    Raises:
        BackendError: a size is out of range, or the test size exceeds the canvas.
    """
    if not 1 <= queries <= MERGE_QUERIES:
        raise BackendError(f"panoptic_merge: {queries} masks, expected 1 to {MERGE_QUERIES}")
    for axis in (0, 1):
        canvas = cells[axis] * stride
        if not (1 <= cells[axis] <= 1 << 20 and 1 <= test_size[axis] <= canvas and 1 <= original_size[axis] <= 1 << 20):
            raise BackendError(
                f"panoptic_merge: cells {cells}, test size {test_size} and result {original_size} do not fit: expected "
                f"a test size of at most {stride} pixels a cell, and every size at least 1"
            )
    rows, columns = original_size
    if rows * columns > _INT32:
        raise BackendError(f"panoptic_merge: a result of {rows} x {columns} pixels is too large for one launch")
    work = max(rows, columns, 3 * queries)
    return MergePlan(
        Launch("odise_merge_prepare", (-(-work // MERGE_THREADS), 1, 1), MERGE_THREADS, 0),
        Launch(
            f"odise_merge_{SUFFIX[dtype]}",
            (-(-columns // MERGE_COLUMNS), -(-rows // MERGE_ROWS), 1),
            MERGE_THREADS,
            (5 * queries + MERGE_WARPS + 1) * 4,
        ),
    )


def plan_deformable_attention(
    dtype: int,
    batch: int,
    queries: int,
    heads: int,
    channels: int,
    shapes: Sequence[tuple[int, int]],
    points: int,
    aligned: bool,
) -> Launch:
    """Sizes to a launch; ``aligned`` says that values and result start at multiples of 16 bytes.

    Raises:
        BackendError: a size is out of range.
    """
    if min(batch, queries, heads, channels, points) < 1:
        raise BackendError("deformable_attention: every size must be at least 1")
    if not 1 <= len(shapes) <= ATTENTION_LEVELS or any(h < 1 or w < 1 for h, w in shapes):
        raise BackendError(
            f"deformable_attention: levels {list(shapes)}, expected 1 to {ATTENTION_LEVELS} of at least 1 x 1"
        )
    widest = 16 // ITEM_BYTES[dtype]
    vector = widest if aligned and channels % widest == 0 else 1
    work = batch * queries * heads * (channels // vector)
    blocks = -(-work // ATTENTION_THREADS)
    if blocks > _INT32 or sum(h * w for h, w in shapes) > _INT32:
        raise BackendError("deformable_attention: too many queries or pixels for one launch")
    return Launch(f"odise_attention_{SUFFIX[dtype]}_{vector}", (blocks, 1, 1), ATTENTION_THREADS, 0)
