"""How the cost of a picture grows with its size and with the number of words; both for the runtime, in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Summary, interleave
from benchmarks.plan import Bench
from benchmarks.preparation import Missing
from benchmarks.results import Result, add_ratios
from benchmarks.stage_costs import outside_share
from benchmarks.variants import VARIANTS
from benchmarks.worker import Worker, WorkerError

VARIANT = "runtime"


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares of a straight line, weighted by 1/y² so that small values count as much as large ones.

    Returns:
        ``slope``, ``intercept``, and ``r2``: the share of the weighted variance of y that the line explains.

    Raises:
        ValueError: fewer than three points, or a y that is not positive.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) < 3 or not (ys > 0).all():
        raise ValueError(f"a fit needs three points with positive values, got {len(xs)}")
    weights = 1.0 / ys**2
    mean_x, mean_y = (float((weights * v).sum() / weights.sum()) for v in (xs, ys))
    slope = float((weights * (xs - mean_x) * (ys - mean_y)).sum() / (weights * (xs - mean_x) ** 2).sum())
    intercept = mean_y - slope * mean_x
    rest = float((weights * (ys - slope * xs - intercept) ** 2).sum())
    total = float((weights * (ys - mean_y) ** 2).sum())
    return {"slope": slope, "intercept": intercept, "r2": 1.0 - rest / total if total else 1.0, "points": len(xs)}


def measure_sizes(bench: Bench) -> None:
    """Square pictures of growing size, words cached; and the line through time over windows."""
    plan = bench.plan
    names = {str(side): {"height": side, "width": side, "own_peak": True} for side in sorted(plan.sizes)}
    repeats = max(3, plan.repeats // 6)
    results = _measure(bench, "sizes", names, repeats, "{0} x {0} pixels")
    ok = [r for r in results if r.status == "ok"]
    if len(ok) >= 3:
        windows = [r.facts["windows"] for r in ok]
        bench.fits["sizes"] = linear_fit(windows, [r.seconds for r in ok])
        # log-log slope: 1 is linear, 2 quadratic
        large = [(math.log(w), math.log(r.seconds)) for w, r in zip(windows, ok, strict=True) if w >= 4]
        if len(large) >= 3:
            xs, ys = zip(*large, strict=True)
            bench.fits["sizes"]["exponent"] = float(np.polyfit(xs, ys, 1)[0])
    bench.results += results


def measure_batches(bench: Bench) -> None:
    """One picture of several windows, of which more or fewer run at a time."""
    side = 2 * max(bench.plan.size)
    names = {
        f"{count} windows": {"height": side, "width": side, "windows_per_batch": count, "own_peak": True}
        for count in bench.plan.batches
    }
    results = _measure(bench, "batches", names, max(3, bench.plan.repeats // 2), "{0} at a time")
    bench.results += add_ratios(results, f"batches/{bench.plan.size_text}/{bench.plan.batches[0]} windows")


def measure_words(bench: Bench) -> None:
    """Measure the same picture with vocabularies of growing size, all embedded before."""
    plan = bench.plan
    names = {f"{count} words": {"words": f"#{count}"} for count in plan.word_counts}
    results = _measure(bench, "words", names, plan.repeats, "{0}, cached")
    base = f"words/{plan.size_text}/{'100' if 100 in plan.word_counts else plan.word_counts[0]} words"
    bench.results += add_ratios(results, base)


def _measure(bench: Bench, group: str, requests: dict[str, dict[str, Any]], repeats: int, label: str) -> list[Result]:
    plan = bench.plan
    job = bench.job(VARIANT)
    keys = {name: f"{group}/{name}" if group == "sizes" else f"{group}/{plan.size_text}/{name}" for name in requests}
    labels = {name: f"{VARIANTS[VARIANT].label}, {label.format(name)}" for name in requests}
    facts: dict[str, Any] = {"threads": plan.threads, "device": plan.device, "implementation": VARIANT}
    if isinstance(job, Missing):
        return [Result.missing(keys[n], labels[n], job.status, job.reason, facts=facts) for n in requests]
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in requests}
    failed: dict[str, WorkerError] = {}
    try:
        worker = Worker(job)
    except WorkerError as exc:
        return [Result.missing(keys[n], labels[n], exc.status, str(exc), facts=facts) for n in requests]
    with worker:
        for request in requests.values():
            if "words" in request:
                seconds = worker.request("cached_words", count=int(request["words"][1:]))["seconds"]
                bench.say(f"{request['words'][1:]} words embedded in {seconds:.2f} s")

        def runner(name: str) -> Any:
            def run() -> float:
                answer = worker.request("run", **requests[name])
                answers[name].append(answer)
                return float(answer["seconds"])

            return run

        def on_failure(name: str, exc: Exception) -> None:
            if not isinstance(exc, WorkerError):
                raise exc
            failed[name] = exc
            bench.say(f"{name}: {exc}")

        samples = interleave({n: runner(n) for n in requests}, repeats, 1, None, on_failure)
    results = []
    for name in requests:
        if name not in samples:
            results.append(
                Result.missing(keys[name], labels[name], failed[name].status, str(failed[name]), facts=facts)
            )
            continue
        measured = answers[name][-repeats:]
        last = measured[-1]
        stages = {stage: Summary.of([a["stages"][stage] for a in measured]).median for stage in last["stages"]}
        side = requests[name].get("height")
        more = {
            "size": [side, side] if side else list(plan.size),
            "windows": last["windows"],
            "words": last["words"],
            "engine": last["engine"],
            "precision": last["precision"],
            "bundle": last["bundle"],
            "segments": last["segments"],
            # Of the first round, in which sizes only grew: an engine keeps what a larger picture once needed.
            "peak_bytes": int(answers[name][0]["peak_bytes"]),
            "outside_share": outside_share(stages, sum(stages.values())),
        }
        bench.say(f"{name:12} {Summary.of(samples[name]).median:9.4f} s, {last['windows']} windows")
        entry = {stage: {"seconds": seconds} for stage, seconds in stages.items()}
        results.append(Result.measured(keys[name], labels[name], samples[name], stages=entry, facts=facts | more))
    return results
