"""A small run made of numbers that are easy to follow, for tests of comparison, report and README tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.machine import Rates
from benchmarks.results import Result, Run, add_ratios
from benchmarks.variants import VARIANTS

SECONDS = {"official": 0.4, "step-pruning": 0.3, "step-batching": 0.26, "pruned": 0.2, "ort-portable": 0.12}
SECONDS |= {"runtime": 0.1, "runtime-again": 0.101}
FAILED = {"compile": ("failed", "InductorError: no compiler"), "runtime-fp16": ("oom", "needs 9 GiB")}
STAGES = {
    "preprocess": 0.02,
    "clip_image": 0.1,
    "unet_tap": 0.5,
    "mask_decoder": 0.2,
    "clip_mask": 0.1,
    "panoptic": 0.08,
}
WORK = {"flops": 2e9, "bytes": 4e6, "moved_bytes": 9e7, "gflops": 50.0, "roofline_share": 0.4}


def make_run(seed: int = 0, spread: float = 0.01, rounds: int = 20, scale: dict[str, float] | None = None) -> Run:
    """A CPU run of odise-tiny.

    Args:
        seed: of the noise.
        spread: relative standard deviation of samples.
        rounds: samples of each variant.
        scale: variant to a factor on its time.
    """
    rng = np.random.default_rng(seed)
    scale = scale or {}
    environment: dict[str, Any] = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "python": "3.11.0",
        "packages": {"numpy": "2.0", "torch": None},
        "cpu": "Test CPU",
        "cpu_features": ["avx2"],
        "cores": 2,
        "threads": 2,
        "memory_gib": 24.0,
        "system": "Linux x86_64",
        "gpus": [],
    }
    run = Run("cpu", "python -m benchmarks.run --suite cpu", False, environment)
    run.rates = [Rates({"numpy": 100.0, "torch": 150.0}, 20.0), Rates({"numpy": 110.0, "torch": 148.0}, 21.0)]
    run.clocks = [{"when": "start", "cpu_mhz": [2600, 2601], "gpu": [], "load_average_1min": 0.1}]
    run.model = {"config": "odise-tiny", "weights": "odise-tiny", "size": [256, 256], "bundles": {}}
    run.seconds = 321.0

    def samples(seconds: float) -> list[float]:
        return [float(s) for s in seconds * np.exp(spread * rng.standard_normal(rounds))]

    peers = [_peer(v, samples(s * scale.get(v, 1.0))) for v, s in SECONDS.items()]
    peers += [
        Result.missing(f"peers/256x256/{v}", VARIANTS[v].label, status, reason)  # type: ignore[arg-type]
        for v, (status, reason) in FAILED.items()
    ]
    sizes = []
    for side in (128, 256, 512, 1024):
        facts = {"size": [side, side], "windows": (side // 128) ** 2, "outside_share": 0.1, "peak_bytes": 2e8}
        seconds = samples((0.01 + 0.02 * facts["windows"]) * scale.get("sizes", 1.0))  # type: ignore[operator]
        sizes.append(Result.measured(f"sizes/{side}", f"odise_rt, {side}", seconds, facts=facts))
    batches = [
        Result.measured(
            f"batches/256x256/{count} windows",
            f"odise_rt, {count} at a time",
            samples(0.2 + 0.1 / count),
            facts={"size": [512, 512], "windows": 16, "peak_bytes": 1e8 * count},
        )
        for count in (1, 4)
    ]
    words = [
        Result.measured(
            f"words/256x256/{count} words",
            f"odise_rt, {count}",
            samples(0.1 + count * 1e-6),
            stages={"words": {"seconds": 1e-4}, "classify": {"seconds": count * 1e-6}},
            facts={"words": count},
        )
        for count in (100, 10_000)
    ]
    run.results = add_ratios(peers, "peers/256x256/pruned") + sizes
    run.results += add_ratios(batches, "batches/256x256/1 windows") + add_ratios(words, "words/256x256/100 words")
    run.results.append(Result.measured("cold/256x256/runtime", "odise_rt", samples(1.2), facts={"load_seconds": 1.0}))
    run.results.append(
        Result.measured("vocabulary/10 new words/runtime", "odise_rt, 10", samples(0.05), facts={"words": 10})
    )
    run.fits = {"sizes": {"slope": 0.02, "intercept": 0.01, "r2": 0.9999, "points": 4, "exponent": 0.98}}
    return run


def _peer(variant: str, samples: list[float]) -> Result:
    median = sorted(samples)[len(samples) // 2]
    stages = {name: {"seconds": share * median} for name, share in STAGES.items()}
    for name in ("clip_image", "unet_tap", "mask_decoder", "clip_mask"):
        stages[name] |= WORK
    facts = {"size": [256, 256], "windows": 4, "words": 9, "threads": 2, "device": "cpu", "peak_bytes": 3e8}
    facts["segments"] = 9
    facts |= {"load_seconds": 2.0, "outside_share": 0.1, "engine": "test"}
    accuracy = {"scenes": 50, "pq": {"all": 41.25, "seen": 45.0, "unseen": 26.0}, "class_agreement": 0.9999}
    accuracy["picture"] = {"mask_logits_error": 1.5e-4, "mask_embedding_cosine": 0.99987, "class_agreement": 0.9876}
    return Result.measured(
        f"peers/256x256/{variant}", VARIANTS[variant].label, samples, stages=stages, facts=facts, accuracy=accuracy
    )
