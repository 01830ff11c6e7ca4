"""Counts what the kernels do at the model's sizes: instructions, memory, bank conflicts. Needs nvcc, no GPU.

    python -m tests.odise_rt.kernels.count_work

prints the table of ``docs/kernels.md``. It counts PTX, which the machine of ``ptx.py`` runs. What a GPU runs is made of
it by ptxas: fewer instructions where it saves some, more where it has none. No time is measured: the shortest time is
what the warp schedulers of an H200 would need if each of them issued an instruction in every cycle.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tests.odise_rt.kernels.compiled import Compiled, PtxKernels
from tests.odise_rt.kernels.emulated import aligned_empty
from tests.odise_rt.kernels.test_deformable_attention import problem as attention_problem
from tests.odise_rt.kernels.test_panoptic_merge import blobs

MULTIPROCESSORS, SCHEDULERS, GIGAHERTZ, SHARED_BYTES = 132, 4, 1.75, 232_448
"""Of an H200; the clock as in ``docs/kernels.md``."""


ALIGNMENT = 256
"""Bytes: where memory of a GPU begins."""


def placed(array: np.ndarray) -> np.ndarray:
    """The array as it would lie on a GPU."""
    memory = aligned_empty(array.nbytes, ALIGNMENT).view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


def cases(compiled: Compiled) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls, inputs made when they are asked for."""
    random = np.random.default_rng(0)
    half = np.float16
    logits, features = (placed(random.normal(size=(1, n, 256, 352)).astype(half)) for n in (100, 256))
    yield (
        "mask_pool",
        lambda: compiled.mask_pool(logits, features, multiprocessors=MULTIPROCESSORS, shared_limit=SHARED_BYTES),
    )
    masks, scores = blobs(100, (256, 256))
    smooth, noise = placed(masks.astype(half)), placed(random.normal(0, 3, masks.shape).astype(half))
    size = (1024, 1024)
    yield "panoptic_merge, masks", lambda: compiled.panoptic_merge(smooth, scores, size, size)
    yield "panoptic_merge, noise", lambda: compiled.panoptic_merge(noise, scores, size, size)
    shapes = [(32, 32), (64, 64), (128, 128)]
    stored, _ = attention_problem("float16", 1, 21_504, 8, 32, 4, shapes, 0)
    value, *rest = (placed(array) for array in stored)
    yield "deformable_attention", lambda: compiled.deformable_attention(value, shapes, *rest)
    pixels = placed(random.integers(0, 256, (3000, 4000, 3), dtype=np.uint8))
    yield "resize", lambda: compiled.resize(pixels, (1024, 1365), (1024, 1408))
    windows = placed(random.normal(size=(6, 256, 128, 128)).astype(np.float32))
    yield "stitch_windows", lambda: compiled.stitch_windows(windows, (256, 352))
    embeddings, words = (placed(random.normal(size=(n, 256)).astype(np.float32)) for n in (100, 10_000))
    yield "text_cosines, 10,000 words", lambda: compiled.text_cosines(embeddings, words, 20.0)


def table(compiled: Compiled) -> list[str]:
    """A line of Markdown for each kernel."""
    kernels = compiled.kernels
    lines = [
        "| call | kernel | instructions of warps | at least | lanes | global memory | bank conflicts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, call in tqdm(list(cases(compiled)), unit="call"):
        kernels.launched.clear()
        call()
        for plan, counts in kernels.launched:
            shortest = counts.total / (MULTIPROCESSORS * SCHEDULERS * GIGAHERTZ * 1e3)
            lines.append(
                f"| {name} | {plan.kernel.removeprefix('odise_')} | {counts.total / 1e6:.2f} M | {shortest:.1f} µs "
                f"| {counts.lanes / counts.total:.1f} | {counts.sectors * 32 / 1e6:.1f} MB "
                f"| {counts.conflicts / max(1, counts.wavefronts):.0%} |"
            )
            name = ""
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capability", type=int, default=90, help="compute capability, 90 for 9.0 (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = PtxKernels(Path(folder), arguments.capability)
    kernels.options |= {"watch": False, "approximate": False}
    compiled = Compiled(kernels)
    compiled.alignment = ALIGNMENT
    print("\n".join(table(compiled)))


if __name__ == "__main__":
    main()
