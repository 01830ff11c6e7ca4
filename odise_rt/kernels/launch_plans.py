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

POOL_THREADS, POOL_WARPS, POOL_CHANNELS, POOL_PIXELS, POOL_STAGES, FINISH_CHANNELS = 256, 8, 128, 32, 8, 128
MERGE_THREADS, MERGE_WARPS, MERGE_COLUMNS, MERGE_ROWS, MERGE_QUERIES = 256, 8, 64, 32, 2048
ATTENTION_THREADS, ATTENTION_LEVELS = 256, 8
NAME_THREADS, NAME_WORDS, COSINE_TILE, COSINE_DEPTH, PAINT_COLUMNS, PAINT_ROWS = 256, 1 << 24, 64, 16, 64, 32
IMAGE_THREADS, IMAGE_SIDE, STITCH_CHANNELS = 256, 1 << 20, 16
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
    simt = dtype == FLOAT32 or (dtype == BFLOAT16 and gpu.compute_capability < 80)
    row_tiles = 2 if queries <= 32 else 7 if simt else 8
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
        shared_bytes = rows * (POOL_PIXELS + 4) * 4
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
    network_size: tuple[int, int],
    original_size: tuple[int, int],
    stride: int,
) -> MergePlan:
    """Sizes of masks, image in the network and result to launches.

    Raises:
        BackendError: a size is out of range, or the network size exceeds the canvas.
    """
    if not 1 <= queries <= MERGE_QUERIES:
        raise BackendError(f"panoptic_merge: {queries} masks, expected 1 to {MERGE_QUERIES}")
    for axis in (0, 1):
        canvas = cells[axis] * stride
        largest, inside = 1 << 20, 1 <= network_size[axis] <= canvas
        if not (1 <= cells[axis] <= largest and inside and 1 <= original_size[axis] <= largest):
            raise BackendError(
                f"panoptic_merge: cells {cells}, network size {network_size} and result {original_size} do not fit: "
                f"expected a network size of at most {stride} pixels a cell, and every size at least 1"
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


def plan_text_cosines(queries: int, channels: int, words: int) -> Launch:
    """Embeddings (Q, C) and texts (L, C) to a launch.

    Raises:
        BackendError: a size is out of range.
    """
    _check_naming(queries, words)
    if not 1 <= channels <= 1 << 20:
        raise BackendError(f"naming: {channels} channels, expected 1 to {1 << 20}")
    return Launch(
        "odise_name_cosines",
        (-(-words // COSINE_TILE), -(-queries // COSINE_TILE), 1),
        NAME_THREADS,
        (2 * COSINE_DEPTH * (COSINE_TILE + 4) + NAME_THREADS) * 4,
    )


def plan_name_classes(queries: int, words: int, classes: int, best: int) -> Launch:
    """Cosines (Q, L) of K classes, of which ``best`` are ranked, to a launch.

    Raises:
        BackendError: a size is out of range.
    """
    _check_naming(queries, words)
    if not 1 <= classes <= words or not 0 <= best <= classes:
        raise BackendError(
            f"naming: {classes} classes of {words} words, {best} of them ranked: expected no more classes than words, "
            "and no more ranked than there are"
        )
    return Launch("odise_name_classes", (queries, 1, 1), NAME_THREADS, 2 * NAME_THREADS * 4)


def plan_choose_segments(queries: int) -> Launch:
    """Masks to a launch.

    Raises:
        BackendError: there are too many.
    """
    _check_naming(queries, 1)
    return Launch("odise_name_choose", (1, 1, 1), NAME_THREADS, 3 * queries * 4)


def plan_paint_segments(queries: int, size: tuple[int, int]) -> Launch:
    """Masks and size of the result to a launch.

    Raises:
        BackendError: a size is out of range.
    """
    _check_naming(queries, 1)
    rows, columns = size
    if not (1 <= rows <= IMAGE_SIDE and 1 <= columns <= IMAGE_SIDE) or rows * columns > _INT32:
        raise BackendError(f"naming: a result of {rows} x {columns} pixels, expected 1 to {_INT32}")
    return Launch(
        "odise_name_paint",
        (-(-columns // PAINT_COLUMNS), -(-rows // PAINT_ROWS), 1),
        NAME_THREADS,
        5 * queries * 4,
    )


def _check_naming(queries: int, words: int) -> None:
    if not 1 <= queries <= MERGE_QUERIES or not 1 <= words <= NAME_WORDS:
        raise BackendError(
            f"naming: {queries} masks and {words} words, expected 1 to {MERGE_QUERIES} and 1 to {NAME_WORDS}"
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


@dataclass(frozen=True)
class WindowLayout:
    """How windows lie on a canvas: side by side, the last row and column moved back inside.

    It is that of :func:`odise_rt.windows.window_grid`, in any unit: pixels, or cells of a feature level. One window of
    another shape is a crop.
    """

    canvas: tuple[int, int]
    side: tuple[int, int]

    @property
    def down(self) -> int:
        """Windows below each other."""
        return -(-self.canvas[0] // self.side[0])

    @property
    def across(self) -> int:
        """Windows beside each other."""
        return -(-self.canvas[1] // self.side[1])

    def numbers(self) -> tuple[int, ...]:
        """Rows, columns, side rows, side columns, down, across, as the kernels take them."""
        return (*self.canvas, *self.side, self.down, self.across)


@dataclass(frozen=True)
class ResizePlan:
    """Both axes of the resize."""

    across: Launch
    down: Launch


def plan_resize(source: tuple[int, int], target: tuple[int, int], canvas: tuple[int, int]) -> ResizePlan:
    """Sizes of the pixels, of the image in the network and of its padded canvas to launches.

    Raises:
        BackendError: a size is out of range, or the image exceeds its canvas.
    """
    sizes = (*source, *target, *canvas)
    if not all(1 <= size <= IMAGE_SIDE for size in sizes) or target[0] > canvas[0] or target[1] > canvas[1]:
        raise BackendError(
            f"resize: pixels {source} to {target} on a canvas of {canvas}: expected sizes of 1 to {IMAGE_SIDE}, and a "
            "canvas that holds the image"
        )
    return ResizePlan(
        _one_pixel_a_thread("odise_image_across", source[0] * target[1]),
        _one_pixel_a_thread("odise_image_down", canvas[0] * canvas[1]),
    )


def plan_cut_windows(layout: WindowLayout, channels: int, start: int, count: int) -> Launch:
    """``count`` windows of a canvas from number ``start`` on.

    Raises:
        BackendError: a size is out of range.
    """
    _check_layout(layout, channels)
    if start < 0 or count < 1 or start + count > layout.down * layout.across:
        raise BackendError(
            f"cut_windows: windows {start} to {start + count} of {layout.down * layout.across} do not exist"
        )
    return _one_pixel_a_thread("odise_image_cut", count * layout.side[0] * layout.side[1])


def plan_stitch_windows(layout: WindowLayout, channels: int) -> Launch:
    """All windows back to a canvas.

    Raises:
        BackendError: a size is out of range.
    """
    _check_layout(layout, channels)
    return _one_pixel_a_thread(
        "odise_image_stitch", layout.canvas[0] * layout.canvas[1], -(-channels // STITCH_CHANNELS)
    )


def _check_layout(layout: WindowLayout, channels: int) -> None:
    for side, length in zip(layout.side, layout.canvas, strict=True):
        if not 1 <= side <= length <= IMAGE_SIDE:
            raise BackendError(f"windows of {layout.side} do not fit a canvas of {layout.canvas}")
    if not 1 <= channels <= 1 << 16:
        raise BackendError(f"{channels} channels, expected 1 to {1 << 16}")


def _one_pixel_a_thread(kernel: str, pixels: int, channel_groups: int = 1) -> Launch:
    blocks = -(-pixels // IMAGE_THREADS)
    if blocks > _INT32:
        raise BackendError(f"{kernel}: {pixels} pixels are too many for one launch")
    return Launch(kernel, (blocks, channel_groups, 1), IMAGE_THREADS, 0)
