"""The loader: plans equal to the C launchers', argument checks, and errors where there is no GPU, package or file."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt.errors import BackendError, MissingPackageError, OutOfMemoryError
from odise_rt.kernels import native
from odise_rt.kernels.launch_plans import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GpuFacts,
    WindowLayout,
    plan_choose_segments,
    plan_cut_windows,
    plan_deformable_attention,
    plan_mask_pool,
    plan_name_classes,
    plan_paint_segments,
    plan_panoptic_merge,
    plan_resize,
    plan_stitch_windows,
    plan_text_cosines,
)
from odise_rt.kernels.naming import ClassArrays, NamingKernels, SegmentArrays
from odise_rt.kernels.native import FOLDER_VARIABLE, Kernels, gpu_array, kernel_file
from odise_rt.kernels.sources import STAMP
from tests.odise_rt import fake_driver
from tests.odise_rt.fake_gpu import Calls, write_fatbins
from tests.odise_rt.kernels.emulated import Emulation

H200 = GpuFacts(132, 232_448, 90)
SOURCES = Path(native.__file__).parent


class FakeArray:
    """An array "on a GPU": only its description is real."""

    def __init__(
        self, shape: tuple[int, ...], dtype: str = "float16", pointer: int = 1 << 20, strides: Any = None
    ) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": np.dtype(dtype).str, "data": (pointer, False), "strides": strides, "version": 3,
        }  # fmt: skip


class FakeCore(types.SimpleNamespace):
    """Stands for cuda.core: records launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        properties = types.SimpleNamespace(multiprocessor_count=132, max_shared_memory_per_block_optin=232_448)
        device = types.SimpleNamespace(
            properties=properties, compute_capability=(9, 0), device_id=0, set_current=lambda: None
        )
        module = types.SimpleNamespace(get_kernel=lambda name: types.SimpleNamespace(handle=1, name=name))
        super().__init__(
            Device=lambda index: device,
            ObjectCode=types.SimpleNamespace(from_fatbin=lambda data, name: module),
            LaunchConfig=lambda **options: options,
            Stream=types.SimpleNamespace(from_handle=lambda handle: ("stream", handle)),
            launch=lambda stream, config, kernel, *rest: self.launches.append((stream, config, kernel.name, rest)),
        )


