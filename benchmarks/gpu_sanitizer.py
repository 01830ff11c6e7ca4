"""The kernels under NVIDIA's compute-sanitizer, which sees what no comparison of results does.

It watches every access to memory (``memcheck``), races between threads of a block on its shared memory
(``racecheck``), barriers that not all threads reach (``synccheck``) and device memory that is read before anything was
written (``initcheck``). What it watches is this module run as a program: every kernel on small, uneven inputs, without
PyTorch, whose own kernels would take most of the time.

    compute-sanitizer --tool racecheck python -m benchmarks.gpu_sanitizer
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_rows import Emit, Row, end_group
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.backends.device_memory import DeviceMemory
from odise_rt.kernels.launch_plans import Launch
from odise_rt.kernels.naming import ClassArrays, NamingKernels, SegmentArrays
from odise_rt.kernels.native import Kernels
from odise_rt.kernels.resize_tables import resize_table

TOOLS = {"racecheck": 0.4, "memcheck": 0.2, "synccheck": 0.2, "initcheck": 0.2}
"""Share of the time of each."""
TYPES = ("float32", "float16", "uint16")
"""Types that the kernels take; uint16 are the bits of bfloat16."""
POOL_SIZES = [(2, 40, 33, 9, 7), (1, 115, 300, 40, 41), (1, 20, 64, 16, 16), (1, 1, 1, 1, 1)]
"""B, Q, C, H, W: both heights of a tile, more tiles than one, rows that are aligned and rows that are not."""
MERGE_SIZES = [(33, (16, 12), (61, 45), (77, 131)), (1, (1, 1), (3, 2), (5, 9)), (300, (8, 8), (32, 32), (40, 40))]
"""Q, cells, network size, original size."""
ATTENTION_SIZES = [
    (2, 77, 4, 16, 4, [(3, 4), (6, 8)]),
    (1, 5, 3, 5, 3, [(7, 5)]),
    (1, 70, 2, 8, 2, [(3, 4)] * 8),
]
"""B, M, heads, channels, points, levels."""
IMAGE_SIZES = [((50, 90), (64, 115), (64, 128), 64), ((130, 70), (65, 35), (96, 64), 64), ((1, 1), (3, 5), (8, 8), 8)]
"""Pixels, size in the network, canvas, side of a window."""
NAMING_SIZES = [(40, 33, 70, 90, (33, 70), 5), (1, 5, 3, 1, (1, 1), 0), (300, 64, 64, 700, (64, 64), 5)]
"""Q, channels of the mask classifier and of CLIP, words, size of the result, names that are ranked."""
FINDING = re.compile(
    r"=========\s+(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application|Saved host)(\S.*)"
)
UNSUPPORTED = "Device not supported"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def check(emit: Emit, seconds: float) -> None:
    """A row for each tool, or one that says that there is none.

    Args:
        emit: receives the rows.
        seconds: for all of them together.
    """
    sanitizer = find_sanitizer()
    if sanitizer is None:
        detail = "compute-sanitizer is not on the PATH; it comes with CUDA's toolkit"
        emit(Row("sanitizer", "compute-sanitizer", "missing", "correctness", detail=detail))
        return
    for tool, share in TOOLS.items():
        command = [sanitizer, "--tool", tool, sys.executable, "-m", "benchmarks.gpu_sanitizer"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            try:
                output = process.communicate(timeout=seconds * share)[0]
            except subprocess.TimeoutExpired:
                emit(Row("sanitizer", tool, "late", "correctness", detail=f"not over in {seconds * share:.0f} s"))
                continue
            finally:
                end_group(process)
        emit(verdict(tool, process.returncode, output))


def find_sanitizer() -> str | None:
    """The program: of the PATH, or beside nvcc, where CUDA's toolkit puts it."""
    found = shutil.which("compute-sanitizer")
    compiler = shutil.which("nvcc")
    if found is None and compiler is not None:
        beside = Path(compiler).resolve().with_name("compute-sanitizer")
        found = str(beside) if beside.is_file() else None
    return found


