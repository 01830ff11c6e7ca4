"""The kernels as nvcc compiles them, launched by the runtime's own code and run by the machine of ``ptx.py``.

It is called as :class:`tests.odise_rt.kernels.emulated.Emulation` is, which runs the kernels' source: so tests hold
both to the same definitions. What this one adds is what the compiler made of the source, the instructions that only a
GPU has, how the threads of a block work together, and whether every launch fits its kernel.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.kernels.launch_plans import FLOAT32, GpuFacts, Launch, plan_panoptic_merge
from odise_rt.kernels.naming import ClassArrays, NamingKernels, SegmentArrays
from odise_rt.kernels.native import MODULES, Kernels
from odise_rt.kernels.resize_tables import resize_table
from odise_rt.specs import MASK_STRIDE
from tests.odise_rt.kernels.builds import HERE, KERNELS, cached, library
from tests.odise_rt.kernels.emulated import Emulation, aligned_empty
from tests.odise_rt.kernels.naming_calls import ClassesCall, NamingCalls
from tests.odise_rt.kernels.ptx import Counts, Entry, Machine, Reader

STREAM = 0
NEWER = pytest.param("sm_100", marks=pytest.mark.slow)
"""Of another generation of nvcc's first half, so all of its PTX differs; sm_120 has the same."""
MACHINE_SOURCE = HERE / "ptx_machine.cpp"
MACHINE_FLAGS = ("-ffp-contract=off", "-frounding-math", "-fwrapv")
NO_NUMBER = {np.dtype(np.uint16): 0x7FFF}
"""In the bits of bfloat16; NaN elsewhere."""


def nvcc() -> str | None:
    """The compiler of CUDA."""
    return shutil.which("nvcc")


def build(folder: Path, capability: int) -> dict[str, Reader]:
    """The machine, and PTX of every kernel for GPUs of a compute capability (90 for 9.0)."""
    machine = Machine(library(folder, MACHINE_SOURCE, flags=MACHINE_FLAGS))
    readers = {}
    for module in MODULES:
        source = KERNELS / f"{module}.cu"
        command = [nvcc() or "nvcc", "-std=c++17", "-O3", "-ptx", f"-arch=compute_{capability}", str(source)]
        file = cached(folder, f"{module}-{capability}.ptx", command, [source, *sorted(KERNELS.glob("*.cuh"))])
        reader = Reader(file.read_text(), machine)
        readers |= dict.fromkeys(reader.names, reader)
    return readers


class PtxKernels(Kernels):
    """The runtime's launches for one compute capability, on arrays of the host."""

    def __init__(self, folder: Path, capability: int) -> None:
        """Compile what is not there yet."""
        self._readers = build(folder, capability)
        self.gpu = GpuFacts(3, 101_376, capability)
        self.options: dict[str, Any] = {}
        """Of :meth:`tests.odise_rt.kernels.ptx.Machine.run`, for every launch."""
        self.instead: dict[str, Entry] = {}
        """Other kernels of some names."""
        self.launched: list[tuple[Launch, Counts]] = []
        self._arrays: list[np.ndarray] = []

    def launch(self, plan: Launch, stream: Any, *arguments: Any) -> None:
        """Run a kernel on the arrays that were last put on the GPU."""
        self.launched.append((plan, self.run(plan, arguments, self._arrays)))

    def run(self, plan: Launch, arguments: Sequence[Any], memory: Sequence[np.ndarray], **options: Any) -> Counts:
        """Run a kernel on all of the memory that there is; options as those of all launches."""
        entry = self.instead.get(plan.kernel) or self.entry(plan.kernel)
        return self.machine.run(
            entry, plan.grid, plan.threads, plan.shared_bytes, arguments, memory, **{**self.options, **options}
        )

    @property
    def machine(self) -> Machine:
        """What runs them."""
        return next(iter(self._readers.values())).machine

    def entry(self, kernel: str) -> Entry:
        """A kernel by its name."""
        return self._readers[kernel].entry(kernel)

    def places(self, kernel: str, op: str) -> list[int]:
        """Where a kernel has instructions of a name."""
        return [int(at) for at in np.flatnonzero(self.entry(kernel).program["op"] == self.machine.number("op", op))]

    def put(self, *arrays: np.ndarray) -> list[DeviceArray]:
        """Arrays as the runtime gets them from a GPU. The next launches may touch these and no others."""
        assert all(array.flags.c_contiguous for array in arrays)
        self._arrays = list(arrays)
        return [DeviceArray(a.ctypes.data, a.shape, a.dtype, a) for a in arrays]


