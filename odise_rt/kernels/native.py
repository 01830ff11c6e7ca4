"""Loads the compiled kernels and launches them on arrays that lie on a GPU already.

``make kernels`` compiles the sources to fatbins, which cuda-core loads; nothing of that happens on import. Arrays are
anything that offers ``__cuda_array_interface__`` or DLPack (torch, CuPy, pycuda, cuda-core's own), contiguous;
bfloat16 comes as its bits, uint16 (``tensor.view(torch.uint16)``), or however the library names it. Work is put on the
stream that is given and not waited for; nothing is allocated: results and workspace are the caller's.

Tests hold what cuda-core tells the driver to launch to what was meant, argument by argument. A launch has not been run
where this was written, for want of a GPU: ``python -m benchmarks.gpu_check`` does that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.backends.cuda_core import checked, cuda_errors, import_cuda_core
from odise_rt.backends.device_arrays import DeviceArray, as_device_array, is_dense
from odise_rt.errors import BackendError, MissingPackageError, first_line
from odise_rt.kernels.launch_plans import (
    ATTENTION_LEVELS,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GpuFacts,
    Launch,
    MaskPoolPlan,
    WindowLayout,
    plan_cut_windows,
    plan_deformable_attention,
    plan_mask_pool,
    plan_panoptic_merge,
    plan_resize,
    plan_stitch_windows,
)
from odise_rt.kernels.sources import HERE, why_stale
from odise_rt.specs import MASK_STRIDE

MODULES = {
    "mask_pooling": "odise_pool_finish_f32",
    "panoptic_merge": "odise_merge_prepare",
    "deformable_attention": "odise_attention_f32_1",
    "image_windows": "odise_image_cut",
    "naming": "odise_name_choose",
}
"""Compiled files, each with one of its kernels."""
FOLDER_VARIABLE = "ODISE_RT_KERNELS_DIR"
_PREFIXES = {
    "odise_pool": "mask_pooling",
    "odise_merge": "panoptic_merge",
    "odise_attention": "deformable_attention",
    "odise_image": "image_windows",
    "odise_name": "naming",
}
_DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "uint16": BFLOAT16, "bfloat16": BFLOAT16, "void16": BFLOAT16}


def kernel_file(name: str) -> Path:
    """A compiled kernel file, e.g. ``"mask_pooling.fatbin"``.

    Looked for in ``$ODISE_RT_KERNELS_DIR`` if that is set, else beside this module, where wheels have it, and in
    ``build/kernels`` of a checkout.

    Raises:
        BackendError: it is in none of them, or was compiled from other sources; the message says how to build it.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(chosen)] if chosen else [HERE, HERE.parents[1] / "build" / "kernels"]
    for folder in folders:
        if (folder / name).is_file():
            if (reason := why_stale(folder)) is not None:
                raise BackendError(
                    f"the CUDA kernels in {folder} are not used: {reason}; run `make kernels` in the checkout of this "
                    "version"
                )
            return folder / name
    raise BackendError(
        f"the CUDA kernels are not built: no {name} in {' or '.join(str(f) for f in folders)}; run `make kernels` in a "
        f"checkout (needs nvcc, no GPU) and set {FOLDER_VARIABLE} to its build/kernels"
    )


def kernel_folder() -> Path:
    """Where all compiled kernels are.

    Raises:
        BackendError: as for :func:`kernel_file`.
    """
    files = [kernel_file(f"{name}.fatbin") for name in MODULES]
    return files[0].parent


def why_no_kernels() -> str | None:
    """What is missing for the kernels, which must be built, and for cuda-core, or ``None``; no GPU is looked for."""
    try:
        import_cuda_core()
        kernel_folder()
    except (BackendError, MissingPackageError) as exc:
        return str(exc)
    return None


