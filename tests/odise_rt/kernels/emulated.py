"""The kernels' bodies compiled for the CPU with a C++ compiler, and called with numpy arrays.

Emulation, not a GPU: see ``emulation.hpp``. Arrays of dtype uint16 stand for bfloat16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.kernels.launch_plans import WindowLayout
from odise_rt.kernels.resize_tables import resize_table
from tests.odise_rt.kernels.builds import HERE, KERNELS, library
from tests.odise_rt.kernels.naming_calls import ClassesCall, NamingCalls

DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}


def build(folder: Path) -> Path:
    """Compile the emulation."""
    headers = [HERE / "emulation.hpp", *sorted(KERNELS.glob("*.cuh"))]
    flags = ("-Wno-unknown-pragmas", "-ffp-contract=off", f"-I{KERNELS}")
    return library(folder, HERE / "emulation.cpp", headers, flags)


class Emulation(NamingCalls):
    """The C functions of ``emulation.cpp``."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def _call(self, name: str, *arguments: object) -> int:
        return int(getattr(self._library, name)(*arguments))

    def pool_plan(self, dtype: int, *sizes: int) -> tuple[int, list[int]]:
        """Status and fields of ``MaskPoolPlan``; sizes as in ``mask_pool_plan``."""
        out = (ctypes.c_int64 * 10)()
        b, q, c, p, multiprocessors, shared, capability = sizes
        wide = [ctypes.c_int64(v) for v in (b, q, c, p)]
        return self._call("emulate_pool_plan", dtype, *wide, multiprocessors, shared, capability, out), list(out)

    def mask_pool(
        self,
        logits: np.ndarray,
        features: np.ndarray,
        *,
        multiprocessors: int = 3,
        shared_limit: int = 101_376,
        capability: int = 90,
        late: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pooled (B, Q, C) of the features' type and areas (B, Q); everything they are written to is NaN before."""
        batch, queries = logits.shape[:2]
        channels, pixels = features.shape[1], int(np.prod(logits.shape[2:]))
        kind = DTYPES[features.dtype]
        _, plan = self.pool_plan(kind, batch, queries, channels, pixels, multiprocessors, shared_limit, capability)
        workspace = aligned_empty(plan[8])
        workspace.fill(0xFF)
        pooled = np.full((batch, queries, channels), 0x7FFF if kind == 2 else np.nan, features.dtype)
        areas = np.full((batch, queries), -7, np.int32)
        status = self._call(
            "emulate_mask_pool", kind, _at(logits), _at(features), ctypes.c_int64(batch), queries, channels, pixels,
            multiprocessors, shared_limit, capability, int(late), ctypes.c_int64(0), ctypes.c_int64(-1),
            _at(workspace), _at(pooled), _at(areas),
        )  # fmt: skip
        assert status == 0, status
        return pooled, areas

    def pool_one_split(
        self, logits: np.ndarray, features: np.ndarray, multiprocessors: int, split: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Sums (Q, C) and counts (Q,) of one split of a batch of one, and the plan."""
        queries, channels, pixels = logits.shape[1], features.shape[1], int(np.prod(logits.shape[2:]))
        kind = DTYPES[features.dtype]
        _, plan = self.pool_plan(kind, 1, queries, channels, pixels, multiprocessors, 101_376, 90)
        workspace = aligned_empty(plan[8])
        status = self._call(
            "emulate_mask_pool", kind, _at(logits), _at(features), ctypes.c_int64(1), queries, channels, pixels,
            multiprocessors, 101_376, 90, 0, ctypes.c_int64(split), ctypes.c_int64(split + 1), _at(workspace), None,
            None,
        )  # fmt: skip
        assert status == 0, status
        splits = plan[3]
        sums = workspace[: plan[9]].view(np.float32).reshape(splits, queries, channels)[split]
        counts = workspace[plan[9] :].view(np.int32).reshape(splits, queries)[split]
        return sums.copy(), counts.copy(), plan

    def merge_tables(
        self, cells: tuple[int, int], test: tuple[int, int], original: tuple[int, int], queries: int, stride: int = 4
    ) -> tuple[np.ndarray, ...]:
        """Row table (first, weights), column table (first, weights), cleared areas."""
        row_first, column_first = (np.full(n, -9, np.int32) for n in original)
        row_weights, column_weights = (np.full((3, n), np.nan, np.float32) for n in original)
        areas = np.full((3, queries), -9, np.int32)
        arrays = (row_first, row_weights, column_first, column_weights, areas)
        status = self._call(
            "emulate_merge_prepare", *cells, stride, *test, *original, queries, *(_at(a) for a in arrays)
        )
        assert status == 0, status
        return arrays

    def panoptic_merge(
        self, logits: np.ndarray, scores: np.ndarray, test: tuple[int, int], original: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Owner (h, w) and areas (3, Q)."""
        cells = (logits.shape[1], logits.shape[2])
        row_first, row_weights, column_first, column_weights, areas = self.merge_tables(
            cells, test, original, len(logits)
        )
        owner = np.full(original, -77, np.int16)
        narrow = scores.astype(np.float32)
        status = self._call(
            "emulate_panoptic_merge", DTYPES[logits.dtype], _at(logits), _at(narrow), len(logits),
            *cells, _at(row_first), _at(row_weights), original[0], _at(column_first), _at(column_weights), original[1],
            _at(owner), _at(areas),
        )  # fmt: skip
        assert status == 0, status
        return owner, areas

    def deformable_attention(
        self,
        value: np.ndarray,
        shapes: list[tuple[int, int]],
        references: np.ndarray,
        offsets: np.ndarray,
        weight_logits: np.ndarray,
        out: np.ndarray | None = None,
        blocks: tuple[int, int] = (0, -1),
    ) -> np.ndarray:
        """(B, M, heads, C); ``blocks`` limits the grid, for arrays too large to go over."""
        batch, queries, heads, _, points, _ = offsets.shape
        channels = value.shape[3]
        if out is None:
            poison = 0x7FFF if value.dtype == np.uint16 else np.nan
            out = np.full((batch, queries, heads, channels), poison, value.dtype)
        sizes = (ctypes.c_int32 * 7)(batch, queries, value.shape[1], heads, channels, points, len(references))
        levels = (ctypes.c_int64 * 9)(len(shapes), *(height << 32 | width for height, width in shapes))
        status = self._call(
            "emulate_deformable_attention", DTYPES[value.dtype], _at(value), _at(references), _at(offsets),
            _at(weight_logits), sizes, levels, _at(out), *(ctypes.c_int64(b) for b in blocks),
        )  # fmt: skip
        assert status == 0, status
        return out

    def resize(self, pixels: np.ndarray, size: tuple[int, int], canvas_size: tuple[int, int]) -> np.ndarray:
        """Canvas (3, H, W) of pixels (h, w, 3); everything they are written to is filled with other values before."""
        height, width = pixels.shape[:2]
        down, across = (resize_table(*lengths) for lengths in zip(size, (height, width), strict=True))
        between = np.full((height, size[1], 3), 77, np.uint8)
        canvas = np.full((3, *canvas_size), np.nan, np.float32)
        status = self._call(
            "emulate_image_across", _at(pixels), height, width, _at(across.first), _at(across.weights), across.taps,
            size[1], _at(between),
        )  # fmt: skip
        assert status == 0, status
        status = self._call(
            "emulate_image_down", _at(between), size[1], _at(down.first), _at(down.weights), down.taps, size[0],
            *canvas_size, _at(canvas),
        )  # fmt: skip
        assert status == 0, status
        return canvas

    def cut_windows(self, canvas: np.ndarray, side: tuple[int, int], start: int, count: int) -> np.ndarray:
        """Windows (count, C, sh, sw) of a canvas (C, H, W)."""
        layout = WindowLayout(canvas.shape[1:], side)
        windows = np.full((count, len(canvas), *side), np.nan, np.float32)
        sizes = (len(canvas), *layout.numbers(), start, count)
        assert self._call("emulate_image_cut", _at(canvas), *sizes, _at(windows)) == 0
        return windows

    def stitch_windows(self, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Canvas (C, H, W) of all its windows."""
        layout = WindowLayout(size, windows.shape[2:])
        canvas = np.full((windows.shape[1], *size), np.nan, np.float32)
        sizes = (windows.shape[1], *layout.numbers())
        assert self._call("emulate_image_stitch", _at(windows), *sizes, _at(canvas)) == 0
        return canvas

    def text_cosines(self, embeddings: np.ndarray, texts: np.ndarray, scale: float) -> np.ndarray:
        """Cosines (Q, L) times ``scale``."""
        (queries, channels), words = embeddings.shape, len(texts)
        cosines = np.full((queries, words), np.nan, np.float32)
        sizes = (queries, channels, words)
        assert (
            self._call("emulate_name_cosines", _at(embeddings), _at(texts), ctypes.c_float(scale), *sizes, _at(cosines))
            == 0
        )
        return cosines

    def launch_classes(self, call: ClassesCall) -> None:
        """See :class:`NamingCalls`."""
        (queries, words), classes, best = call.inputs[1].shape, len(call.inputs[3]), call.out[3].shape[1]
        objects = None if call.object_logits is None else _at(call.object_logits)
        status = self._call(
            "emulate_name_classes", *map(_at, call.inputs), objects, _at(call.thresholds), queries, words, classes,
            best, int(call.rank_all), int(call.with_unknown), *map(_at, call.out),
        )  # fmt: skip
        assert status == 0, status

    def launch_segments(
        self, inputs: Sequence[np.ndarray], made: Sequence[np.ndarray], owner: np.ndarray, segment_map: np.ndarray
    ) -> None:
        """See :class:`NamingCalls`."""
        queries, (ids, count, *_, facts) = len(inputs[0]), made
        status = self._call("emulate_name_choose", *map(_at, inputs), queries, *map(_at, made))
        assert status == 0, status
        status = self._call(
            "emulate_name_paint", _at(owner), _at(ids), _at(count), queries, *owner.shape, _at(facts), _at(segment_map)
        )
        assert status == 0, status

    def launch(self, kernel: str, arguments: tuple[Any, ...]) -> None:
        """Run a kernel by the name and arguments that cuda-core is given: pointers as int, numbers as numpy's."""
        prefix, _, suffix = kernel.rpartition("_")
        first: list[object] = []
        if prefix == "odise_merge" and suffix in ("f32", "f16", "bf16"):
            name, first = "panoptic_merge", [("f32", "f16", "bf16").index(suffix)]
        else:
            name = kernel.removeprefix("odise_")
        types = {
            int: ctypes.c_void_p, np.int32: ctypes.c_int32, np.int64: ctypes.c_int64,
            np.float32: ctypes.c_float,
        }  # fmt: skip
        status = self._call(f"emulate_{name}", *first, *(types[type(a)](a) for a in arguments))
        assert status == 0, f"{kernel} returned {status}"

    def convert(self, bits: np.ndarray, floats: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """16-bit patterns to float32, and float32 to 16-bit patterns; ``kind`` is 1 for float16, 2 for bfloat16."""
        widened, narrowed = np.empty(bits.shape, np.float32), np.empty(bits.shape, np.uint16)
        self._library.emulate_convert(
            kind, _at(bits), _at(widened), _at(floats), _at(narrowed), ctypes.c_int64(bits.size)
        )
        return widened, narrowed


def aligned_empty(size: int, multiple: int = 16) -> np.ndarray:
    """uint8 array at a multiple of so many bytes; of 16, as the workspace must be."""
    memory = np.empty(size + multiple, np.uint8)
    start = -memory.ctypes.data % multiple
    return memory[start : start + size]


def _at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
