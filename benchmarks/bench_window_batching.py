"""Does it pay to run windows of concurrent images together? Several threads on one model, with and without.

    python -m benchmarks.bench_window_batching BUNDLE
    python -m benchmarks.bench_window_batching BUNDLE --device cuda --callers 8 --max-batch-windows 16

Each round segments the same images on the same number of threads, once with every call on its own and once with
``WindowBatching``; the ratio is taken within a round, so that a slow minute of a shared machine hits both. Words are
encoded beforehand.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Summary, interleave, paired_ratio
from odise_rt import Segmenter, SegmentOptions
from odise_rt.backends.select import MAX_THREADS
from odise_rt.backends.window_batching import WindowBatching
from odise_rt.command_line import CommandParser, command, whole_number

WORDS = "car; truck; tree; stuff: sky; stuff: road"


def measure(
    bundle: Path, device: str, callers: int, images: int, repeats: int, threads: int | None, batching: WindowBatching
) -> dict[str, Any]:
    """Time both ways; plain JSON types. Seconds are of one round of ``images`` images."""
    runs: list[tuple[int, int]] = []
    alone = Segmenter.load(bundle, device=device, threads=threads)  # type: ignore[arg-type]
    shared = Segmenter.load(
        bundle,
        device=device,  # type: ignore[arg-type]
        threads=threads,
        window_batching=batching,
        batch_observer=lambda stage, windows, sharers: runs.append((windows, sharers)),
    )
    facts = alone.facts
    # One window an image: what is there to gain is between images, not within one.
    side = facts.window
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (side, side, 3)).astype(np.uint8) for _ in range(images)]

    options = SegmentOptions(short_edge=side, long_edge=max(side, facts.test_long_edge))

    def round_of(segmenter: Segmenter) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            with ThreadPoolExecutor(callers) as pool:
                list(pool.map(lambda picture: segmenter.segment(picture, WORDS, options), pictures))
            return time.perf_counter() - started

        return run

    with alone, shared:
        for segmenter in (alone, shared):
            segmenter.prepare(WORDS)
        samples = interleave({"alone": round_of(alone), "together": round_of(shared)}, repeats, warmup=1)
    ratio = paired_ratio(samples["together"], samples["alone"])
    return {
        "bundle": alone.bundle.name,
        "engine": alone.bundle.precision + ", " + alone.device,
        "window": side,
        "callers": callers,
        "images": images,
        "seconds": {name: Summary.of(values).median for name, values in samples.items()},
        "ratio": {"median": ratio.median, "p10": ratio.p10, "p90": ratio.p90, "rounds": ratio.count},
        "windows_per_run": float(np.mean([windows for windows, _ in runs])),
        "callers_per_run": float(np.mean([sharers for _, sharers in runs])),
    }


@command("nothing was measured")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = CommandParser(prog="python -m benchmarks.bench_window_batching", description=__doc__)
    parser.add_argument("bundle", type=Path, help="The bundle's folder.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="What runs the model.")
    parser.add_argument(
        "--threads",
        type=whole_number(1, MAX_THREADS),
        help="CPU threads inside an operator. Default: all usable cores.",
    )
    parser.add_argument("--callers", type=whole_number(1), default=4, help="Threads that segment.")
    parser.add_argument("--images", type=whole_number(1), default=12, help="Images in a round.")
    parser.add_argument("--repeats", type=whole_number(1), default=7, help="Measured rounds.")
    parser.add_argument("--max-batch-windows", type=int, help="Windows in one run. Default: the engine's choice.")
    parser.add_argument("--batch-wait-ms", type=float, default=0.0, help="Milliseconds to wait for a batch to fill.")
    args = parser.parse_args(argv)
    batching = WindowBatching(args.max_batch_windows, args.batch_wait_ms / 1000)
    result = measure(args.bundle, args.device, args.callers, args.images, args.repeats, args.threads, batching)
    print(json.dumps(result, indent=1))
    ratio = result["ratio"]
    print(
        f"together takes {ratio['median']:.3f} of the time of each alone (10 to 90 %: {ratio['p10']:.3f} to "
        f"{ratio['p90']:.3f}, {ratio['rounds']} rounds); {result['callers_per_run']:.1f} callers a run"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