@pytest.fixture(params=["stand-in", "cuda-core"])
def kernels(
    request: pytest.FixtureRequest,
    install_gpu: Callable[..., Calls],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Kernels:
    """Whose launches are recorded and not done: pointers are made up here."""
    if request.param == "cuda-core":
        if (reason := fake_driver.why_not()) is not None:
            pytest.skip(reason)
        install_gpu()
    else:
        monkeypatch.setattr(native, "import_cuda_core", FakeCore)
        monkeypatch.setattr(native, "_allow_shared_memory", lambda kernel, size, device: None)
    write_fatbins(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return Kernels()


def launches(kernels: Kernels) -> list[tuple[Any, ...]]:
    """Stream, configuration, kernel and arguments of each launch."""
    if isinstance(kernels._core, FakeCore):
        return kernels._core.launches
    driver = fake_driver.installed()
    assert driver is not None
    return [
        (
            ("stream", one.stream),
            {"grid": one.grid, "block": one.block[0], "shmem_size": one.shared_bytes},
            one.kernel,
            one.arguments,
        )
        for one in driver.launched
    ]


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize(
    "gpu", [H200, GpuFacts(40, 65_536, 75), GpuFacts(108, 166_912, 80), GpuFacts(20, 101_376, 120)]
)
def test_pool_plans_are_the_launchers(emulation: Emulation, dtype: int, gpu: GpuFacts) -> None:
    random = np.random.default_rng(dtype)
    sizes = [(1, 100, 256, 90_112), (2, 20, 64, 64), (1, 1, 1, 1), (7, 33, 257, 31), (1, 5, 3, (1 << 31) - 1)]
    sizes += [tuple(int(v) for v in random.integers(1, (9, 400, 900, 200_000))) for _ in range(40)]
    for size in sizes:
        status, (_, row_tiles, simt, splits, stages, shared, grid_y, finish_x, workspace, counts) = emulation.pool_plan(
            dtype, *size, gpu.multiprocessors, gpu.shared_limit, gpu.compute_capability
        )
        assert status == 0
        plan = plan_mask_pool(dtype, *size, gpu)
        assert (plan.row_tiles, plan.simt, plan.splits, plan.stages) == (row_tiles, bool(simt), splits, stages)
        assert plan.sums.grid == (splits, grid_y, size[0])
        assert plan.sums.shared_bytes == shared <= gpu.shared_limit
        assert plan.finish.grid == (finish_x, size[1], size[0])
        assert (plan.workspace_bytes, plan.counts_offset) == (workspace, counts)


def test_every_kernel_that_a_plan_names_is_in_the_sources() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in SOURCES.glob("*.cu"))
    names = set()
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        for queries in (1, 100):
            for gpu in (H200, GpuFacts(40, 65_536, 75)):
                pool = plan_mask_pool(dtype, 1, queries, 4, 64, gpu)
                names |= {pool.sums.kernel, pool.finish.kernel}
        merge = plan_panoptic_merge(dtype, 3, (4, 4), (16, 16), (16, 16), 4)
        names |= {merge.prepare.kernel, merge.merge.kernel}
        for aligned in (True, False):
            names.add(plan_deformable_attention(dtype, 1, 2, 1, 8, [(2, 2)], 1, aligned).kernel)
    resize, layout = plan_resize((3, 4), (2, 2), (4, 4)), WindowLayout((4, 4), (2, 2))
    names |= {resize.across.kernel, resize.down.kernel, plan_cut_windows(layout, 3, 0, 1).kernel}
    names.add(plan_stitch_windows(layout, 3).kernel)
    naming = (plan_text_cosines(3, 8, 5), plan_name_classes(3, 5, 4, 2), plan_choose_segments(3))
    names |= {plan.kernel for plan in (*naming, plan_paint_segments(3, (4, 4)))}
    assert len(names) == 29
    for name in names:
        assert f"({name}," in text or f"{name}(" in text, name


def test_model_sizes_on_an_h200() -> None:
    plan = plan_mask_pool(FLOAT16, 1, 100, 256, 256 * 352, H200)
    assert (plan.splits, plan.stages, plan.sums.shared_bytes) == (66, 8, 131_072)
    assert plan.workspace_bytes == 66 * 100 * 257 * 4
    merge = plan_panoptic_merge(FLOAT32, 100, (256, 256), (1024, 1024), (1024, 1024), 4)
    assert merge.merge.grid == (16, 32, 1)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: plan_mask_pool(FLOAT16, 0, 1, 1, 1, H200),
        lambda: plan_mask_pool(FLOAT16, 1, 1, 1, 1 << 31, H200),
        lambda: plan_mask_pool(FLOAT16, 1, 65_535, 1 << 20, 1, H200),
        lambda: plan_panoptic_merge(FLOAT16, 0, (4, 4), (16, 16), (16, 16), 4),
        lambda: plan_panoptic_merge(FLOAT16, 2049, (4, 4), (16, 16), (16, 16), 4),
        lambda: plan_panoptic_merge(FLOAT16, 1, (4, 4), (17, 16), (16, 16), 4),
        lambda: plan_panoptic_merge(FLOAT16, 1, (4, 4), (16, 16), (1 << 16, 1 << 16), 4),
        lambda: plan_deformable_attention(FLOAT16, 1, 1, 1, 8, [], 1, True),
        lambda: plan_deformable_attention(FLOAT16, 1, 1, 1, 8, [(2, 2)] * 9, 1, True),
        lambda: plan_deformable_attention(FLOAT16, 1, 0, 1, 8, [(2, 2)], 1, True),
        lambda: plan_text_cosines(2049, 8, 5),
        lambda: plan_text_cosines(1, 0, 5),
        lambda: plan_text_cosines(1, 8, (1 << 24) + 1),
        lambda: plan_name_classes(1, 5, 6, 1),
        lambda: plan_name_classes(1, 5, 4, 5),
        lambda: plan_choose_segments(0),
        lambda: plan_paint_segments(1, (0, 4)),
        lambda: plan_paint_segments(1, (1 << 16, 1 << 16)),
    ],
)
def test_sizes_out_of_range_are_typed_errors(broken: Any) -> None:
    with pytest.raises(BackendError):
        broken()