def verdict(tool: str, status: int, output: str) -> Row:
    """What a tool said, as a row.

    Args:
        tool: its name.
        status: of the process.
        output: all that was printed.
    """
    if UNSUPPORTED in output:
        detail = "compute-sanitizer does not support this device; virtual machines may hide what it needs"
        return Row("sanitizer", tool, "missing", "correctness", detail=detail)
    summaries = [int(number) for number in SUMMARY.findall(output)]
    launched = re.search(r"launched (\d+) kernels", output)
    if not summaries or launched is None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        said = lines[-1][:200] if lines else "nothing"
        return Row("sanitizer", tool, "error", "correctness", detail=f"it broke off with status {status}: {said}")
    values: dict[str, float | int | str] = {"findings": sum(summaries), "launches": int(launched[1])}
    good = sum(summaries) == 0 and status == 0
    first = FINDING.search(output)
    detail = "" if good else (first[1].strip()[:200] if first else f"status {status}")
    return Row("sanitizer", tool, "pass" if good else "fail", "correctness", values, detail)


class CountingKernels(Kernels):
    """Kernels that count their launches."""

    launches = 0

    def launch(self, plan: Launch, stream: Any, *arguments: Any) -> None:
        """See :meth:`Kernels.launch`."""
        self.launches += 1
        super().launch(plan, stream, *arguments)


