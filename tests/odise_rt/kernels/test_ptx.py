"""The machine that runs PTX: what instructions do, what it finds, and that the kernels need each of their barriers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt.kernels.launch_plans import Launch
from tests.odise_rt.kernels.builds import library
from tests.odise_rt.kernels.compiled import MACHINE_FLAGS, MACHINE_SOURCE, Compiled
from tests.odise_rt.kernels.emulated import aligned_empty
from tests.odise_rt.kernels.ptx import Counts, Entry, Machine, PtxError, Reader
from tests.odise_rt.kernels.test_mask_pooling import check, problem
from tests.odise_rt.kernels.test_naming import Case
from tests.odise_rt.kernels.test_panoptic_merge import blobs

THREADS = 64
KERNEL = """
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 .ptr .align 1 kernel_param_1,
	.param .u64 kernel_param_2
)
.maxntid 64, 1, 1
{
	ld.param.u64 	%in, [kernel_param_0];
	ld.param.u64 	%other, [kernel_param_1];
	ld.param.u64 	%out, [kernel_param_2];
	mov.u32 	%tid, %tid.x;
	mov.u32 	%block, %ctaid.x;
	mad.lo.s32 	%index, %block, 64, %tid;
	mul.wide.s32 	%at, %index, 8;
	add.s64 	%pa, %in, %at;
	add.s64 	%pb, %other, %at;
	add.s64 	%pout, %out, %at;
	mov.u32 	%s, shared_memory;
	mul.lo.s32 	%s8, %tid, 8;
	add.s32 	%mine, %s, %s8;
BODY
	ret;
}
"""
"""``%pa``, ``%pb`` and ``%pout`` are a thread's own eight bytes of three arrays, ``%mine`` those of shared memory."""


@pytest.fixture(scope="session")
def machine(kernel_builds: Path) -> Machine:
    return Machine(library(kernel_builds, MACHINE_SOURCE, flags=MACHINE_FLAGS))