# ---- launches --------------------------------------------------------------------------------------------------------


def test_mask_pool_launches_two_kernels(kernels: Kernels) -> None:
    logits, features = FakeArray((1, 100, 256, 352)), FakeArray((1, 256, 256, 352), pointer=2 << 30)
    size = kernels.mask_pool_workspace(logits, features)
    workspace = FakeArray((size,), "uint8", pointer=3 << 30)
    pooled, areas = FakeArray((1, 100, 256), pointer=4 << 30), FakeArray((1, 100), "int32", pointer=5 << 30)
    kernels.mask_pool(logits, features, workspace, pooled, areas, 7)
    (stream, config, name, rest), (_, finish_config, finish, finish_rest) = launches(kernels)
    assert (stream, name, finish) == (("stream", 7), "odise_pool_sums_f16_8", "odise_pool_finish_f16")
    assert config == {"grid": (66, 2, 1), "block": 256, "shmem_size": 131_072}
    assert finish_config["grid"] == (2, 100, 1)
    counts = (3 << 30) + 66 * 100 * 256 * 4
    assert rest == (1 << 20, 2 << 30, 100, 256, 90_112, 66, 8, 3 << 30, counts)
    assert [type(v) for v in rest] == [int, int, *[np.int32] * 5, int, int]
    assert finish_rest == (3 << 30, counts, 100, 256, 66, 4 << 30, 5 << 30)


def test_panoptic_merge_launches_tables_first(kernels: Kernels) -> None:
    tables = (
        FakeArray((480,), "int32"), FakeArray((3, 480), "float32"),
        FakeArray((640,), "int32"), FakeArray((3, 640), "float32"),
    )  # fmt: skip
    kernels.panoptic_merge(
        FakeArray((100, 256, 352), "float32"), FakeArray((100,), "float32"), (1024, 1365), tables,
        FakeArray((480, 640), "int16"), FakeArray((3, 100), "int32"), 0,
    )  # fmt: skip
    (_, _, first, first_rest), (_, config, second, rest) = launches(kernels)
    assert (first, second) == ("odise_merge_prepare", "odise_merge_f32")
    assert first_rest[:8] == (256, 352, 4, 1024, 1365, 480, 640, 100)
    assert config["grid"] == (10, 15, 1)
    assert rest[2:5] == (100, 256, 352)