class Launches:
    """Every kernel, small, on random data."""

    def __init__(self, kernels: Kernels, session: CudaSession, memory: DeviceMemory) -> None:
        """Set up.

        Args:
            kernels: on the GPU of the session.
            session: gives the stream.
            memory: holds inputs and results until it is closed.
        """
        self._kernels, self._stream, self._memory = kernels, session.stream, memory
        self._random = np.random.default_rng(0)

    def all(self) -> Iterator[Callable[[], None]]:
        """One call for each set of sizes; each launches one kernel or a few."""
        for dtype in TYPES:
            yield from (partial(self._pool, dtype, *size) for size in POOL_SIZES)
            yield from (partial(self._merge, dtype, *size) for size in MERGE_SIZES)
            yield from (partial(self._attention, dtype, *size) for size in ATTENTION_SIZES)
        yield from (partial(self._image, *size) for size in IMAGE_SIZES)
        yield from (partial(self._naming, *size, caption) for size in NAMING_SIZES for caption in (False, True))

    def _put(self, values: np.ndarray, dtype: str = "float32") -> DeviceArray:
        if dtype == "uint16":
            return self._memory.upload((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
        return self._memory.upload(np.ascontiguousarray(values.astype(dtype)))

    def _normal(self, *shape: int, dtype: str = "float32") -> DeviceArray:
        return self._put(self._random.normal(size=shape), dtype)

    def _pool(self, dtype: str, batch: int, queries: int, channels: int, height: int, width: int) -> None:
        logits = self._normal(batch, queries, height, width, dtype=dtype)
        features = self._normal(batch, channels, height, width, dtype=dtype)
        workspace = self._memory.array((self._kernels.mask_pool_workspace(logits, features),), "uint8")
        pooled = self._memory.array((batch, queries, channels), dtype)
        areas = self._memory.array((batch, queries), "int32")
        self._kernels.mask_pool(logits, features, workspace, pooled, areas, self._stream)

    def _merge(
        self, dtype: str, queries: int, cells: tuple[int, int], test: tuple[int, int], result: tuple[int, int]
    ) -> None:
        new = self._memory.array
        scores = self._put(np.where(np.arange(queries) % 7 == 6, 0, self._random.uniform(0.05, 1, queries)))
        tables = (
            new(result[:1], "int32"), new((3, result[0])), new(result[1:], "int32"), new((3, result[1]))
        )  # fmt: skip
        self._kernels.panoptic_merge(
            self._normal(queries, *cells, dtype=dtype), scores, test, tables, new(result, "int16"),
            new((3, queries), "int32"), self._stream,
        )  # fmt: skip

    def _attention(
        self,
        dtype: str,
        batch: int,
        queries: int,
        heads: int,
        channels: int,
        points: int,
        levels: list[tuple[int, int]],
    ) -> None:
        value = self._normal(batch, sum(h * w for h, w in levels), heads, channels, dtype=dtype)
        offsets = self._put(3 * self._random.normal(size=(batch, queries, heads, len(levels), points, 2)), dtype)
        weights = self._normal(batch, queries, heads, len(levels) * points, dtype=dtype)
        out = self._memory.array((batch, queries, heads, channels), dtype)
        references = self._put(self._random.random((1, queries, 2)))
        self._kernels.deformable_attention(value, levels, references, offsets, weights, out, self._stream)

    def _image(self, pixels: tuple[int, int], size: tuple[int, int], canvas_size: tuple[int, int], side: int) -> None:
        new, kernels, stream = self._memory.array, self._kernels, self._stream
        down, across = (
            (self._memory.upload(table.first), self._memory.upload(table.weights))
            for table in (resize_table(target, source) for target, source in zip(size, pixels, strict=True))
        )
        image = self._put(self._random.integers(0, 256, (*pixels, 3)), "uint8")
        canvas = new((3, *canvas_size))
        kernels.resize(image, across, new((pixels[0], size[1], 3), "uint8"), down, canvas, stream)
        count = -(-canvas_size[0] // side) * -(-canvas_size[1] // side)
        windows = new((count, 3, side, side))
        kernels.cut_windows(canvas, 0, windows, stream)
        kernels.stitch_windows(windows, new((3, *canvas_size)), stream)

    def _naming(
        self,
        queries: int,
        channels: int,
        clip_channels: int,
        words: int,
        shape: tuple[int, int],
        best: int,
        caption: bool,
    ) -> None:
        new, naming, stream = self._memory.array, NamingKernels(self._kernels), self._stream
        mask_words, classes = words + (not caption), -(-words // 2)
        cosines = new((queries, mask_words)), new((queries, words))
        for out, width in zip(cosines, (channels, clip_channels), strict=True):
            naming.text_cosines(self._normal(queries, width), self._normal(out.shape[1], width), 3.0, out, stream)
        named = ClassArrays(
            new((queries, classes + 2)), new((queries,), "int32"), new((queries,)),
            new((queries, min(best, classes)), "int32"), new((queries, min(best, classes), 3)),
        )  # fmt: skip
        naming.name_classes(
            *cosines, self._put(np.append(np.arange(0, words, 2), words), "int32"), self._put(np.full(classes, 0.4)),
            self._normal(queries, 2) if caption else None, self._put(np.array([0.1, 0.0])), named, stream,
            rank_all=True, with_unknown=True,
        )  # fmt: skip
        segments = SegmentArrays(
            new((queries,), "int32"), new((2,), "int32"), new((queries,), "int32"), new((queries,), "int32"),
            new((queries,)), new((5, queries), "int32"),
        )  # fmt: skip
        owner = self._random.integers(-1, queries, shape)
        kept = np.bincount(owner.ravel() + 1, minlength=queries + 1)[1:]
        things = self._put(np.arange(classes + 1) % 2, "uint8")
        naming.choose_segments(
            named.labels, named.scores, self._put(np.stack([kept + 1, kept, kept]), "int32"), things,
            self._put(np.array([0.5]), "float64"), segments, stream,
        )  # fmt: skip
        naming.paint_segments(self._put(owner, "int16"), segments, new(shape, "int32"), stream)


def main() -> int:
    """Launch everything once, and wait."""
    kernels = CountingKernels()
    with CudaSession() as session:
        memory = DeviceMemory(session)
        try:
            for call in Launches(kernels, session, memory).all():
                call()
            session.stream.sync()
        finally:
            memory.close()
    print(f"launched {kernels.launches} kernels")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
