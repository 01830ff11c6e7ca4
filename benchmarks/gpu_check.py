"""Everything there is to check and to measure on an NVIDIA GPU, in one command and under eight minutes.

Kernels against float64 on fresh random inputs; their times beside floor and PyTorch; the way of an image from pixels to
segments around a network that only copies; every stage of a bundle on every engine that is installed; the whole network
at full size. Each part runs in a process of its own for a bounded time; what is not installed is a row that says what
is missing. Writes OUT.json and OUT.md. The exit status is 1 if a result is wrong, a part broke, a part that checks
correctness or was named gave no result at all, or there is no GPU.

    python -m benchmarks.gpu_check --out benchmarks/results/gpu/h200
    python -m benchmarks.gpu_check --quick --parts kernels "kernel times"
    python -m benchmarks.gpu_check --parts sanitizer                        # two minutes more, where a result is wrong
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import (
    Clock,
    Emit,
    Part,
    Row,
    Target,
    failed,
    judge_targets,
    markdown,
    row_writer,
    run_part,
    without_result,
)
from benchmarks.harness import environment, write_results
from benchmarks.machine import REPOSITORY
from benchmarks.preparation import TINY_CHECKPOINT
from odise_rt.command_line import CommandParser, real_number
from odise_rt.files import atomic_writer

TOTAL_SECONDS = 465.0
"""Time for the whole check; starting and writing make it eight minutes."""
PARTS = (
    Part("machine", 30, "GPU, driver and packages"),
    Part("kernels", 70, "kernels against float64"),
    Part("kernel times", 60, "kernel times"),
    Part("graphs", 40, "pixels to segments around a network that only copies"),
    Part("engines", 80, "stages on engines"),
    Part("official network", 50, "official structure, PyTorch eager"),
    Part("pruned network", 85, "pruned structure, torch.compile"),
    Part("runtime", 50, "odise_rt, pixels to segments"),
)
ON_DEMAND = (Part("sanitizer", 160, "kernels under compute-sanitizer"),)
"""Parts that only run when they are asked for."""
CORRECTNESS = ("kernels", "graphs", "engines")
"""Parts without whose results the check says nothing, so that it fails where nothing came of one of them."""
_AT_1024 = "1024x1024"
TARGETS = (
    Target(
        "mask_pool fp16: share of copy bandwidth", 0.6, ("mask_pool float16 C=256 Q=100 256x352", "of_copy_bandwidth")
    ),
    Target("mask_pool fp16: times PyTorch", 2, ("mask_pool float16 C=256 Q=100 256x352", "times_faster")),
    Target(
        "panoptic_merge: times PyTorch", 5, ("panoptic_merge float32 blobs 100x256x256 to 1024x1024", "times_faster")
    ),
    Target(
        "deformable_attention fp16: times PyTorch",
        3,
        ("deformable_attention float16 21504 queries, 3 levels", "times_faster"),
    ),
    Target(
        "runtime: times the official structure",
        3,
        (f"official eager fp16 {_AT_1024}", "median_ms"),
        (f"runtime {_AT_1024}", "pixels_to_segments_ms"),
    ),
    Target(
        "runtime: times torch.compile",
        1.3,
        (f"pruned compiled fp16 {_AT_1024}", "median_ms"),
        (f"runtime {_AT_1024}", "pixels_to_segments_ms"),
    ),
    Target("runtime: share of the matmul rate", 0.3, (f"runtime {_AT_1024}", "of_matmul_rate")),
)
PACKAGES = (
    "cuda-core",
    "cuda-bindings",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "diffusers",
    "open_clip_torch",
)
"""Packages whose versions decide what the other rows are worth."""
NO_GPU = 1


def main(argv: list[str] | None = None) -> int:
    """Run the check, or one part of it in a child process; returns the exit status."""
    options = parse(argv)
    if options.emit is not None:
        return run_child(options)
    problem = no_gpu()
    if problem is not None:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return NO_GPU
    rows: list[Row] = []
    for found in run_parts(options, child_command):
        rows += found
        write_report(options, rows)  # what is measured stays, whatever ends the next part
    rows += judge_targets(TARGETS, rows)
    print("\n" + write_report(options, rows))
    print(f"written to {options.out}.json and {options.out}.md")
    text, status = verdict(rows, options.parts, CORRECTNESS if options.all_parts else options.parts)
    print("\n" + text)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    names = [part.name for part in PARTS]
    on_demand = [part.name for part in ON_DEMAND]
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*names, *on_demand],
        help=f"Only these parts; {', '.join(on_demand)} runs only if it is named.",
    )
    parser.add_argument("--quick", action="store_true", help="Fewer sizes and repeats: a minute or two.")
    parser.add_argument(
        "--seconds",
        type=real_number(0, above=True),
        default=TOTAL_SECONDS,
        help="Time of the whole check: parts are cut to fit, and get what others leave.",
    )
    parser.add_argument(
        "--bundle", type=Path, default=REPOSITORY / "out" / "odise-tiny", help="Bundle of the engine part."
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=TINY_CHECKPOINT, help="The checkpoint that the bundle was exported from."
    )
    parser.add_argument(
        "--full-bundle",
        type=Path,
        help="Bundle of full size for the runtime part, perhaps of noise (benchmarks.weightless). Default: none.",
    )
    parser.add_argument("--config", default="odise-sd1", help="Preset of the PyTorch networks.")
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "out" / "gpu-check",
        help="Report without ending: .json and .md are added.",
    )
    parser.add_argument("--emit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.all_parts = options.parts is None
    options.parts = options.parts or names
    if options.emit is not None and len(options.parts) != 1:
        parser.error("--emit goes with one part")
    return options


def verdict(rows: list[Row], parts: Sequence[str], required: Sequence[str]) -> tuple[str, int]:
    """What the check comes to, and its exit status.

    Args:
        rows: of all parts.
        parts: that were run.
        required: those of them without whose results the check is none.
    """
    silent = without_result(rows, parts)
    lines = ["FAILED: see the rows marked fail or error" if failed(rows) else "no result is wrong"]
    if silent:
        lines.append(f"NO RESULT from: {', '.join(silent)}; their rows say what is missing")
    return "\n".join(lines), int(failed(rows) or any(part in required for part in silent))


def no_gpu() -> str | None:
    """Why nothing can be checked here, or ``None``."""
    hint = "gpu_check needs a machine with an NVIDIA GPU, its driver and a CUDA build of PyTorch"
    try:
        import torch
    except ImportError:
        return f"PyTorch is not installed: {hint}"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU: {hint}; run `nvidia-smi` and `odise-rt doctor`"
    return None


def child_command(options: argparse.Namespace, part: Part, rows_file: Path) -> list[str]:
    """What runs one part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--parts", part.name, "--emit", str(rows_file)]
    command += ["--bundle", str(options.bundle), "--checkpoint", str(options.checkpoint), "--config", options.config]
    if options.full_bundle is not None:
        command += ["--full-bundle", str(options.full_bundle)]
    return [*command, "--quick"] if options.quick else command