def test_deformable_attention_packs_levels(kernels: Kernels) -> None:
    shapes = [(2, 3), (4, 6)]
    kernels.deformable_attention(
        FakeArray((2, 30, 8, 32)), shapes, FakeArray((1, 30, 2), "float32"), FakeArray((2, 30, 8, 2, 4, 2)),
        FakeArray((2, 30, 8, 8)), FakeArray((2, 30, 8, 32)), 0,
    )  # fmt: skip
    ((_, config, name, rest),) = launches(kernels)
    assert name == "odise_attention_f16_8"
    assert config["grid"] == (-(-2 * 30 * 8 * 4 // 256), 1, 1)
    assert rest[4:12] == (2, 30, 30, 8, 32, 4, 1, 2)
    assert rest[12:20] == (2 << 32 | 3, 4 << 32 | 6, 0, 0, 0, 0, 0, 0)
    assert all(isinstance(v, np.int64) for v in rest[12:20])


def test_an_image_is_resized_across_then_down(kernels: Kernels) -> None:
    across = (FakeArray((90,), "int32"), FakeArray((3, 90), "int32", pointer=2 << 20))
    down = (FakeArray((64,), "int32", pointer=3 << 20), FakeArray((5, 64), "int32", pointer=4 << 20))
    pixels, between = (
        FakeArray((100, 70, 3), "uint8", pointer=5 << 20),
        FakeArray((100, 90, 3), "uint8", pointer=6 << 20),
    )
    canvas = FakeArray((3, 64, 96), "float32", pointer=7 << 20)
    kernels.resize(pixels, across, between, down, canvas, 0)
    (_, first_config, first, first_rest), (_, config, second, rest) = launches(kernels)
    assert (first, second) == ("odise_image_across", "odise_image_down")
    assert first_config["grid"] == (-(-100 * 90 // 256), 1, 1)
    assert config["grid"] == (64 * 96 // 256, 1, 1)
    assert first_rest == (5 << 20, 100, 70, 1 << 20, 2 << 20, 3, 90, 6 << 20)
    assert rest == (6 << 20, 90, 3 << 20, 4 << 20, 5, 64, 64, 96, 7 << 20)
    for wrong, message in [
        ((FakeArray((100, 70, 4), "uint8"), across, between, down, canvas), "pixels"),
        ((pixels, across, FakeArray((100, 70, 3), "uint8"), down, canvas), "between"),
        ((pixels, (across[0], FakeArray((90,), "int32")), between, down, canvas), "expected \\(taps, length\\)"),
        ((pixels, across, between, down, FakeArray((3, 60, 96), "float32")), "holds the image"),
        ((pixels, across, between, down, FakeArray((64, 96), "float32")), "expected"),
    ]:
        with pytest.raises(BackendError, match=message):
            kernels.resize(*wrong, 0)
    assert len(launches(kernels)) == 2


def test_windows_are_cut_and_stitched_by_their_layout(kernels: Kernels) -> None:
    canvas, windows = FakeArray((3, 96, 160), "float32"), FakeArray((4, 3, 64, 64), "float32", pointer=2 << 20)
    kernels.cut_windows(canvas, 2, windows, 0)
    kernels.stitch_windows(FakeArray((6, 3, 64, 64), "float32", pointer=2 << 20), canvas, 0)
    (_, _, cut, cut_rest), (_, config, stitch, rest) = launches(kernels)
    assert (cut, stitch) == ("odise_image_cut", "odise_image_stitch")
    assert cut_rest == (1 << 20, 3, 96, 160, 64, 64, 2, 3, 2, 4, 2 << 20)
    assert rest == (2 << 20, 3, 96, 160, 64, 64, 2, 3, 1 << 20)
    assert config["grid"] == (96 * 160 // 256, 1, 1)
    with pytest.raises(BackendError, match="4 windows, expected 2 x 3"):
        kernels.stitch_windows(windows, canvas, 0)
    with pytest.raises(BackendError, match="do not exist"):
        kernels.cut_windows(canvas, 3, windows, 0)
    with pytest.raises(BackendError, match="equal C"):
        kernels.cut_windows(canvas, 0, FakeArray((4, 2, 64, 64), "float32"), 0)


def test_masks_are_named_by_four_launches(kernels: Kernels) -> None:
    naming = NamingKernels(kernels)

    def at(step: int, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        return gpu_array(FakeArray(shape, dtype, pointer=step << 20), "x")

    cosines = (at(3, (100, 134)), at(4, (100, 133)))
    naming.text_cosines(at(1, (100, 256)), at(2, (134, 256)), 20.0, cosines[0], 0)
    classes = ClassArrays(
        at(5, (100, 81)), at(6, (100,), "int32"), at(7, (100,)), at(8, (100, 5), "int32"), at(9, (100, 5, 3))
    )
    first_word, weight = at(10, (81,), "int32"), at(11, (80,))
    thresholds, overlap = at(23, (2,)), at(24, (1,), "float64")
    naming.name_classes(*cosines, first_word, weight, None, thresholds, classes, 0, rank_all=True)
    segments = SegmentArrays(
        *(at(12 + i, (100,) if i != 1 else (2,), "float32" if i == 4 else "int32") for i in range(5)),
        at(17, (5, 100), "int32"),
    )
    areas, things = at(18, (3, 100), "int32"), at(19, (80,), "uint8")
    naming.choose_segments(classes.labels, classes.scores, areas, things, overlap, segments, 0)
    naming.paint_segments(at(20, (480, 640), "int16"), segments, at(21, (480, 640), "int32"), 0)
    names, arguments = zip(*((name, rest) for _, _, name, rest in launches(kernels)), strict=True)
    assert names == ("odise_name_cosines", "odise_name_classes", "odise_name_choose", "odise_name_paint")
    mib = 1 << 20
    assert arguments[0] == (mib, 2 * mib, 20.0, 100, 256, 134, 3 * mib)
    assert arguments[1] == (
        3 * mib, 4 * mib, 10 * mib, 11 * mib, 0, 23 * mib, 100, 133, 80, 5, 1, 0,
        *(step * mib for step in range(5, 10)),
    )  # fmt: skip
    assert [type(v) for v in arguments[1][4:13]] == [int, int, *[np.int32] * 6, int]
    assert type(arguments[0][2]) is np.float32
    assert arguments[2] == (
        6 * mib,
        7 * mib,
        18 * mib,
        19 * mib,
        24 * mib,
        100,
        *(step * mib for step in range(12, 18)),
    )
    assert arguments[3] == (20 * mib, 12 * mib, 13 * mib, 100, 480, 640, 17 * mib, 21 * mib)

    with pytest.raises(BackendError, match=r"probabilities is float32 \(100, 81\), expected float32 \(100, 80\)"):
        naming.name_classes(*cosines, at(10, (80,), "int32"), at(11, (79,)), None, thresholds, classes, 0)
    with pytest.raises(BackendError, match="mask_cosines"):  # the caption variant has no word for no object
        naming.name_classes(*cosines, first_word, weight, at(22, (100, 2)), thresholds, classes, 0)
    with pytest.raises(BackendError, match=r"expected \(Q, C\) and \(L, C\)"):
        naming.text_cosines(at(1, (100, 256)), at(2, (134, 255)), 20.0, cosines[0], 0)
    with pytest.raises(BackendError, match="things"):
        naming.choose_segments(classes.labels, classes.scores, areas, at(19, (80,), "int32"), overlap, segments, 0)
    with pytest.raises(BackendError, match="segment_map"):
        naming.paint_segments(at(20, (480, 640), "int16"), segments, at(21, (480, 641), "int32"), 0)
    with pytest.raises(BackendError, match=r"texts \(134,\), expected \(Q, C\) and \(L, C\)"):
        naming.text_cosines(at(1, (100, 256)), at(2, (134,)), 20.0, cosines[0], 0)
    with pytest.raises(BackendError, match=r"first_word \(81, 1\) and .* expected \(Q, L\), \(K \+ 1,\) and \(Q, N\)"):
        naming.name_classes(*cosines, at(10, (81, 1), "int32"), weight, None, thresholds, classes, 0)
    with pytest.raises(BackendError, match=r"things \(80, 1\), expected \(Q,\) and \(K,\)"):
        naming.choose_segments(classes.labels, classes.scores, areas, at(19, (80, 1), "uint8"), overlap, segments, 0)
    assert len(launches(kernels)) == 4

    # "Unknown" has a column of its own, and the kernel is told.
    with pytest.raises(BackendError, match=r"probabilities is float32 \(100, 81\), expected float32 \(100, 82\)"):
        naming.name_classes(*cosines, first_word, weight, None, thresholds, classes, 0, with_unknown=True)
    wider = dataclasses.replace(classes, probabilities=at(5, (100, 82)))
    naming.name_classes(*cosines, first_word, weight, None, thresholds, wider, 0, with_unknown=True)
    assert [rest[10:12] for _, _, _, rest in launches(kernels)[4:]] == [(0, 1)]


def test_arrays_that_do_not_fit_are_typed_errors(kernels: Kernels) -> None:
    good = {"logits": FakeArray((1, 4, 8, 8)), "features": FakeArray((1, 16, 8, 8))}
    workspace = FakeArray((1 << 22,), "uint8")
    pooled, areas = FakeArray((1, 4, 16)), FakeArray((1, 4), "int32")

    def pool(**changed: Any) -> None:
        a = {**good, "workspace": workspace, "pooled": pooled, "areas": areas, **changed}
        kernels.mask_pool(a["logits"], a["features"], a["workspace"], a["pooled"], a["areas"], 0)

    pool()
    for changed, message in [
        ({"logits": FakeArray((1, 4, 8, 9))}, "differ in batch"),
        ({"logits": FakeArray((1, 4, 8, 8), "float32")}, "of one type"),
        ({"logits": FakeArray((4, 8, 8))}, "expected"),
        ({"features": FakeArray((1, 16, 8, 8), "float64"), "logits": FakeArray((1, 4, 8, 8), "float64")}, "float64"),
        ({"workspace": FakeArray((16,), "uint8")}, "workspace has 16 bytes"),
        ({"workspace": FakeArray((1 << 22,), "uint8", pointer=(1 << 20) + 8)}, "aligned to 16"),
        ({"pooled": FakeArray((1, 4, 15))}, "pooled"),
        ({"areas": FakeArray((1, 4), "int64")}, "areas"),
        ({"features": FakeArray((1, 16, 8, 8), strides=(2048, 2, 256, 32))}, "C-contiguous"),
        ({"features": np.zeros((1, 16, 8, 8), np.float16)}, "came as ndarray"),
        ({"features": [1, 2]}, "came as list"),
    ]:
        with pytest.raises(BackendError, match=message):
            pool(**changed)
    assert len(launches(kernels)) == 2  # nothing was launched for those that do not fit


def test_contiguous_strides_and_bfloat16_bits_are_accepted() -> None:
    array = gpu_array(FakeArray((2, 1, 3), "uint16", strides=(6, 999, 2)), "x")
    assert (array.shape, array.dtype.name, array.nbytes) == ((2, 1, 3), "uint16", 12)
    assert native._dtype(gpu_array(FakeArray((1,), "V2"), "x"), "x") == BFLOAT16  # what torch calls bfloat16


# ---- what is not there -----------------------------------------------------------------------------------------------


def test_kernels_that_are_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(BackendError, match="make kernels"):
        kernel_file("mask_pooling.fatbin")


@pytest.mark.parametrize("stamp", [None, "0" * 64, "\xff"])
def test_kernels_of_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stamp: str | None) -> None:
    """Their arguments may be others: they are not launched."""
    write_fatbins(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert kernel_file("naming.fatbin") == tmp_path / "naming.fatbin"
    if stamp is None:
        (tmp_path / STAMP).unlink()
    else:
        (tmp_path / STAMP).write_text(stamp, encoding="latin-1")
    with pytest.raises(BackendError, match=r"not used: .*sources.*make kernels"):
        kernel_file("naming.fatbin")


def test_why_kernels_of_other_sources_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    write_fatbins(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert native.why_no_kernels() is None
    (tmp_path / STAMP).unlink()
    assert "not used" in str(native.why_no_kernels())


KERNELS_ERROR = """
from odise_rt.kernels.native import Kernels
from odise_rt.errors import MissingPackageError
try:
    Kernels()
except MissingPackageError as exc:
    print(exc)
"""


def test_without_cuda_core() -> None:
    code = "import sys; sys.modules['cuda'] = None\n" + KERNELS_ERROR
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'odise_rt[cuda]'" in done.stdout


def test_cuda_core_that_cannot_be_imported(tmp_path: Path) -> None:
    """As with cuda-bindings that are older than those it was built with."""
    (tmp_path / "cuda" / "core").mkdir(parents=True)
    (tmp_path / "cuda" / "core" / "__init__.py").write_text("raise ImportError('cydriver does not export a function')")
    (tmp_path / "cuda" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + KERNELS_ERROR
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be imported (cydriver does not export a function)" in done.stdout
    assert "pip install --upgrade cuda-core cuda-bindings" in done.stdout


@pytest.mark.skipif(fake_driver.why_not() is not None, reason=f"{fake_driver.why_not()}")
@pytest.mark.parametrize("found", [b"another architecture", b"fatbin"])
def test_kernels_that_the_gpu_cannot_run(
    install_gpu: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: bytes
) -> None:
    """Found when they are opened, where a segmenter can still do without them, and not by the first image."""
    install_gpu()
    write_fatbins(tmp_path, naming=found)
    monkeypatch.setitem(native.MODULES, "naming", "odise_name_choose" if found != b"fatbin" else "odise_name_nothing")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(BackendError, match=r"naming.fatbin do not run on GPU 0 of compute capability 9.0 .*CUDA_ERROR"):
        Kernels()


@pytest.mark.parametrize(
    ("reason", "error", "message"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", OutOfMemoryError, "windows_per_batch=1"),
        ("CUDA_ERROR_INVALID_VALUE", BackendError, "CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_a_launch_that_fails(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, reason: str, error: type[BackendError], message: str
) -> None:
    """As the first one of a kernel may, which loads its code."""

    def fail(plan: Any) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(kernels, "_kernel", fail)
    pixels = [FakeArray(shape, "float32") for shape in [(3, 64, 64), (1, 3, 64, 64)]]
    with pytest.raises(BackendError, match=f"kernel odise_image_cut.* could not be launched.*{message}") as caught:
        kernels.cut_windows(pixels[0], 0, pixels[1], 7)
    assert caught.type is error


def test_without_a_gpu() -> None:
    core = pytest.importorskip("cuda.core", reason="needs cuda-core")
    try:
        core.Device(0).set_current()
    except Exception:  # no driver or no device: what is tested
        with pytest.raises(BackendError, match="nvidia-smi"):
            Kernels()
    else:
        pytest.skip("this machine has a GPU")


# ---- the TensorRT plugin ---------------------------------------------------------------------------------------------


class FakePlugin(types.ModuleType):
    """Stands for tensorrt.plugin: keeps what is registered, and numbers as plain integers."""

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.parts: dict[tuple[str, str], Any] = {}
        self.TensorDesc = type("TensorDesc", (), {})
        self.KernelLaunchParams = types.SimpleNamespace
        self.SymInt32 = int
        self.SymExprs = type("SymExprs", (), {})
        self.SymIntExprs = types.SimpleNamespace(from_tuple=list)
        self.AutoTuneCombination = lambda *arguments: arguments
        self.cdiv = lambda a, b: -(-a // b)
        self.from_shape_expr = lambda shape, dtype: (shape, dtype)
        for kind in ("register", "autotune", "aot_impl"):
            setattr(self, kind, lambda name, kind=kind: lambda f: self.parts.__setitem__((kind, name), f))

    def __getattr__(self, name: str) -> Any:
        """``op.NAMESPACE.NAME(...)`` of what is registered: the name and the inputs, as a network gets them."""
        if name != "op":
            raise AttributeError(name)
        made = [full.split("::") for kind, full in self.parts if kind == "register"]
        calls = {last: lambda *inputs, last=last: (last, inputs) for _, last in made}
        return types.SimpleNamespace(**{space: types.SimpleNamespace(**calls) for space, _ in made})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakePlugin]:
    """A TensorRT that was made for this, and kernels to register with it."""
    from odise_rt.kernels import tensorrt_plugin

    trt, plugin = types.ModuleType("tensorrt"), FakePlugin()
    trt.__dict__.update(float16="f16", bfloat16="bf16", float32="f32", int32="i32", plugin=plugin, __version__="10.16")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    write_fatbins(tmp_path)
    (tmp_path / "mask_pooling.ptx").write_bytes(b"ptx")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    tensorrt_plugin.register.cache_clear()
    yield plugin
    tensorrt_plugin.register.cache_clear()


def test_plugin_launches_as_the_kernels_do(plugin: FakePlugin) -> None:
    from odise_rt.kernels import tensorrt_plugin

    tensorrt_plugin.register()

    for name in (tensorrt_plugin.SUMS, tensorrt_plugin.FINISH):
        # TensorRT counts outputs and checks kernels by these annotations (tensorrt/plugin/_validate.py).
        described = inspect.signature(plugin.parts["register", name])
        assert typing.get_args(described.return_annotation) == (plugin.TensorDesc, plugin.TensorDesc)
        assert all(p.annotation is plugin.TensorDesc for p in described.parameters.values())
        launched = inspect.signature(plugin.parts["aot_impl", name])
        assert [*launched.parameters] == [*described.parameters, "outputs", "tactic"]
        assert len(typing.get_args(launched.return_annotation)) == 4

    plan = plan_mask_pool(FLOAT16, 2, 150, 300, 24, GpuFacts(132, 48 << 10, 90))
    logits = types.SimpleNamespace(shape_expr=(2, 150, 4, 6), dtype="f16")
    features = types.SimpleNamespace(shape_expr=(2, 300, 4, 6), dtype="f16")
    name, ptx, launch, numbers = plugin.parts["aot_impl", tensorrt_plugin.SUMS](logits, features, None, 0)
    assert (name, ptx, numbers) == (plan.sums.kernel, b"ptx", [150, 300, 24, 66, 3])
    assert (launch.grid_y, launch.grid_z, launch.block_x) == (*plan.sums.grid[1:], plan.sums.threads)
    assert launch.shared_mem == plan.sums.shared_bytes <= 48 << 10
    sums = types.SimpleNamespace(shape_expr=(2, 66, 150, 300))
    name, _, launch, numbers = plugin.parts["aot_impl", tensorrt_plugin.FINISH](sums, None, features, None, 0)
    assert (launch.grid_x, launch.grid_y, launch.grid_z) == plan.finish.grid
    assert (launch.shared_mem, numbers) == (plan.finish.shared_bytes, [150, 300, 66])
    assert name in (SOURCES / "mask_pooling.cu").read_text(encoding="utf-8")


class FakeNetwork:
    """Stands for a network of TensorRT: its tensors are (layer, number), and layers keep what they were made of."""

    def __init__(self) -> None:
        self.layers: list[tuple[str, tuple[Any, ...], bool]] = []

    def add_plugin(self, call: tuple[str, tuple[Any, ...]], aot: bool) -> Any:
        number = len(self.layers)
        self.layers.append((*call, aot))
        return types.SimpleNamespace(get_output=lambda output: (number, output))


def test_the_plugin_stands_in_a_network_as_two_layers(plugin: FakePlugin) -> None:
    from odise_rt.kernels.tensorrt_plugin import FINISH, SUMS, add_mask_pool

    for _ in range(2):  # a second call finds the plugins registered
        network = FakeNetwork()
        pooled, areas = add_mask_pool(network, "logits", "features")
        assert network.layers == [
            (SUMS.split("::")[1], ("logits", "features"), True),
            (FINISH.split("::")[1], ((0, 0), (0, 1), "features"), True),
        ]
        assert (pooled, areas) == ((1, 0), (1, 1))
    for name, inputs in ((SUMS, 2), (FINISH, 3)):
        assert len(inspect.signature(plugin.parts["register", name]).parameters) == inputs, "as many as it is given"


def test_plugin_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    from odise_rt.kernels import tensorrt_plugin

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"odise_rt\[tensorrt\]"):
        tensorrt_plugin.import_plugin_api()