class Run:
    """Runs lines of PTX, one thread for each element."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.counts: Counts | None = None

    def __call__(
        self, *lines: str, a: np.ndarray | None = None, b: np.ndarray | None = None, blocks: int = 1, **options: Any
    ) -> np.ndarray:
        """The output, as int64 in the first place."""
        entry = Reader(KERNEL.replace("BODY", "\n".join(lines)), self.machine).entry("kernel")
        arrays = [aligned_empty(THREADS * blocks * 8, 64).view(np.int64) for _ in range(3)]
        for array, given in zip(arrays, (a, b, None), strict=True):
            array.fill(0)
            if given is not None:
                array.view(given.dtype)[:: array.itemsize // given.itemsize] = given
        pointers = [array.ctypes.data for array in arrays]
        self.counts = self.machine.run(entry, (blocks, 1, 1), THREADS, THREADS * 8, pointers, arrays, **options)
        return arrays[2]


@pytest.fixture
def run(machine: Machine) -> Run:
    return Run(machine)


# ---- what instructions do --------------------------------------------------------------------------------------------


def numbers(kind: type, seed: int) -> np.ndarray:
    """Of all sizes, with extremes and zeros."""
    random = np.random.default_rng(seed)
    if np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        some = random.integers(limits.min, limits.max, THREADS, dtype=kind, endpoint=True)
        some[:4] = 0, limits.max, limits.min, 1
    else:
        with np.errstate(over="ignore"):
            some = (random.normal(size=THREADS) * 10.0 ** random.integers(-6, 7, THREADS)).astype(kind)
        some[:6] = 0, -0.0, np.inf, -np.inf, np.nan, 1
    return some


def same(kind: type, found: np.ndarray, expected: np.ndarray) -> None:
    values = found.view(kind)[:: found.itemsize // np.dtype(kind).itemsize]
    np.testing.assert_array_equal(values, expected.astype(kind))


TWO = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
TYPES = {"s32": np.int32, "u32": np.uint32, "s64": np.int64, "f32": np.float32, "f64": np.float64}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("op", TWO)
def test_arithmetic_is_numpys(run: Run, op: str, kind: str) -> None:
    dtype, name = TYPES[kind], op
    if kind[0] == "f":
        if TWO[op] in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return
        name = op.removesuffix(".lo") + ("" if op in ("min", "max") else ".rn")
    elif op in ("and", "or", "xor"):
        kind = kind.replace("s", "b").replace("u", "b")
    a, b = numbers(dtype, 1), numbers(dtype, 2)[::-1].copy()
    found = run(
        f"ld.global.{kind} %a, [%pa];", f"ld.global.{kind} %b, [%pb];", f"{name}.{kind} %c, %a, %b;",
        f"st.global.{kind} [%pout], %c;", a=a, b=b,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        work = {"min": np.fmin, "max": np.fmax}.get(op, TWO[op]) if kind[0] == "f" else TWO[op]
        same(dtype, found, work(a, b))


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"])
def test_comparisons_of_what_is_no_number(run: Run, compare: str) -> None:
    a, b = numbers(np.float32, 1), numbers(np.float32, 3)
    b[10:20] = a[10:20]
    found = run(
        "ld.global.f32 %a, [%pa];", "ld.global.f32 %b, [%pb];", f"setp.{compare}.f32 %p, %a, %b;",
        "selp.u32 %c, 1, 0, %p;", "st.global.u32 [%pout], %c;", a=a, b=b,
    )  # fmt: skip
    plain = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }[compare.removesuffix("u")]  # fmt: skip
    unordered = np.isnan(a) | np.isnan(b)
    expected = np.where(unordered, compare.endswith("u"), plain(a, b))
    same(np.uint32, found, expected)


CONVERSIONS = {
    "cvt.s64.s32": (np.int32, np.int64, lambda v: v), "cvt.u32.u64": (np.uint64, np.uint32, lambda v: v),
    "cvt.rn.f32.s32": (np.int32, np.float32, lambda v: v), "cvt.rn.f64.u32": (np.uint32, np.float64, lambda v: v),
    "cvt.f32.f16": (np.float16, np.float32, lambda v: v),
    "cvt.rn.f32.f64": (np.float64, np.float32, lambda v: v),
    "cvt.rmi.f32.f32": (np.float32, np.float32, np.floor), "cvt.rpi.f32.f32": (np.float32, np.float32, np.ceil),
    "cvt.sat.f32.f32": (np.float32, np.float32, lambda v: np.nan_to_num(np.clip(v, 0, 1))),
    "cvt.rzi.s32.f32": (
        np.float32, np.int32,
        lambda v: np.clip(np.trunc(np.nan_to_num(v.astype(np.float64), posinf=9e9, neginf=-9e9)), -(2**31), 2**31 - 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", CONVERSIONS)
def test_conversions_are_numpys(run: Run, op: str) -> None:
    source, target, work = CONVERSIONS[op]
    _, *_, to, start = op.split(".")
    load, store = (kind.replace("f16", "b16") for kind in (start, to))
    values = numbers(source, 5)
    found = run(f"ld.global.{load} %a, [%pa];", f"{op} %c, %a;", f"st.global.{store} [%pout], %c;", a=values)
    with np.errstate(all="ignore"):
        same(target, found, work(values))


def test_rounding_to_half_is_numpys(run: Run) -> None:
    values = numbers(np.float32, 6)
    values[10:16] = 65519.996, 65520, 6.1e-5, 2.0**-25, 3 * 2.0**-25, 1 + 2.0**-11
    found = run("ld.global.f32 %a, [%pa];", "cvt.rn.f16.f32 %c, %a;", "st.global.b16 [%pout], %c;", a=values)
    with np.errstate(all="ignore"):
        same(np.float16, found, values)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["shl.b32 %c, %a, 3;"], lambda a: a << np.uint32(3)),
        (["shl.b32 %c, %a, 32;"], lambda a: a * 0),
        (["shr.s32 %c, %a, 40;"], lambda a: a.view(np.int32) >> 31),
        (["shr.u32 %c, %a, 7;"], lambda a: a >> np.uint32(7)),
        (["bfi.b32 %c, %a, -1, 4, 8;"], lambda a: (a & np.uint32(255)) << np.uint32(4) | ~np.uint32(0xFF0)),
        (["popc.b32 %c, %a;"], lambda a: [bin(v).count("1") for v in a]),
        (["clz.b32 %c, %a;"], lambda a: [32 - int(v).bit_length() for v in a]),
        (["brev.b32 %c, %a;"], lambda a: [int(f"{v:032b}"[::-1], 2) for v in a]),
        (["mov.b32 {%x, %y}, %a;", "mov.b32 %c, {%y, %x};"], lambda a: a >> np.uint32(16) | a << np.uint32(16)),
        (["mul.wide.u32 %w, %a, %a;", "shr.u64 %v, %w, 32;", "cvt.u32.u64 %c, %v;"],
         lambda a: (a.astype(np.uint64) ** np.uint64(2)) >> np.uint64(32)),
        (["not.b32 %c, %a;"], lambda a: ~a),
    ],
)  # fmt: skip
def test_bits(run: Run, lines: list[str], expected: Callable[[np.ndarray], Any]) -> None:
    values = numbers(np.uint32, 7)
    found = run("ld.global.u32 %a, [%pa];", *lines, "st.global.u32 [%pout], %c;", a=values)
    same(np.uint32, found, np.asarray(expected(values)))


def test_lanes_that_part_meet_again(run: Run) -> None:
    """Odd lanes go round a loop as often as their number says; then all vote."""
    found = run(
        "and.b32 %odd, %tid, 1;", "setp.eq.s32 %even, %odd, 0;", "mov.u32 %n, %tid;", "mov.u32 %sum, 0;",
        "@%even bra $L__done;", "$L__loop:", "add.s32 %sum, %sum, %n;", "add.s32 %n, %n, -1;",
        "setp.gt.s32 %more, %n, 0;", "@%more bra $L__loop;", "$L__done:", "setp.ne.s32 %any, %sum, 0;",
        "vote.sync.ballot.b32 %bits, %any, -1;", "mul.lo.s32 %c, %sum, 2;", "st.global.u32 [%pout], %c;",
        "st.global.u32 [%pout+4], %bits;",
    )  # fmt: skip
    thread = np.arange(THREADS)
    words = found.view(np.uint32).reshape(-1, 2)
    assert words[:, 0].tolist() == [n * (n + 1) if n % 2 else 0 for n in thread]
    assert set(words[:, 1].tolist()) == {0xAAAAAAAA}


@pytest.mark.parametrize(
    ("mode", "by", "source"),
    [("bfly", 5, lambda lane: lane ^ 5), ("idx", 7, lambda lane: 7), ("down", 3, lambda lane: lane + 3 * (lane < 29))],
)
def test_shuffles(run: Run, mode: str, by: int, source: Callable[[int], int]) -> None:
    found = run(
        f"shfl.sync.{mode}.b32 %c|%p, %tid, {by}, 31, -1;", "st.global.u32 [%pout], %c;",
    )  # fmt: skip
    assert found.tolist() == [t // 32 * 32 + source(t % 32) for t in range(THREADS)]


# ---- what it finds ---------------------------------------------------------------------------------------------------

WRITE, READ = "st.shared.u64 [%mine], %tid;", "ld.shared.u64 %c, [%s];"
FAULTS = {
    "a race in shared memory": [WRITE, READ],
    "a race in shared memory ": ["st.shared.u32 [%s], %tid;"],
    "shared memory is read that nobody wrote": ["ld.shared.u64 %c, [%mine];"],
    "8 bytes outside of the 512 bytes of shared memory": ["st.shared.u64 [%mine+8], %tid;"],
    "bytes of shared memory that are not aligned": ["st.shared.u64 [%mine+4], %tid;"],
    "bytes of global memory that are not aligned": ["ld.global.v2.u32 {%c, %d}, [%pa+4];"],
    "bytes of global memory outside of every array": ["add.s64 %far, %pa, 1048576;", "ld.global.u32 %c, [%far];"],
    "a race in global memory": ["st.global.u64 [%out], %tid;"],
    "a race in global memory ": ["st.global.u64 [%pout], %tid;", "ld.global.u64 %c, [%out];"],
    "a race in global memory  ": ["st.global.u32 [%pa], %tid;", "ld.global.nc.u32 %c, [%pa];"],
    "a barrier waits for a warp that has ended": ["setp.lt.s32 %p, %tid, 32;", "@%p ret;", "bar.sync 0;"],
    "wait for each other at different places": [
        "setp.lt.s32 %p, %tid, 7;", "@%p bra $L__one;", "vote.sync.ballot.b32 %c, %p, -1;", "bra.uni $L__two;",
        "$L__one:", "vote.sync.ballot.b32 %c, %p, -1;", "$L__two:",
    ],
    "lanes that must act together are told apart": ["setp.lt.s32 %p, %tid, 7;", "@%p vote.sync.ballot.b32 %c, %p, -1;"],
    "lanes are not named that take part": ["setp.lt.s32 %p, %tid, 7;", "vote.sync.ballot.b32 %c, %p, 255;"],
    "a division by zero": ["div.u32 %c, %tid, 0;"],
    "shared memory is touched while a copy is under way": [
        "and.b32 %even, %tid, -2;", "mul.lo.s32 %e8, %even, 8;", "add.s32 %to, %s, %e8;", "mul.wide.s32 %e, %even, 8;",
        "add.s64 %from, %in, %e;", "and.b32 %odd, %tid, 1;", "setp.eq.s32 %p, %odd, 0;",
        "@%p cp.async.cg.shared.global [%to], [%from], 16, 16;", "cp.async.commit_group;", "cp.async.wait_group 1;",
        "bar.sync 0;", "ld.shared.u64 %c, [%mine];",
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_found(run: Run, message: str) -> None:
    with pytest.raises(PtxError, match=message.strip()):
        run(*FAULTS[message])


def test_what_barriers_and_waits_order_is_no_fault(run: Run) -> None:
    run(WRITE, "bar.sync 0;", READ, "bar.sync 0;", WRITE)
    lines = FAULTS["shared memory is touched while a copy is under way"]
    found = run(
        *[line.replace("wait_group 1", "wait_group 0") for line in lines], "st.global.u64 [%pout], %c;",
        a=np.arange(THREADS),
    )  # fmt: skip
    assert found.tolist() == list(range(THREADS))
    found = run("atom.global.add.u32 %c, [%out], 1;")
    assert found[0] == THREADS


def test_blocks_have_no_order(run: Run) -> None:
    """One block writes what another reads, whichever comes first."""
    lines = ["sub.s32 %r, 127, %index;", "mul.wide.s32 %r8, %r, 8;", "add.s64 %theirs, %out, %r8;",
             "st.global.u64 [%pout], %tid;", "bar.sync 0;", "ld.global.u64 %c, [%theirs];"]  # fmt: skip
    for backwards in (False, True):
        with pytest.raises(PtxError, match="a race in global memory"):
            run(*lines, blocks=2, backwards=backwards)


def test_an_unknown_instruction_is_an_error(run: Run) -> None:
    with pytest.raises(PtxError, match="op 'frobnicate' is not written"):
        run("frobnicate.b32 %c, %tid;")


def test_a_launch_must_fit_its_kernel(machine: Machine) -> None:
    entry = Reader(KERNEL.replace("BODY", ""), machine).entry("kernel")
    with pytest.raises(PtxError, match="takes 3 arguments and was given 2"):
        machine.run(entry, (1, 1, 1), 64, 0, [0, 0], [])
    with pytest.raises(PtxError, match="argument 1 of kernel has 8 bytes"):
        machine.run(entry, (1, 1, 1), 64, 0, [0, np.int32(0), 0], [])
    with pytest.raises(PtxError, match="launched with 96 threads, and made for 64"):
        machine.run(entry, (1, 1, 1), 96, 0, [0, 0, 0], [])


def test_what_is_counted(run: Run) -> None:
    run("ld.global.u64 %a, [%pa];", "shl.b32 %by, %tid, 5;", "and.b32 %far, %by, 480;", "add.s32 %x, %s, %far;",
        "ld.shared.u32 %c, [%x];", watch=False)  # fmt: skip
    assert run.counts is not None
    assert run.counts.instructions["ld.global"] == 2, "two warps"
    assert run.counts.sectors == 2 * 32 * 8 // 32
    assert (run.counts.wavefronts, run.counts.conflicts) == (8, 6), "16 words, of which four share each of four banks"
    assert run.counts.lanes == 32 * run.counts.total


# ---- the kernels -----------------------------------------------------------------------------------------------------


def pool(compiled: Compiled, kind: str, queries: int) -> None:
    """With every depth of the pipeline that there is."""
    stage = (128 + (128 if queries > 32 else 32)) * 64
    for stages in range(2, 9):
        check(
            compiled, problem(1, queries, 40, 1, 416, kind), kind, shared_limit=stages * stage + 3000, multiprocessors=1
        )


def merge(compiled: Compiled) -> None:
    compiled.panoptic_merge(*blobs(60, (32, 32), seed=1), (128, 128), (150, 147))


def name(compiled: Compiled) -> None:
    for case in (Case.new(300, queries=2), Case.new(40, queries=2, variant="caption")):
        case.emulated(compiled, 3, 0.35, True)


def choose(compiled: Compiled) -> None:
    areas = np.full((3, 40), 9, np.int32)
    compiled.segments(
        np.arange(40, dtype=np.int32) % 3, np.ones(40, np.float32), np.zeros((1, 1), np.int16), areas,
        np.array([0, 1, 0], np.uint8), 0.5,
    )  # fmt: skip


def paint(compiled: Compiled) -> None:
    owner = np.repeat(np.arange(2, dtype=np.int16), 800).reshape(40, 40)
    ones = np.ones(2, np.float32)
    compiled.segments(np.zeros(2, np.int32), ones, owner, np.full((3, 2), 800, np.int32), np.ones(1, np.uint8), 0.5)


CASES: dict[str, Callable[[Compiled], None]] = {
    "odise_pool_sums_f16_8": lambda compiled: pool(compiled, "float16", 40),
    "odise_pool_sums_bf16_2": lambda compiled: pool(compiled, "bfloat16", 20),
    "odise_pool_simt_f32_2": lambda compiled: pool(compiled, "float32", 20),
    "odise_pool_finish_f16": lambda compiled: pool(compiled, "float16", 20),
    "odise_merge_f32": merge,
    "odise_name_cosines": name,
    "odise_name_classes": name,
    "odise_name_choose": choose,
    "odise_name_paint": paint,
}


@pytest.mark.parametrize("kernel", CASES)
def test_no_barrier_can_be_left_out(
    compiled_for: Callable[[int], Compiled], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """Without any one of them there is a race, and the machine sees it: so there is none with them."""
    compiled = compiled_for(90)
    CASES[kernel](compiled)
    kernels = compiled.kernels
    barriers = kernels.places(kernel, "bar.sync")
    assert barriers
    for at in barriers:
        without = kernels.entry(kernel).changed(at, op=kernels.machine.number("op", "nop"))
        monkeypatch.setitem(kernels.instead, kernel, without)
        with pytest.raises(PtxError, match=r"race|nobody wrote"):
            CASES[kernel](compiled)


@pytest.mark.parametrize("kernel", ["odise_pool_sums_f16_8", "odise_pool_sums_bf16_2"])
def test_no_wait_can_be_shorter(
    compiled_for: Callable[[int], Compiled], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    compiled = compiled_for(90)
    kernels = compiled.kernels
    waits = kernels.places(kernel, "cp.async.wait_group")
    assert len(waits) == 7, "for two to eight stages"
    for at in waits:
        entry = kernels.entry(kernel)
        longer = entry.program[at]["operand"] + np.eye(1, len(entry.program[at]["operand"]), dtype=np.int64)[0]
        monkeypatch.setitem(kernels.instead, kernel, entry.changed(at, operand=longer))
        with pytest.raises(PtxError, match="while a copy is under way"):
            CASES[kernel](compiled)


LOADS = {
    "odise_pool_finish_f16": ("f32", 10), "odise_pool_simt_f32_7": ("f32", 30), "odise_merge_f16": ("u16", 24),
    "odise_name_cosines": ("f32", 8), "odise_name_paint": ("u32", 8), "odise_image_cut": ("f32", 3),
}  # fmt: skip
"""Loads of global memory, by type, that must be under way at once."""


def most_loads_under_way(entry: Entry, kind: str) -> int:
    """The most loads of a type, in the order of the text, before any of what they bring is used or a barrier waits."""
    most, loads, waiting = 0, 0, set[str]()
    for line in entry.lines:
        operation, _, operands = re.sub(r"^@!?%\w+\s", "", line.strip()).partition(" ")
        registers = re.findall(r"%\w+", operands)
        if operation.startswith("ld.global") and operation.endswith(kind):
            waiting.update(re.findall(r"%\w+", operands.partition("[")[0]))
            loads += 1
            most = max(most, loads)
        elif operation.startswith("mov.") and registers[-1] in waiting:
            waiting.add(registers[0])
        elif operation.startswith("bar.") or not waiting.isdisjoint(registers):
            loads, waiting = 0, set()
    return most


@pytest.mark.parametrize("kernel", LOADS)
def test_loads_are_under_way_together(compiled_for: Callable[[int], Compiled], kernel: str) -> None:
    """A load that waits for the one before, for want of independent code, costs its whole latency."""
    kind, least = LOADS[kernel]
    assert most_loads_under_way(compiled_for(90).kernels.entry(kernel), kind) >= least


@pytest.mark.parametrize("capability", [75, 90])
def test_the_order_of_blocks_and_warps_changes_nothing(
    compiled_for: Callable[[int], Compiled], monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    compiled = compiled_for(capability)
    logits, features, *_ = problem(2, 40, 60, 8, 32, "float16")
    masks, scores = blobs(30, (16, 16))

    def results() -> list[np.ndarray]:
        pooled = compiled.mask_pool(logits, features, shared_limit=65_536)
        return [*pooled, *compiled.panoptic_merge(masks, scores, (64, 64), (70, 51))]

    forwards = results()
    monkeypatch.setitem(compiled.kernels.options, "backwards", True)
    for one, other in zip(forwards, results(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_second_kernel_of_the_tensorrt_plugin(compiled_for: Callable[[int], Compiled], kind: str) -> None:
    """It is given the features, too, and does with the sums what the other one does."""
    compiled = compiled_for(80)
    random = np.random.default_rng(0)
    queries, channels, splits = 3, 130, 5
    sums = random.normal(size=(1, splits, queries, channels)).astype(np.float32)
    counts = np.array([[[3, 0, 7]] * splits], np.int32)
    suffix, dtype = {"float16": ("f16", np.dtype(np.float16)), "bfloat16": ("bf16", np.dtype(np.uint16))}[kind]
    pooled = [np.zeros((1, queries, channels), dtype) for _ in range(2)]
    areas = [np.zeros((1, queries), np.int32) for _ in range(2)]
    for after, out, area in zip(("", "_after"), pooled, areas, strict=True):
        plan = Launch(f"odise_pool_finish{after}_{suffix}", (2, queries, 1), 256, (8 * 128 + 1) * 4)
        a, b, c, d = (array.pointer for array in compiled.kernels.put(sums, counts, out, area))
        features = [0] if after else []
        compiled.kernels.launch(plan, 0, a, b, *features, *map(np.int32, (queries, channels, splits)), c, d)
    np.testing.assert_array_equal(*pooled)
    np.testing.assert_array_equal(*areas)
    assert areas[0].tolist() == [[15, 0, 35]]
    assert pooled[0][0, 0].any()
    assert not pooled[0][0, 1].any()