class Compiled(NamingCalls):
    """Calls the kernels as tests call the emulation; results are filled with other values before."""

    def __init__(self, kernels: PtxKernels) -> None:
        self.kernels = kernels
        self.alignment = 16
        """Bytes: where results and workspaces begin. More than they need would hide that they need more."""
        self._naming = NamingKernels(kernels)

    def full(self, shape: int | tuple[int, ...], value: float, dtype: Any) -> np.ndarray:
        """As numpy's, where memory of a GPU may begin."""
        filled = (
            aligned_empty(int(np.prod(shape)) * np.dtype(dtype).itemsize, self.alignment).view(dtype).reshape(shape)
        )
        filled.fill(value)
        return filled

    def mask_pool(
        self,
        logits: np.ndarray,
        features: np.ndarray,
        *,
        multiprocessors: int = 3,
        shared_limit: int = 101_376,
        **_: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pooled (B, Q, C) of the features' type and areas (B, Q)."""
        self.kernels.gpu = GpuFacts(multiprocessors, shared_limit, self.kernels.gpu.compute_capability)
        pooled = self.full(
            (*logits.shape[:2], features.shape[1]), NO_NUMBER.get(features.dtype, np.nan), features.dtype
        )
        areas = self.full(logits.shape[:2], -7, np.int32)
        workspace = aligned_empty(self.kernels.mask_pool_workspace(*self.kernels.put(logits, features)), self.alignment)
        workspace.fill(0xFF)
        self.kernels.mask_pool(*self.kernels.put(logits, features, workspace, pooled, areas), STREAM)
        return pooled, areas

    def panoptic_merge(
        self, logits: np.ndarray, scores: np.ndarray, test: tuple[int, int], original: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Owner (h, w) and areas (3, Q)."""
        tables = [self.full(shape, -9, kind) for n in original for shape, kind in ((n, np.int32), ((3, n), np.float32))]
        owner, areas = self.full(original, -77, np.int16), self.full((3, len(logits)), -9, np.int32)
        masks, score, first, weights, columns, column_weights, *out = self.kernels.put(
            logits, scores.astype(np.float32), *tables, owner, areas
        )
        self.kernels.panoptic_merge(masks, score, test, (first, weights, columns, column_weights), *out, STREAM)
        return owner, areas

    def merge_tables(
        self, cells: tuple[int, int], test: tuple[int, int], original: tuple[int, int], queries: int
    ) -> tuple[np.ndarray, ...]:
        """Row table (first, weights), column table (first, weights), cleared areas."""
        rows, columns = original
        arrays = (
            self.full(rows, -9, np.int32), self.full((3, rows), np.nan, np.float32),
            self.full(columns, -9, np.int32), self.full((3, columns), np.nan, np.float32),
            self.full((3, queries), -9, np.int32),
        )  # fmt: skip
        plan = plan_panoptic_merge(FLOAT32, queries, cells, test, original, MASK_STRIDE).prepare
        sizes = map(np.int32, (*cells, MASK_STRIDE, *test, *original, queries))
        self.kernels.launch(plan, STREAM, *sizes, *(array.pointer for array in self.kernels.put(*arrays)))
        return arrays

    def deformable_attention(
        self,
        value: np.ndarray,
        shapes: list[tuple[int, int]],
        references: np.ndarray,
        offsets: np.ndarray,
        weight_logits: np.ndarray,
    ) -> np.ndarray:
        """(B, M, heads, C)."""
        batch, queries, heads, *_ = offsets.shape
        out = self.full((batch, queries, heads, value.shape[3]), NO_NUMBER.get(value.dtype, np.nan), value.dtype)
        values, *rest = self.kernels.put(value, references, offsets, weight_logits, out)
        self.kernels.deformable_attention(values, shapes, *rest, STREAM)
        return out

    def resize(self, pixels: np.ndarray, size: tuple[int, int], canvas_size: tuple[int, int]) -> np.ndarray:
        """Canvas (3, H, W) of pixels (h, w, 3)."""
        down, across = (resize_table(*lengths) for lengths in zip(size, pixels.shape[:2], strict=True))
        between = self.full((pixels.shape[0], size[1], 3), 77, np.uint8)
        canvas = self.full((3, *canvas_size), np.nan, np.float32)
        source, half, out, *tables = self.kernels.put(
            pixels, between, canvas, across.first, across.weights, down.first, down.weights
        )
        self.kernels.resize(source, (tables[0], tables[1]), half, (tables[2], tables[3]), out, STREAM)
        return canvas

    def cut_windows(self, canvas: np.ndarray, side: tuple[int, int], start: int, count: int) -> np.ndarray:
        """Windows (count, C, sh, sw) of a canvas (C, H, W)."""
        windows = self.full((count, len(canvas), *side), np.nan, np.float32)
        source, out = self.kernels.put(canvas, windows)
        self.kernels.cut_windows(source, start, out, STREAM)
        return windows

    def stitch_windows(self, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Canvas (C, H, W) of all its windows."""
        canvas = self.full((windows.shape[1], *size), np.nan, np.float32)
        self.kernels.stitch_windows(*self.kernels.put(windows, canvas), STREAM)
        return canvas

    def text_cosines(self, embeddings: np.ndarray, texts: np.ndarray, scale: float) -> np.ndarray:
        """Cosines (Q, L) times ``scale``."""
        cosines = self.full((len(embeddings), len(texts)), np.nan, np.float32)
        masks, words, out = self.kernels.put(embeddings, texts, cosines)
        self._naming.text_cosines(masks, words, scale, out, STREAM)
        return cosines

    def launch_classes(self, call: ClassesCall) -> None:
        """See :class:`NamingCalls`."""
        objects = [] if call.object_logits is None else [call.object_logits]
        put, count = self.kernels.put(*call.out, *call.inputs, call.thresholds, *objects), len(call.out)
        made, (masks, clip, first, weight, limits, *rest) = ClassArrays(*put[:count]), put[count:]
        self._naming.name_classes(
            masks, clip, first, weight, rest[0] if rest else None, limits, made, STREAM, rank_all=call.rank_all,
            with_unknown=call.with_unknown,
        )  # fmt: skip

    def launch_segments(
        self, inputs: Sequence[np.ndarray], made: Sequence[np.ndarray], owner: np.ndarray, segment_map: np.ndarray
    ) -> None:
        """See :class:`NamingCalls`."""
        put = self.kernels.put(*inputs, *made, owner, segment_map)
        segments = SegmentArrays(*put[len(inputs) : -2])
        self._naming.choose_segments(*put[: len(inputs)], segments, STREAM)
        self._naming.paint_segments(put[-2], segments, put[-1], STREAM)


def chosen(request: pytest.FixtureRequest) -> Emulation | Compiled:
    """What the parameter of a fixture names: ``"source"``, or an architecture such as ``"sm_90"``."""
    if request.param == "source":
        return request.getfixturevalue("emulation")
    return request.getfixturevalue("compiled_for")(int(request.param.removeprefix("sm_")))
