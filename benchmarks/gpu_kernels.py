"""The kernels on this GPU: right, compared with float64 on fresh random inputs; and how fast, beside floor and PyTorch.

Outputs and workspace are poisoned (NaN, or numbers that no result can be) before each run, so an element that was not
written shows. Times are CUDA events around the launches, median of many, with a cold L2: a large buffer is read before
each one (read, as what was written would have to leave the L2 in the time of the kernel), and then the GPU waits for
longer than Python needs to launch. Nothing that is timed waits for the GPU itself. Floors come from the copy bandwidth
and the matmul rate that this same process measures.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gpu_naming import naming_cases, time_naming
from benchmarks.gpu_rows import Emit, Row
from benchmarks.harness import Summary, time_cuda_calls
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.errors import OdiseError
from odise_rt.kernels import reference
from odise_rt.kernels.native import Kernels, gpu_array
from odise_rt.kernels.resize_tables import resize_table
from odise_rt.preprocessing import network_size, padded_size, prepare
from odise_rt.windows import Stitcher, WindowGrid, cut_windows, window_grid

# ||out - reference|| / ||reference|| in float64, and the most that rounding to the type may change one value by.
TOLERANCE = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 4e-3}
HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ELEMENT_SLACK = 1e-4
"""Share of the largest value: what float sums and locations may add to the error of one element."""
MIB = 1 << 20
POOL_SIZES = [
    (1, 100, 256, 256, 352),
    (2, 100, 256, 128, 128),
    (1, 20, 64, 37, 41),
    (3, 130, 300, 5, 7),
    (1, 1, 1, 1, 1),
    (1, 257, 513, 33, 64),
    (2, 7, 96, 64, 64),
]
"""B, Q, C, H, W: the model's, tiles that do not come out even, unaligned rows, one of everything."""
MERGE_SIZES = [
    (1, (1, 1), (3, 2), (5, 9)),
    (33, (64, 64), (250, 199), (777, 401)),
    (100, (256, 352), (1024, 1365), (480, 640)),
    (700, (16, 16), (64, 64), (100, 64)),
    (100, (256, 256), (1024, 1024), (1024, 1024)),
]
"""Q, cells, network size, original size."""
LARGE_MERGE = 1 << 24
"""Masks times pixels of the result."""
ATTENTION_SIZES = [
    (2, 300, 4, 16, 4, [(9, 12), (18, 24)]),
    (1, 77, 3, 5, 3, [(7, 5)]),
    (2, 50, 2, 24, 2, [(3, 4)] * 8),
    (1, 5000, 8, 32, 4, [(32, 32), (64, 64), (128, 128)]),
]
"""B, M, heads, channels, points, levels."""
IMAGE_SIZES = [((3000, 4000), 1024), ((427, 640), 512), ((1, 1), 64), ((513, 1024), 512)]
"""Pixels, and short edge in the network: a photograph, a COCO picture, one of everything, windows that overlap."""
WINDOW, CHANNELS = 512, 256
"""Side of a window, and channels of the feature levels."""
IMAGE_TIMED = (3000, 4000)
STITCH_TIMED = (1024, 1408)
POOL_TIMED = (100, 256, 256, 352)
"""Q, C, H, W: what a COCO picture has."""
MERGE_TIMED = (100, (256, 256), (1024, 1024))
ATTENTION_TIMED = (8, 32, 4, [(32, 32), (64, 64), (128, 128)])
"""Heads, channels, points, levels; every pixel of the levels is a query."""


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches right now."""

    copy_bytes: float
    """Bytes a second of a large copy within the device, read plus written."""
    matmul_flops: float
    """Operations a second of an 8192 cubed bfloat16 product, on random data."""

    def floor(self, read_and_written: float, operations: float) -> float:
        """Seconds that no implementation can go much below."""
        return max(read_and_written / self.copy_bytes, operations / self.matmul_flops)


class Gpu:
    """PyTorch's device and a stream for everything, with a timer."""

    device = "cuda"

    def __init__(self, quick: bool) -> None:
        import torch

        self.torch = torch
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.handle = int(self.stream.cuda_stream)
        self.repeats = 15 if quick else 50
        self.other = torch.ones(128 * MIB, dtype=torch.float32, device=self.device)
        self._total = torch.empty((), dtype=torch.float32, device=self.device)

    def seconds(self, call: Callable[[], object], warmup: int = 3) -> Summary:
        """Time of a call that only launches, each with a cold L2."""
        return Summary.of(time_cuda_calls(call, self.repeats, warmup, before=self._before))

    def _before(self) -> None:
        self.torch.sum(self.other, dim=0, out=self._total)

    def synchronize(self) -> None:
        """Wait for everything that was put on the GPU."""
        self.torch.cuda.synchronize()

    def ceilings(self) -> Ceilings:
        """Measure copy bandwidth and matmul rate."""
        return Ceilings(2.0 * (1 << 30) / self._copy_seconds(1 << 30), 2.0 * 8192**3 / self._matmul_seconds(8192))

    def _copy_seconds(self, size: int) -> float:
        source = self.torch.randint(0, 255, (size,), dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        return self.seconds(lambda: target.copy_(source)).median

    def _matmul_seconds(self, size: int) -> float:
        a, b = (self.torch.randn(size, size, dtype=self.torch.bfloat16, device=self.device) for _ in range(2))
        out = self.torch.empty_like(a)
        return self.seconds(lambda: self.torch.matmul(a, b, out=out), warmup=10).median

    def bits(self, tensor: Any) -> Any:
        """bfloat16 as the uint16 that array interfaces can name; other types as they are."""
        return tensor.view(self.torch.uint16) if tensor.dtype == self.torch.bfloat16 else tensor

    def array(self, tensor: Any) -> DeviceArray:
        """A tensor as the kernels take it."""
        return gpu_array(tensor, "tensor")

    def poisoned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """NaN, or -77 in integers."""
        value = float("nan") if dtype.is_floating_point else -77
        return self.torch.full(shape, value, dtype=dtype, device=self.device)


def check_kernels(emit: Emit, quick: bool) -> None:
    """Correctness rows of all kernels."""
    gpu = Gpu(quick)
    judge_kernels(emit, gpu, Kernels(), quick)


def judge_kernels(emit: Emit, gpu: Gpu, kernels: Kernels, quick: bool) -> None:
    """:func:`check_kernels` with what it runs on."""
    seed = secrets.randbits(31)
    emit(Row("kernels", "random seed", "measured", values={"seed": str(seed)}))
    gpu.torch.manual_seed(seed)
    for name, run in [
        *_pool_cases(gpu, kernels, quick),
        *_image_cases(gpu, kernels, quick),
        *_attention_cases(gpu, kernels, quick),
        *naming_cases(gpu, kernels, quick),
        *_merge_cases(gpu, kernels, quick),  # last: their float64 on the CPU takes longest
    ]:
        try:
            error, allowed, problems = run()
        except (OdiseError, RuntimeError) as exc:
            emit(Row("kernels", name, "error", "correctness", detail=str(exc).splitlines()[0][:300]))
            continue
        good = error <= allowed and not problems  # NaN is not <= anything
        emit(
            Row("kernels", name, "pass" if good else "fail", "correctness", {"error": error, "allowed": allowed},
                "; ".join(problems))
        )  # fmt: skip


Case = tuple[str, Callable[[], tuple[float, float, list[str]]]]


def _judge(out: Any, expected: Any, dtype: Any) -> tuple[float, float, list[str]]:
    """Error of the whole, what is allowed, and the worst element if it is worse than rounding explains."""
    out, expected = out.double(), expected.double()
    scale, largest = float(expected.norm()), float(expected.abs().max())
    error = float((out - expected).norm()) / (scale if scale > 0 else 1.0)
    allowed = HALF_UNIT[_name(dtype)] * 1.01 * expected.abs() + ELEMENT_SLACK * largest + 1e-30
    worst = float(((out - expected).abs() / allowed).max())
    problems = [] if worst <= 1 else [f"the worst element is off by {worst:.3g} times what rounding explains"]
    return error, TOLERANCE[_name(dtype)], problems


def _pool_cases(gpu: Gpu, kernels: Kernels, quick: bool) -> Iterator[Case]:
    torch = gpu.torch

    def case(size: tuple[int, ...], dtype: Any, edge: bool) -> Callable[[], tuple[float, float, list[str]]]:
        def run() -> tuple[float, float, list[str]]:
            batch, queries, channels, height, width = size
            logits = torch.randn(batch, queries, height, width, device=gpu.device).to(dtype)
            if edge:
                logits[:, 0] = -1  # empty
                logits[:, -1] = 1  # full
            features = torch.randn(batch, channels, height, width, device=gpu.device).to(dtype)
            pooled = gpu.poisoned((batch, queries, channels), dtype)
            areas = gpu.poisoned((batch, queries), torch.int32)
            run_pool = pool_call(gpu, kernels, logits, features, pooled, areas)
            run_pool()
            again = pooled.clone()
            pooled.fill_(float("nan"))
            run_pool()
            gpu.synchronize()
            inside = logits > 0
            expected_areas = inside.sum((2, 3))
            sums = inside.flatten(2).double() @ features.flatten(2).double().transpose(1, 2)
            expected = sums / expected_areas.clamp(min=1)[..., None]
            error, allowed, problems = _judge(pooled, expected, dtype)
            if not torch.equal(areas.long(), expected_areas):
                problems.append("areas differ")
            if not torch.equal(again, pooled):
                problems.append("two runs on the same input gave different bits")
            return error, allowed, problems

        return run

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for size in POOL_SIZES[: 4 if quick else None]:
            yield f"mask_pool {_name(dtype)} {'x'.join(map(str, size))}", case(size, dtype, edge=size[1] > 1)


def pool_call(gpu: Gpu, kernels: Kernels, logits: Any, features: Any, pooled: Any, areas: Any) -> Callable[[], None]:
    """A call that launches mask_pool into ``pooled`` and ``areas``, with a poisoned workspace."""
    size = kernels.mask_pool_workspace(gpu.bits(logits), gpu.bits(features))
    workspace = gpu.torch.full((size,), 0xFF, dtype=gpu.torch.uint8, device=gpu.device)

    def call() -> None:
        kernels.mask_pool(gpu.bits(logits), gpu.bits(features), workspace, gpu.bits(pooled), areas, gpu.handle)

    return call


def merge_call(
    gpu: Gpu, kernels: Kernels, logits: Any, scores: Any, test: tuple[int, int], owner: Any, areas: Any
) -> Callable[[], None]:
    """A call that launches panoptic_merge into ``owner`` and ``areas``, with poisoned tables."""
    torch = gpu.torch
    rows, columns = owner.shape
    tables = (
        gpu.poisoned((rows,), torch.int32),
        gpu.poisoned((3, rows), torch.float32),
        gpu.poisoned((columns,), torch.int32),
        gpu.poisoned((3, columns), torch.float32),
    )

    def call() -> None:
        kernels.panoptic_merge(gpu.bits(logits), scores, test, tables, owner, areas, gpu.handle)

    return call


def smooth_masks(gpu: Gpu, queries: int, cells: tuple[int, int]) -> Any:
    """Mask logits like a trained model's: blobs, clearly negative in most places, with some noise; float32."""
    torch = gpu.torch
    y, x = (torch.arange(n, device=gpu.device, dtype=torch.float32) for n in cells)
    centre = torch.rand(queries, 2, device=gpu.device) * torch.tensor(cells, device=gpu.device)
    radius = (0.02 + 0.3 * torch.rand(queries, device=gpu.device)) * max(cells)
    distance = torch.hypot(y[None, :, None] - centre[:, 0, None, None], x[None, None] - centre[:, 1, None, None])
    return (radius[:, None, None] - distance) + 0.5 * torch.randn(queries, *cells, device=gpu.device)


def _merge_cases(gpu: Gpu, kernels: Kernels, quick: bool) -> Iterator[Case]:
    torch = gpu.torch

    def case(size: tuple[Any, ...], dtype: Any, smooth: bool) -> Callable[[], tuple[float, float, list[str]]]:
        def run() -> tuple[float, float, list[str]]:
            queries, cells, test, original = size
            masks = smooth_masks(gpu, queries, cells) if smooth else 3 * torch.randn(queries, *cells, device=gpu.device)
            logits, scores = masks.to(dtype), 0.05 + 0.95 * torch.rand(queries, device=gpu.device)
            scores[queries // 2 + 1 :: 7] = 0
            owner, areas = gpu.poisoned(original, torch.int16), gpu.poisoned((3, queries), torch.int32)
            merge_call(gpu, kernels, logits, scores, test, owner, areas)()
            gpu.synchronize()
            merged = reference.MergedPixels(owner.cpu().numpy(), areas.cpu().numpy())
            problems = reference.merge_errors(
                merged, logits.float().cpu().numpy(), scores.cpu().numpy(), test, original, tolerance=2e-5
            )
            return float(len(problems)), 0.0, problems

        return run

    every = [(dtype, smooth) for dtype in (torch.float16, torch.bfloat16, torch.float32) for smooth in (True, False)]
    for size in MERGE_SIZES[: 3 if quick else None]:
        # Float64 on the CPU takes seconds for large ones: these come in two types only.
        large = size[0] * size[3][0] * size[3][1] > LARGE_MERGE
        for dtype, smooth in [(torch.float16, True), (torch.float32, False)] if large else every:
            what = "blobs" if smooth else "noise"
            name = f"panoptic_merge {_name(dtype)} {size[0]} {what} {_by(size[1])} to {_by(size[3])}"
            yield name, case(size, dtype, smooth)


def _attention_cases(gpu: Gpu, kernels: Kernels, quick: bool) -> Iterator[Case]:
    torch = gpu.torch

    def case(size: tuple[Any, ...], dtype: Any) -> Callable[[], tuple[float, float, list[str]]]:
        def run() -> tuple[float, float, list[str]]:
            batch, queries, heads, channels, _, shapes = size
            value, references, offsets, logits = attention_inputs(gpu, size, dtype)
            out = gpu.poisoned((batch, queries, heads, channels), dtype)
            kernels.deformable_attention(
                gpu.bits(value), shapes, references, gpu.bits(offsets), gpu.bits(logits), gpu.bits(out), gpu.handle
            )
            gpu.synchronize()
            arrays = [t.float().cpu().numpy() for t in (value, references, offsets, logits)]
            expected = reference.deformable_attention(arrays[0], shapes, *arrays[1:])
            return _judge(out.cpu(), torch.from_numpy(expected), dtype)

        return run

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for size in ATTENTION_SIZES[: 3 if quick else None]:
            yield (
                f"deformable_attention {_name(dtype)} {'x'.join(map(str, size[:5]))}, {len(size[5])} levels",
                case(size, dtype),
            )


def attention_inputs(gpu: Gpu, size: tuple[Any, ...], dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Value, references, offsets and weight logits on the GPU, random."""
    torch = gpu.torch
    batch, queries, heads, channels, points, shapes = size
    memory, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, memory, heads, channels, device=gpu.device).to(dtype)
    references = torch.rand(1, queries, 2, device=gpu.device)
    offsets = (2 * torch.randn(batch, queries, heads, levels, points, 2, device=gpu.device)).to(dtype)
    logits = torch.randn(batch, queries, heads, levels * points, device=gpu.device).to(dtype)
    return value, references, offsets, logits


def resize_call(gpu: Gpu, kernels: Kernels, pixels: Any, size: tuple[int, int], canvas: Any) -> Callable[[], None]:
    """A call that resizes pixels (h, w, 3) to ``size`` on a canvas, with poisoned scratch memory."""
    torch = gpu.torch
    tables = []
    for target, source in zip(size, pixels.shape, strict=False):
        table = resize_table(target, source)
        tables.append(tuple(torch.from_numpy(part).to(gpu.device) for part in (table.first, table.weights)))
    down, across = tables
    between = torch.full((pixels.shape[0], size[1], 3), 77, dtype=torch.uint8, device=gpu.device)
    return lambda: kernels.resize(pixels, across, between, down, canvas, gpu.handle)


def _image_cases(gpu: Gpu, kernels: Kernels, quick: bool) -> Iterator[Case]:
    """Against what the runtime does on the host: equal to the last bit."""
    torch = gpu.torch

    def case(original: tuple[int, int], short: int) -> Callable[[], tuple[float, float, list[str]]]:
        def run() -> tuple[float, float, list[str]]:
            pixels = torch.randint(0, 256, (*original, 3), dtype=torch.uint8, device=gpu.device)
            size = network_size(*original, short, 4 * short)
            expected = prepare(pixels.cpu().numpy(), size, 64).canvas
            canvas = gpu.poisoned(expected.shape[1:], torch.float32)
            resize_call(gpu, kernels, pixels, size, canvas)()
            grid = window_grid(expected.shape[2], expected.shape[3], WINDOW)
            windows = gpu.poisoned((len(grid), 3, grid.side, grid.side), torch.float32)
            kernels.cut_windows(canvas, 0, windows, gpu.handle)
            crop = gpu.poisoned((1, 3, *size), torch.float32)
            kernels.cut_windows(canvas, 0, crop, gpu.handle)
            gpu.synchronize()
            problems = [
                f"{what} differs"
                for what, found, wanted in (
                    ("the canvas", canvas, expected[0]),
                    ("a window", windows, cut_windows(expected, grid)),
                    ("the image without padding", crop, expected[:, :, : size[0], : size[1]]),
                )
                if not np.array_equal(found.cpu().numpy(), wanted)
            ]
            problems += _stitch_problems(gpu, kernels, grid)
            return float(len(problems)), 0.0, problems

        return run

    for original, short in IMAGE_SIZES[: 3 if quick else None]:
        yield f"image {_by(original)} to {short}, cut and stitched", case(original, short)


def _stitch_problems(gpu: Gpu, kernels: Kernels, grid: WindowGrid) -> list[str]:
    torch, problems = gpu.torch, []
    for stride in (4, 32):
        features = torch.randn(len(grid), 5, grid.side // stride, grid.side // stride, device=gpu.device)
        stitcher = Stitcher(grid, {"level": stride})
        stitcher.add({"level": features.cpu().numpy().copy()})
        expected = stitcher.finish()["level"][0]
        level = gpu.poisoned(expected.shape, torch.float32)
        kernels.stitch_windows(features, level, gpu.handle)
        gpu.synchronize()
        if not np.array_equal(level.cpu().numpy(), expected):
            problems.append(f"features of stride {stride} are stitched differently")
    return problems


# ---- time ------------------------------------------------------------------------------------------------------------


def time_kernels(emit: Emit, quick: bool) -> None:
    """Time rows of all kernels, and the ceilings that they are held against."""
    gpu = Gpu(quick)
    measure_kernels(emit, gpu, Kernels())


def measure_kernels(emit: Emit, gpu: Gpu, kernels: Kernels) -> None:
    """:func:`time_kernels` with what it runs on."""
    ceilings = gpu.ceilings()
    emit(
        Row("kernel times", "ceilings", "measured", "time",
            {"copy_tb_s": ceilings.copy_bytes / 1e12, "bf16_matmul_tflops": ceilings.matmul_flops / 1e12})
    )  # fmt: skip
    _time_pool(emit, gpu, kernels, ceilings)
    _time_merge(emit, gpu, kernels, ceilings)
    _time_attention(emit, gpu, kernels, ceilings)
    _time_images(emit, gpu, kernels, ceilings)
    for name, call, baseline, moved in time_naming(gpu, kernels):
        what = "normalise, products, softmaxes, top five, map by index, areas"
        _report(emit, gpu, name, call, baseline, what, ceilings, moved=moved, operations=0.0)


def _report(
    emit: Emit, gpu: Gpu, name: str, call: Callable[[], object], baseline: Callable[[], object], what: str,
    ceilings: Ceilings, moved: float, operations: float,
) -> None:  # fmt: skip
    """One kernel and the PyTorch operations it replaces."""
    ours, theirs = gpu.seconds(call), gpu.seconds(baseline)
    floor = ceilings.floor(moved, operations)
    values: dict[str, float | int | str] = {
        "median_us": ours.median * 1e6, "p10_us": ours.p10 * 1e6, "p90_us": ours.p90 * 1e6, "floor_us": floor * 1e6,
        "of_copy_bandwidth": moved / ours.median / ceilings.copy_bytes, "pytorch_us": theirs.median * 1e6,
        "times_faster": theirs.median / ours.median,
    }  # fmt: skip
    emit(Row("kernel times", name, "measured", "time", values, f"PyTorch: {what}"))


def _time_pool(emit: Emit, gpu: Gpu, kernels: Kernels, ceilings: Ceilings) -> None:
    torch = gpu.torch
    queries, channels, height, width = POOL_TIMED
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.randn(1, queries, height, width, device=gpu.device).to(dtype)
        features = torch.randn(1, channels, height, width, device=gpu.device).to(dtype)
        pooled = torch.empty(1, queries, channels, dtype=dtype, device=gpu.device)
        areas = torch.empty(1, queries, dtype=torch.int32, device=gpu.device)

        def baseline(logits: Any = logits, features: Any = features, dtype: Any = dtype) -> Any:
            mask = (logits > 0).to(dtype)
            return torch.einsum("bqhw,bchw->bqc", mask, features) / mask.sum((2, 3)).clamp(min=1)[..., None]

        pixels = height * width
        _report(
            emit, gpu, f"mask_pool {_name(dtype)} C={channels} Q={queries} {height}x{width}",
            pool_call(gpu, kernels, logits, features, pooled, areas), baseline, "threshold, einsum, mean", ceilings,
            moved=(queries + channels) * pixels * logits.element_size(), operations=2.0 * queries * channels * pixels,
        )  # fmt: skip


def _time_merge(emit: Emit, gpu: Gpu, kernels: Kernels, ceilings: Ceilings) -> None:
    torch = gpu.torch
    queries, cells, size = MERGE_TIMED
    scores = 0.05 + 0.95 * torch.rand(queries, device=gpu.device)
    owner = torch.empty(size, dtype=torch.int16, device=gpu.device)
    areas = torch.empty(3, queries, dtype=torch.int32, device=gpu.device)
    for dtype in (torch.float32, torch.float16):
        for what, masks in (
            ("blobs", smooth_masks(gpu, queries, cells)),
            ("noise", 3 * torch.randn(queries, *cells, device=gpu.device)),
        ):
            logits = masks.to(dtype)
            ones = torch.ones(size[0] * size[1], dtype=torch.int32, device=gpu.device)

            def count(owners: Any, of: Any) -> Any:
                # As bincount, which would wait for the GPU to know its length.
                return torch.zeros(queries, dtype=torch.int32, device=gpu.device).scatter_add_(0, owners, of)

            def baseline(logits: Any = logits, ones: Any = ones) -> Any:
                wide = torch.nn.functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
                inside = wide >= 0
                best = (wide.sigmoid() * scores.to(wide.dtype)[:, None, None]).argmax(dim=0)
                kept = inside.gather(0, best[None])[0]
                owned = count(best.flatten(), ones)
                final = count(best.flatten(), kept.flatten().to(torch.int32))
                return torch.where(kept, best, -1), inside.sum((1, 2)), owned, final

            moved = logits.numel() * logits.element_size() + owner.numel() * 2
            # An exponential and some ten other operations for each mask and pixel, on the ordinary units: no ceiling of
            # these is measured, so the floor is that of bytes.
            _report(
                emit, gpu, f"panoptic_merge {_name(dtype)} {what} {queries}x{_by(cells)} to {_by(size)}",
                merge_call(gpu, kernels, logits, scores, size, owner, areas), baseline,
                "interpolate, sigmoid, score, argmax, areas", ceilings, moved=moved, operations=0.0,
            )  # fmt: skip


def _time_attention(emit: Emit, gpu: Gpu, kernels: Kernels, ceilings: Ceilings) -> None:
    torch = gpu.torch
    heads, channels, points, shapes = ATTENTION_TIMED
    memory = sum(h * w for h, w in shapes)
    for dtype in (torch.float16, torch.float32):
        value, _, offsets, logits = attention_inputs(gpu, (1, memory, heads, channels, points, shapes), dtype)
        references = torch.cat([_centres(gpu, h, w) for h, w in shapes], dim=1)
        out = torch.empty(1, memory, heads, channels, dtype=dtype, device=gpu.device)
        call = functools.partial(
            kernels.deformable_attention, value, shapes, references, offsets, logits, out, gpu.handle
        )

        sizes = [torch.tensor([w, h], device=gpu.device, dtype=torch.float32) for h, w in shapes]
        baseline = functools.partial(grid_sample_attention, torch, value, shapes, sizes, references, offsets, logits)

        moved = sum(t.numel() * t.element_size() for t in (value, references, offsets, logits, out))
        _report(
            emit, gpu, f"deformable_attention {_name(dtype)} {memory} queries, {len(shapes)} levels", call, baseline,
            "softmax, grid_sample a level, weighted sum", ceilings, moved=moved, operations=0.0,
        )  # fmt: skip


def _time_images(emit: Emit, gpu: Gpu, kernels: Kernels, ceilings: Ceilings) -> None:
    torch = gpu.torch
    pixels = torch.randint(0, 256, (*IMAGE_TIMED, 3), dtype=torch.uint8, device=gpu.device)
    size = network_size(*IMAGE_TIMED, 2 * WINDOW, 5 * WINDOW)
    canvas = torch.empty(3, *padded_size(size, 64), device=gpu.device)

    def antialiased() -> Any:
        planes = pixels.permute(2, 0, 1)[None].float() / 255
        return torch.nn.functional.interpolate(planes, size=size, mode="bilinear", antialias=True)

    moved = pixels.numel() + 2 * IMAGE_TIMED[0] * size[1] * 3 + canvas.numel() * 4
    _report(
        emit, gpu, f"resize {_by(IMAGE_TIMED)} to {_by(size)}", resize_call(gpu, kernels, pixels, size, canvas),
        antialiased, "float, interpolate with antialias (other roundings)", ceilings, moved=moved, operations=0.0,
    )  # fmt: skip
    grid = window_grid(*STITCH_TIMED, WINDOW)
    cells = grid.side // 4
    windows = torch.randn(len(grid), CHANNELS, cells, cells, device=gpu.device)
    level = torch.empty(CHANNELS, *(length // 4 for length in STITCH_TIMED), device=gpu.device)

    def overlap_add() -> Any:
        level.zero_()
        count = torch.zeros_like(level[0])
        for (top, left), window in zip(grid.corners, windows, strict=True):
            rows, columns = slice(top // 4, top // 4 + cells), slice(left // 4, left // 4 + cells)
            level[:, rows, columns] += window
            count[rows, columns] += 1
        return level / count

    _report(
        emit, gpu, f"stitch {len(grid)} windows of {CHANNELS}x{cells}x{cells}",
        functools.partial(kernels.stitch_windows, windows, level, gpu.handle), overlap_add,
        "zero, add each window, divide", ceilings, moved=(windows.numel() + level.numel()) * 4, operations=0.0,
    )  # fmt: skip


def grid_sample_attention(
    torch: Any, value: Any, shapes: Any, sizes: Any, references: Any, offsets: Any, logits: Any
) -> Any:
    """Deformable attention in PyTorch's operations: (B, M, heads, C).

    ``sizes`` are width and height of each level as float32 tensors: made here, they would wait for the GPU.
    """
    batch, queries, heads, levels, points, _ = offsets.shape
    weights = logits.softmax(dim=-1).unflatten(3, (levels, points)).permute(0, 2, 1, 3, 4)  # (B, heads, M, L, P)
    sampled, start = [], 0
    for level, (height, width) in enumerate(shapes):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        start += height * width
        # float32 until the last step: half a pixel of 128 is coarse in float16
        where = references[:, :, None, None] + offsets[:, :, :, level].float() / sizes[level]  # (B, M, heads, P, 2)
        grid = (where * 2 - 1).to(value.dtype).permute(0, 2, 1, 3, 4).reshape(batch * heads, queries, points, 2)
        sample = torch.nn.functional.grid_sample(image, grid, mode="bilinear", align_corners=False)
        sampled.append(sample.unflatten(0, (batch, heads)))  # (B, heads, C, M, P)
    stacked = torch.stack(sampled, dim=4)  # (B, heads, C, M, L, P)
    return (stacked * weights[:, :, None]).sum((4, 5)).permute(0, 3, 1, 2)


def _centres(gpu: Gpu, height: int, width: int) -> Any:
    torch = gpu.torch
    y = (torch.arange(height, device=gpu.device) + 0.5) / height
    x = (torch.arange(width, device=gpu.device) + 0.5) / width
    grid = torch.stack([x[None].expand(height, width), y[:, None].expand(height, width)], dim=2)
    return grid.reshape(1, -1, 2).contiguous()


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