def run_parts(
    options: argparse.Namespace, command: Callable[[argparse.Namespace, Part, Path], list[str]]
) -> Iterator[list[Row]]:
    """The rows of all parts that were asked for, one after the other."""
    clock = Clock(options.seconds)
    with tempfile.TemporaryDirectory(prefix="odise-gpu-check-") as folder:
        parts = [part for part in (*PARTS, *ON_DEMAND) if part.name in options.parts]
        for number, part in enumerate(parts, 1):
            seconds = clock.share(part, parts[number:])
            print(f"{part.title} (at most {seconds:.0f} s)", flush=True)
            rows_file = Path(folder) / "rows.jsonl"
            yield run_part(part, command(options, part, rows_file), rows_file, seconds)


def run_child(options: argparse.Namespace) -> int:
    """One part, its rows into the file that the parent reads."""
    emit = row_writer(options.emit)
    part = options.parts[0]
    try:
        run_one(part, emit, options)
    except Exception as exc:  # whatever broke is a row; the parent goes on
        from odise_rt.errors import BackendError, MissingPackageError

        lacking = isinstance(exc, MissingPackageError) or (isinstance(exc, BackendError) and "not built" in str(exc))
        text = str(exc) or type(exc).__name__
        emit(
            Row(
                part,
                part,
                "missing" if lacking else "error",
                detail=text if lacking else f"{type(exc).__name__}: {text}",
            )
        )
    return 0


def run_one(part: str, emit: Emit, options: argparse.Namespace) -> None:
    """Call what makes the rows of a part."""
    from benchmarks import gpu_kernels, gpu_network

    if part == "machine":
        machine(emit)
    elif part == "kernels":
        gpu_kernels.check_kernels(emit, options.quick)
    elif part == "kernel times":
        gpu_kernels.time_kernels(emit, options.quick)
    elif part == "graphs":
        from benchmarks import gpu_graphs

        gpu_graphs.check(emit)
    elif part == "engines":
        gpu_network.check_engines(emit, options.bundle, options.checkpoint, options.quick)
    elif part == "sanitizer":
        from benchmarks import gpu_sanitizer

        gpu_sanitizer.check(emit, seconds=ON_DEMAND[0].seconds - 10)
    elif part == "runtime":
        gpu_network.time_runtime(emit, options.full_bundle, options.config, options.quick)
    else:
        gpu_network.time_pytorch(emit, part.split()[0], options.config, options.quick)


def machine(emit: Emit) -> None:
    """What the other rows were measured on."""
    import torch

    facts = torch.cuda.get_device_properties(0)
    emit(
        Row("machine", "GPU", "measured", values={
            "name": facts.name, "compute_capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count, "memory_gib": facts.total_memory / 2**30,
            "cuda": str(torch.version.cuda), "torch": torch.__version__,
        })
    )  # fmt: skip
    import importlib.metadata

    for package in PACKAGES:
        try:
            emit(Row("machine", package, "measured", values={"version": importlib.metadata.version(package)}))
        except importlib.metadata.PackageNotFoundError:
            emit(Row("machine", package, "missing", detail=f"pip install {package}"))


def write_report(options: argparse.Namespace, rows: list[Row]) -> str:
    """Both files, each written beside its place and renamed; returns the page."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "environment": environment(threads=1),
    }
    base: Path = options.out
    write_results(base.with_name(base.name + ".json"), {"benchmark": "gpu_check", **facts, "rows": rows})
    gpu = next((str(row.values.get("name")) for row in rows if row.name == "GPU"), "unknown")
    commit = f"{facts['environment']['commit']}{' (changed)' if facts['environment']['dirty'] else ''}"
    page = markdown(rows, {"GPU": gpu, "commit": commit, "date": facts["date"], "quick": facts["quick"]})
    with atomic_writer(base.with_name(base.name + ".md")) as file:
        file.write(page.encode())
    return page


if __name__ == "__main__":
    raise SystemExit(main())
