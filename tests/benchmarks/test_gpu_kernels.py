"""The kernel rows of the GPU check, with PyTorch on the CPU and the emulated kernels: the check itself is checked."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_kernels, gpu_naming
from benchmarks.gpu_kernels import Ceilings, Gpu, grid_sample_attention, judge_kernels, measure_kernels
from benchmarks.gpu_rows import Row
from benchmarks.harness import Summary
from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.kernels.launch_plans import Launch
from odise_rt.kernels.reference import deformable_attention
from tests.odise_rt.kernels.emulated import Emulation

torch = pytest.importorskip("torch")


class Cpu(Gpu):
    """PyTorch on the CPU in the place of a GPU."""

    device = "cpu"

    def __init__(self) -> None:
        self.torch, self.handle = torch, 0

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""

    def seconds(self, call: Callable[[], object], warmup: int = 0) -> Summary:
        start = time.perf_counter()
        call()
        return Summary.of([time.perf_counter() - start])

    def array(self, tensor: Any) -> DeviceArray:
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), kind, tensor)

    def ceilings(self) -> Ceilings:
        return Ceilings(1e10, 1e11)


class EmulatedKernels:
    """The methods of Kernels, on CPU tensors."""

    def __init__(self, emulation: Emulation) -> None:
        self.emulation = emulation

    def launch(self, plan: Launch, stream: int, *arguments: Any) -> None:
        self.emulation.launch(plan.kernel, arguments)

    def mask_pool_workspace(self, logits: Any, features: Any) -> int:
        return 16

    def mask_pool(self, logits: Any, features: Any, workspace: Any, pooled: Any, areas: Any, stream: int) -> None:
        means, counts = self.emulation.mask_pool(logits.numpy(), features.numpy())
        pooled.copy_(torch.from_numpy(means))
        areas.copy_(torch.from_numpy(counts))

    def panoptic_merge(
        self, logits: Any, scores: Any, test: tuple[int, int], tables: Any, owner: Any, areas: Any, stream: int
    ) -> None:
        who, counts = self.emulation.panoptic_merge(logits.numpy(), scores.numpy(), test, tuple(owner.shape))
        owner.copy_(torch.from_numpy(who))
        areas.copy_(torch.from_numpy(counts))

    def deformable_attention(
        self, value: Any, shapes: Any, references: Any, offsets: Any, logits: Any, out: Any, stream: int
    ) -> None:
        arrays = [t.numpy() for t in (references, offsets, logits)]
        out.copy_(torch.from_numpy(self.emulation.deformable_attention(value.numpy(), shapes, *arrays)))

    def resize(self, pixels: Any, across: Any, between: Any, down: Any, canvas: Any, stream: int) -> None:
        size = (len(down[0]), len(across[0]))
        canvas.copy_(torch.from_numpy(self.emulation.resize(pixels.numpy(), size, tuple(canvas.shape[1:]))))

    def cut_windows(self, canvas: Any, start: int, windows: Any, stream: int) -> None:
        count, _, *side = windows.shape
        windows.copy_(torch.from_numpy(self.emulation.cut_windows(canvas.numpy(), tuple(side), start, count)))

    def stitch_windows(self, windows: Any, canvas: Any, stream: int) -> None:
        canvas.copy_(torch.from_numpy(self.emulation.stitch_windows(windows.numpy(), tuple(canvas.shape[1:]))))


@pytest.fixture(scope="module")
def kernels(emulation: Emulation) -> EmulatedKernels:
    return EmulatedKernels(emulation)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the check, cut to what a CPU does in a moment."""
    monkeypatch.setattr(gpu_kernels, "POOL_SIZES", [(2, 40, 33, 9, 8), (1, 5, 8, 7, 5)])
    monkeypatch.setattr(gpu_kernels, "MERGE_SIZES", [(9, (8, 8), (30, 25), (33, 40))])
    monkeypatch.setattr(gpu_kernels, "ATTENTION_SIZES", [(1, 20, 2, 16, 4, [(3, 4), (6, 8)])])
    monkeypatch.setattr(gpu_kernels, "IMAGE_SIZES", [((50, 90), 64), ((1, 1), 64)])
    monkeypatch.setattr(gpu_kernels, "WINDOW", 64)
    monkeypatch.setattr(gpu_kernels, "CHANNELS", 4)
    monkeypatch.setattr(gpu_kernels, "IMAGE_TIMED", (150, 200))
    monkeypatch.setattr(gpu_kernels, "STITCH_TIMED", (64, 96))
    monkeypatch.setattr(gpu_kernels, "POOL_TIMED", (10, 16, 8, 12))
    monkeypatch.setattr(gpu_kernels, "MERGE_TIMED", (10, (8, 8), (32, 32)))
    monkeypatch.setattr(gpu_naming, "NAMING_SIZES", [(12, 9, 7, 30, 2, (33, 40)), (1, 5, 3, 1, 1, (1, 1))])
    monkeypatch.setattr(gpu_naming, "NAMING_TIMED", [(12, 9, 7, 30, (16, 16))])
    monkeypatch.setattr(gpu_kernels, "ATTENTION_TIMED", (2, 16, 4, [(4, 4), (8, 8)]))