def gpu_array(value: object, name: str) -> DeviceArray:
    """View an array without a copy. The producer's work is not waited for: order streams before.

    Raises:
        BackendError: it is no array on a GPU, or not contiguous.
    """
    if isinstance(value, DeviceArray):
        return value
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except (AttributeError, RuntimeError, TypeError) as exc:  # torch: on the CPU, or with a gradient
        raise BackendError(f"{name} cannot be read on a GPU: {exc}") from exc
    if interface is None:
        array = as_device_array(value, stream=-1)
        if array is None:
            raise BackendError(
                f"{name} came as {type(value).__name__}: expected an array on a GPU, with __cuda_array_interface__ or "
                "DLPack"
            )
        return array
    shape, dtype = tuple(int(n) for n in interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None and not is_dense(shape, [int(s) // dtype.itemsize for s in strides]):
        raise BackendError(
            f"{name} of shape {shape} has strides {strides} in bytes: expected a C-contiguous array; copy it first"
        )
    return DeviceArray(int(interface["data"][0]), shape, dtype, value)


class Kernels:
    """The kernels on one GPU. Threads may share it; each call only launches."""

    def __init__(self, device_id: int = 0) -> None:
        """Load the fatbins.

        Raises:
            MissingPackageError: cuda-core is not installed.
            BackendError: there is no GPU that works, or the kernels are not built or do not fit it.
        """
        self._core = import_cuda_core()
        try:
            self._device = self._core.Device(device_id)
            self._device.set_current()
            properties, capability = self._device.properties, self._device.compute_capability
            self.gpu = GpuFacts(
                int(properties.multiprocessor_count),
                int(properties.max_shared_memory_per_block_optin),
                int(capability[0]) * 10 + int(capability[1]),
            )
        except Exception as exc:  # cuda-core raises many types, from the driver's and its own
            raise BackendError(
                f"GPU {device_id} cannot be used ({first_line(exc)}): check the NVIDIA driver with nvidia-smi, or run "
                "`odise-rt doctor`"
            ) from exc
        if self.gpu.compute_capability < 75:
            raise BackendError(
                f"GPU {device_id} has compute capability {self.gpu.compute_capability / 10}: the kernels need 7.5"
            )
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        for name, kernel in MODULES.items():
            file = kernel_file(f"{name}.fatbin")
            try:
                self._modules[name] = self._core.ObjectCode.from_fatbin(file.read_bytes(), name=name)
                self._modules[name].get_kernel(kernel)  # only this loads it
            except Exception as exc:  # of many types again
                raise BackendError(
                    f"the CUDA kernels in {file} do not run on GPU {device_id} of compute capability "
                    f"{self.gpu.compute_capability / 10} ({first_line(exc)}): update its driver, or run `make kernels` "
                    "in a checkout"
                ) from exc

    # ---- mask pooling ----------------------------------------------------------------------------------------------

    def mask_pool_workspace(self, logits: object, features: object) -> int:
        """Bytes of workspace that :meth:`mask_pool` needs for arrays of these shapes."""
        return self._pool_plan(gpu_array(logits, "logits"), gpu_array(features, "features"))[0].workspace_bytes

    def mask_pool(
        self, logits: object, features: object, workspace: object, pooled: object, areas: object, stream: Any
    ) -> None:
        """Mean of the features under every mask; see :func:`odise_rt.kernels.reference.mask_pool`.

        Args:
            logits: (B, Q, H, W) of float32, float16 or bfloat16.
            features: (B, C, H, W) of the same type, finite.
            workspace: at least :meth:`mask_pool_workspace` bytes of any type, aligned to 16 bytes.
            pooled: (B, Q, C) of the same type; written.
            areas: int32 (B, Q); written.
            stream: of cuda-core, anything with ``__cuda_stream__``, or a handle as a number.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        a, b = gpu_array(logits, "logits"), gpu_array(features, "features")
        plan, dtype = self._pool_plan(a, b)
        (batch, queries), channels, pixels = a.shape[:2], b.shape[1], a.shape[2] * a.shape[3]
        work = gpu_array(workspace, "workspace")
        if work.nbytes < plan.workspace_bytes or work.pointer % 16:
            raise BackendError(
                f"mask_pool: the workspace has {work.nbytes} bytes at {work.pointer:#x}, expected "
                f"{plan.workspace_bytes} aligned to 16"
            )
        out = _expect(gpu_array(pooled, "pooled"), "pooled", (batch, queries, channels), dtype)
        count = expect_named(gpu_array(areas, "areas"), "areas", (batch, queries), "int32")
        counts = work.pointer + plan.counts_offset
        sizes = (queries, channels, pixels, plan.splits, plan.stages)
        self.launch(plan.sums, stream, a.pointer, b.pointer, *map(np.int32, sizes), work.pointer, counts)
        few = (queries, channels, plan.splits)
        self.launch(plan.finish, stream, work.pointer, counts, *map(np.int32, few), out.pointer, count.pointer)

    def _pool_plan(self, logits: DeviceArray, features: DeviceArray) -> tuple[MaskPoolPlan, int]:
        dtype = _dtype(features, "features")
        if len(logits.shape) != 4 or len(features.shape) != 4 or _dtype(logits, "logits") != dtype:
            raise BackendError(
                f"mask_pool: logits are {logits.dtype} {logits.shape} and features {features.dtype} {features.shape}, "
                "expected (B, Q, H, W) and (B, C, H, W) of one type"
            )
        if logits.shape[0] != features.shape[0] or logits.shape[2:] != features.shape[2:]:
            raise BackendError(
                f"mask_pool: logits {logits.shape} and features {features.shape} differ in batch, height or width"
            )
        (batch, queries, height, width), channels = logits.shape, features.shape[1]
        return plan_mask_pool(dtype, batch, queries, channels, height * width, self.gpu), dtype

    # ---- panoptic merge --------------------------------------------------------------------------------------------

    def panoptic_merge(
        self,
        logits: object,
        scores: object,
        network_size: tuple[int, int],
        tables: tuple[object, object, object, object],
        owner: object,
        areas: object,
        stream: Any,
    ) -> None:
        """Give every pixel to a mask; see :func:`odise_rt.kernels.reference.panoptic_merge`.

        Args:
            logits: (Q, mh, mw) of float32, float16 or bfloat16.
            scores: float32 (Q,), in (0, 1], at or below zero for masks that take no part.
            network_size: height and width of the unpadded image in the network.
            tables: scratch: int32 (h,), float32 (3, h), int32 (w,), float32 (3, w).
            owner: int16 (h, w); written.
            areas: int32 (3, Q); written.
            stream: as for :meth:`mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        masks, result = gpu_array(logits, "logits"), gpu_array(owner, "owner")
        dtype = _dtype(masks, "logits")
        if len(masks.shape) != 3 or len(result.shape) != 2:
            raise BackendError(
                f"panoptic_merge: logits are {masks.shape} and owner {result.shape}, expected (Q, mh, mw) and (h, w)"
            )
        queries, cells = masks.shape[0], (masks.shape[1], masks.shape[2])
        rows, columns = result.shape
        plan = plan_panoptic_merge(dtype, queries, cells, network_size, (rows, columns), MASK_STRIDE)
        expect_named(result, "owner", (rows, columns), "int16")
        score = expect_named(gpu_array(scores, "scores"), "scores", (queries,), "float32")
        area = expect_named(gpu_array(areas, "areas"), "areas", (3, queries), "int32")
        wanted = (("int32", (rows,)), ("float32", (3, rows)), ("int32", (columns,)), ("float32", (3, columns)))
        row_first, row_weights, column_first, column_weights = (
            expect_named(gpu_array(t, "tables"), "tables", shape, kind).pointer
            for t, (kind, shape) in zip(tables, wanted, strict=True)
        )
        sizes = (*cells, MASK_STRIDE, *network_size, rows, columns, queries)
        made = (row_first, row_weights, column_first, column_weights, area.pointer)
        self.launch(plan.prepare, stream, *map(np.int32, sizes), *made)
        self.launch(
            plan.merge, stream, masks.pointer, score.pointer, *map(np.int32, (queries, *cells)),
            row_first, row_weights, np.int32(rows), column_first, column_weights, np.int32(columns),
            result.pointer, area.pointer,
        )  # fmt: skip

    # ---- deformable attention --------------------------------------------------------------------------------------

    def deformable_attention(
        self,
        value: object,
        shapes: Sequence[tuple[int, int]],
        references: object,
        offsets: object,
        weight_logits: object,
        out: object,
        stream: Any,
    ) -> None:
        """Multi-scale deformable attention; see :func:`odise_rt.kernels.reference.deformable_attention`.

        Args:
            value: (B, N, heads, C) of float32, float16 or bfloat16.
            shapes: height and width of each level.
            references: float32 (1 or B, M, 2).
            offsets: (B, M, heads, levels, points, 2) of the type of ``value``.
            weight_logits: (B, M, heads, levels * points), likewise.
            out: (B, M, heads, C), likewise; written.
            stream: as for :meth:`mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        v, o = gpu_array(value, "value"), gpu_array(offsets, "offsets")
        dtype = _dtype(v, "value")
        memory = sum(h * w for h, w in shapes)
        if len(v.shape) != 4 or v.shape[1] != memory or len(o.shape) != 6:
            raise BackendError(
                f"deformable_attention: value is {v.shape} and offsets {o.shape}, expected (B, {memory}, heads, C) for "
                f"levels {list(shapes)} and (B, M, heads, levels, points, 2)"
            )
        batch, _, heads, channels = v.shape
        queries, points = o.shape[1], o.shape[4]
        _expect(o, "offsets", (batch, queries, heads, len(shapes), points, 2), dtype)
        samples = (batch, queries, heads, len(shapes) * points)
        logits = _expect(gpu_array(weight_logits, "weight_logits"), "weight_logits", samples, dtype)
        result = _expect(gpu_array(out, "out"), "out", (batch, queries, heads, channels), dtype)
        r = gpu_array(references, "references")
        expect_named(r, "references", (batch if r.shape[:1] == (batch,) else 1, queries, 2), "float32")
        aligned = (v.pointer | result.pointer) % 16 == 0
        launch = plan_deformable_attention(dtype, batch, queries, heads, channels, shapes, points, aligned)
        sizes = (batch, queries, memory, heads, channels, points, r.shape[0], len(shapes))
        packed = [h << 32 | w for h, w in shapes] + [0] * (ATTENTION_LEVELS - len(shapes))
        self.launch(
            launch, stream, v.pointer, r.pointer, o.pointer, logits.pointer, *map(np.int32, sizes),
            *map(np.int64, packed), result.pointer,
        )  # fmt: skip

    # ---- pixels and windows ----------------------------------------------------------------------------------------

    def resize(
        self,
        pixels: object,
        across: tuple[object, object],
        between: object,
        down: tuple[object, object],
        canvas: object,
        stream: Any,
    ) -> None:
        """Resize pixels as Pillow's bilinear filter does, scale them to [0, 1] and pad them with zeros.

        Args:
            pixels: uint8 (h, w, 3).
            across: :func:`odise_rt.kernels.resize_tables.resize_table` of the columns: int32 (tw,) and (taps, tw).
            between: scratch: uint8 (h, tw, 3).
            down: the table of the rows: int32 (th,) and (taps, th).
            canvas: float32 (3, H, W) with H >= th and W >= tw; written.
            stream: as for :meth:`mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        source, half, out = gpu_array(pixels, "pixels"), gpu_array(between, "between"), gpu_array(canvas, "canvas")
        if len(source.shape) != 3 or len(out.shape) != 3:
            raise BackendError(f"resize: pixels are {source.shape}, canvas {out.shape}, expected (h, w, 3), (3, H, W)")
        columns, rows = _resize_table(across, "across"), _resize_table(down, "down")
        height, width = source.shape[:2]
        plan = plan_resize((height, width), (rows[2], columns[2]), out.shape[1:])
        expect_named(source, "pixels", (height, width, 3), "uint8")
        expect_named(half, "between", (height, columns[2], 3), "uint8")
        expect_named(out, "canvas", (3, *out.shape[1:]), "float32")
        self.launch(
            plan.across, stream, source.pointer, *map(np.int32, (height, width)), *columns[:2],
            *map(np.int32, (columns[3], columns[2])), half.pointer,
        )  # fmt: skip
        self.launch(
            plan.down, stream, half.pointer, np.int32(columns[2]), *rows[:2],
            *map(np.int32, (rows[3], rows[2], *out.shape[1:])), out.pointer,
        )  # fmt: skip

    def cut_windows(self, canvas: object, start: int, windows: object, stream: Any) -> None:
        """Windows of a canvas from number ``start`` on, as :func:`odise_rt.windows.cut_windows` cuts them.

        Args:
            canvas: float32 (C, H, W).
            start: number of the first window, row by row.
            windows: float32 (n, C, sh, sw); written.
            stream: as for :meth:`mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        source, out, layout = _layout(gpu_array(canvas, "canvas"), gpu_array(windows, "windows"))
        plan = plan_cut_windows(layout, source.shape[0], start, out.shape[0])
        sizes = (source.shape[0], *layout.numbers(), start, out.shape[0])
        self.launch(plan, stream, source.pointer, *map(np.int32, sizes), out.pointer)

    def stitch_windows(self, windows: object, canvas: object, stream: Any) -> None:
        """All windows of a canvas put together, averaged where they overlap; see :class:`odise_rt.windows.Stitcher`.

        Args:
            windows: float32 (N, C, sh, sw), every window of the canvas row by row.
            canvas: float32 (C, H, W); written.
            stream: as for :meth:`mask_pool`.

        Raises:
            BackendError: a shape, type or size does not fit, or the launch failed.
        """
        out, source, layout = _layout(gpu_array(canvas, "canvas"), gpu_array(windows, "windows"))
        plan = plan_stitch_windows(layout, out.shape[0])
        if source.shape[0] != layout.down * layout.across:
            raise BackendError(f"stitch_windows: {source.shape[0]} windows, expected {layout.down} x {layout.across}")
        sizes = (out.shape[0], *layout.numbers())
        self.launch(plan, stream, source.pointer, *map(np.int32, sizes), out.pointer)

    # ---- launching -------------------------------------------------------------------------------------------------

    def launch(self, plan: Launch, stream: Any, *arguments: Any) -> None:
        """Put one kernel on a stream. A plain int is a pointer; numbers carry their numpy type.

        Raises:
            BackendError: the launch failed.
            OutOfMemoryError: the GPU has no memory for it: code is loaded with the first launch.
        """
        core = self._core
        with cuda_errors(f"kernel {plan.kernel} could not be launched"):
            self._device.set_current()
            kernel = self._kernel(plan)
            config = core.LaunchConfig(grid=plan.grid, block=plan.threads, shmem_size=plan.shared_bytes)
            core.launch(
                core.Stream.from_handle(stream) if isinstance(stream, int) else stream, config, kernel, *arguments
            )

    def _kernel(self, plan: Launch) -> Any:
        kernel = self._kernels.get(plan.kernel)
        if kernel is None:
            module = next(m for prefix, m in _PREFIXES.items() if plan.kernel.startswith(prefix))
            kernel = self._modules[module].get_kernel(plan.kernel)
            if plan.shared_bytes > 48 << 10:
                _allow_shared_memory(kernel, self.gpu.shared_limit, self._device.device_id)
            self._kernels[plan.kernel] = kernel
        return kernel


def _allow_shared_memory(kernel: Any, size: int, device_id: int) -> None:
    """Let a kernel ask for more than the 48 KiB that every block may have."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuKernelSetAttribute(attribute, size, driver.CUkernel(int(kernel.handle)), device_id))


def _dtype(array: DeviceArray, name: str) -> int:
    """Element type by its number. numpy knows bfloat16 as its bits, as two bytes of anything, or by ml_dtypes."""
    if array.dtype.name not in _DTYPES:
        raise BackendError(
            f"{name} has dtype {array.dtype}, expected float32, float16 or bfloat16 (as its bits, uint16)"
        )
    return _DTYPES[array.dtype.name]


def _resize_table(table: tuple[object, object], name: str) -> tuple[int, int, int, int]:
    """Both pointers, length and taps."""
    first, weights = gpu_array(table[0], name), gpu_array(table[1], name)
    if len(weights.shape) != 2:
        raise BackendError(f"{name}: weights are {weights.shape}, expected (taps, length)")
    taps, length = weights.shape
    expect_named(first, name, (length,), "int32")
    expect_named(weights, name, (taps, length), "int32")
    return first.pointer, weights.pointer, length, taps


def _layout(canvas: DeviceArray, windows: DeviceArray) -> tuple[DeviceArray, DeviceArray, WindowLayout]:
    """A canvas (C, H, W) and windows (n, C, sh, sw) of it, checked."""
    if len(canvas.shape) != 3 or len(windows.shape) != 4 or windows.shape[1] != canvas.shape[0]:
        raise BackendError(
            f"canvas {canvas.shape} and windows {windows.shape}, expected (C, H, W) and (n, C, sh, sw) with equal C"
        )
    expect_named(canvas, "canvas", canvas.shape, "float32")
    expect_named(windows, "windows", windows.shape, "float32")
    layout = WindowLayout((canvas.shape[1], canvas.shape[2]), (windows.shape[2], windows.shape[3]))
    return canvas, windows, layout


def _expect(array: DeviceArray, name: str, shape: tuple[int, ...], dtype: int) -> DeviceArray:
    if array.shape != shape or _dtype(array, name) != dtype:
        wanted = next(n for n, d in _DTYPES.items() if d == dtype)
        raise BackendError(f"{name} is {array.dtype} {array.shape}, expected {wanted} {shape}")
    return array


def expect_named(array: DeviceArray, name: str, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """The array, if it has this shape and type.

    Raises:
        BackendError: it has another.
    """
    if array.shape != shape or array.dtype.name != dtype:
        raise BackendError(f"{name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    return array