@pytest.mark.usefixtures("small")
def test_right_kernels_pass(kernels: EmulatedKernels) -> None:
    rows: list[Row] = []
    judge_kernels(rows.append, Cpu(), kernels, quick=False)  # type: ignore[arg-type]
    assert [row.name for row in rows if row.status not in ("pass", "measured")] == []
    assert sum(row.status == "pass" for row in rows) == 3 * (2 + 2 + 1) + 2 + 2 * 2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "broken", ["mask_pool", "panoptic_merge", "deformable_attention", "resize", "cut_windows", "stitch_windows"]
)
@pytest.mark.parametrize("how", ["one wrong value", "nothing written"])
def test_a_wrong_kernel_fails(kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, broken: str, how: str) -> None:
    right = getattr(kernels, broken)
    position = {
        "mask_pool": 3, "panoptic_merge": 4, "deformable_attention": 5, "resize": 4, "cut_windows": 2,
        "stitch_windows": 1,
    }[broken]  # fmt: skip
    named = "image" if position in (1, 2) or broken == "resize" else broken

    def wrong(*arguments: Any) -> None:
        if how == "one wrong value":
            right(*arguments)
            out = arguments[position]
            out.view(-1)[-1] = 12_345 if out.dtype == torch.uint16 else out.view(-1)[-1] + 1

    monkeypatch.setattr(kernels, broken, wrong)
    rows: list[Row] = []
    judge_kernels(rows.append, Cpu(), kernels, quick=False)  # type: ignore[arg-type]
    for row in rows[1:]:
        assert (row.status == "fail") == row.name.startswith(named), row


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kernel", "argument"),
    [
        *(("odise_name_cosines", None), ("odise_name_classes", None), ("odise_name_choose", None)),
        *(("odise_name_paint", None), ("odise_name_classes", 12), ("odise_name_classes", 13)),
        *(("odise_name_classes", 14), ("odise_name_classes", 15), ("odise_name_classes", 16)),
        *(("odise_name_choose", 6), ("odise_name_choose", 8), ("odise_name_choose", 9)),
        *(("odise_name_choose", 10), ("odise_name_paint", 6), ("odise_name_paint", 7)),
    ],
)
def test_a_wrong_naming_fails(
    kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, kernel: str, argument: int | None
) -> None:
    """A kernel that does nothing, or of which the first element of one result is another one."""
    right = kernels.emulation.launch
    floats = {("odise_name_classes", 12), ("odise_name_classes", 14), ("odise_name_classes", 16)}
    floats.add(("odise_name_choose", 10))

    def wrong(name: str, arguments: tuple[Any, ...]) -> None:
        if name != kernel or argument is not None:
            right(name, arguments)
        if name == kernel and argument is not None:
            word = ctypes.c_uint32.from_address(arguments[argument])
            word.value ^= 1 << 23 if (kernel, argument) in floats else 1  # twice or half; the next number

    monkeypatch.setattr(kernels.emulation, "launch", wrong)
    monkeypatch.setattr(gpu_kernels.secrets, "randbits", lambda bits: 1)
    rows: list[Row] = []
    judge_kernels(rows.append, Cpu(), kernels, quick=False)  # type: ignore[arg-type]
    naming = [row for row in rows if row.name.startswith("naming")]
    assert "fail" in {row.status for row in naming}, naming
    assert {row.status for row in rows[1:] if row not in naming} == {"pass"}


@pytest.mark.usefixtures("small")
def test_times_are_rows_with_floor_and_baseline(kernels: EmulatedKernels) -> None:
    rows: list[Row] = []
    measure_kernels(rows.append, Cpu(), kernels)  # type: ignore[arg-type]
    assert len(rows) == 1 + 3 + 4 + 2 + 2 + 1
    assert {"median_us", "floor_us", "of_copy_bandwidth", "times_faster"} <= set(rows[1].values)
    pixels = 8 * 12
    assert rows[1].values["floor_us"] == pytest.approx(26 * pixels * 2 / 1e10 * 1e6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of PyTorch")
def test_kernels_on_this_gpu() -> None:
    rows: list[Row] = []
    gpu_kernels.check_kernels(rows.append, quick=True)
    assert [row for row in rows if row.status not in ("pass", "measured")] == []


def test_the_baseline_is_the_same_attention() -> None:
    gpu, shapes = Cpu(), [(3, 4), (6, 8)]
    tensors = gpu_kernels.attention_inputs(gpu, (2, 20, 2, 16, 4, shapes), torch.float32)
    expected = deformable_attention(tensors[0].numpy(), shapes, *(t.numpy() for t in tensors[1:]))
    sizes = [torch.tensor([w, h], dtype=torch.float32) for h, w in shapes]
    ours = grid_sample_attention(torch, tensors[0], shapes, sizes, *tensors[1:])
    torch.testing.assert_close(ours.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
