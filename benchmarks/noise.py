"""When is a difference a difference? One stated bound for every comparison.

Two kinds of numbers are compared. A *ratio* of variants of the same rounds of one run has lost what the machine did
meanwhile; an *absolute* time has not. In both, a difference counts only beyond

    bound = FLOOR + 3 · sqrt(e_a² + e_b²)   (+ drift, for absolute times)

on the natural logarithm, with ``e_b`` 0 where a ratio is compared with a number (1 for a step that buys nothing, or a
target). ``e`` is the standard error of a median, estimated from the spread between p10 and p90; ``FLOOR`` is what two
identical variants were seen to differ by (an A/A pair is part of every run, and the larger of the constant and what
that pair shows is taken), and ``drift`` is by how much the machine's own matmul rate differed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import Summary
from benchmarks.results import Result, Run

FLOOR = 0.05
"""Smallest relative difference that is ever called one: placement of memory and code alone makes some per cent."""
SIGMAS = 3.0
_P10_P90_SIGMAS = 2.563
"""Distance between the 10th and 90th percentile of a normal distribution in standard deviations."""
_MEDIAN_FACTOR = 1.2533
"""Standard error of a median over that of a mean, for normal samples: sqrt(pi / 2)."""
_ONE_SAMPLE = 0.10
"""Assumed relative standard error of a single sample, which shows no spread."""

AA_PAIR = ("runtime", "runtime-again")
"""Variants of one run that are the same: their ratio is noise by construction."""

Verdict = Literal["slower", "faster", "same", "new", "gone", "broken", "fixed", "still missing"]
REGRESSIONS: tuple[Verdict, ...] = ("slower", "gone", "broken")


@dataclass(frozen=True)
class Difference:
    """One result in two runs."""

    key: str
    label: str
    kind: Literal["ratio", "absolute"]
    before: float | None
    """Median ratio or seconds in the base run."""
    after: float | None
    change: float | None
    """after / before - 1."""
    bound: float | None
    """Relative change beyond which it is not noise; see the module."""
    verdict: Verdict
    note: str = ""


def relative_error(summary: Summary) -> float:
    """Relative standard error of a median, from the spread of its samples."""
    if summary.count < 2:
        return _ONE_SAMPLE
    spread = max(summary.p90 - summary.p10, 0.0) / _P10_P90_SIGMAS / max(summary.median, 1e-12)
    # Few samples show less than their true spread: what three samples span is not 80 % of the distribution.
    small = 1.0 + 2.0 / summary.count
    return _MEDIAN_FACTOR * small * spread / math.sqrt(summary.count)


def floor_of(*runs: Run) -> float:
    """The floor for comparisons between or inside runs: :data:`FLOOR`, or what their A/A pairs differ by if more."""
    seen = [FLOOR]
    for run in runs:
        for first in (r for r in run.results if r.variant == AA_PAIR[0] and r.status == "ok"):
            again = run.find(f"{first.key.rsplit('/', 1)[0]}/{AA_PAIR[1]}")
            if again is not None and again.status == "ok":
                seen.append(abs(math.log(again.seconds / first.seconds)))
    return max(seen)


def drift_between(first: Run, second: Run) -> float:
    """How much the machine's matmul rate differed, as a natural logarithm; 0 if a run has none."""
    if not first.rates or not second.rates:
        return 0.0
    shared = set(first.best_rates.matmul_gflops) & set(second.best_rates.matmul_gflops)
    logs = [math.log(first.best_rates.matmul_gflops[n] / second.best_rates.matmul_gflops[n]) for n in shared]
    return max((abs(value) for value in logs), default=0.0)


def noise_bound(*medians: Summary, floor: float, drift: float = 0.0) -> float:
    """Relative change, always positive, beyond which two medians differ, or one (of ratios) from a number."""
    error = math.hypot(*(relative_error(median) for median in medians))
    return math.exp(floor + SIGMAS * error + drift) - 1.0


def exceeds(change: float, bound: float) -> bool:
    """Whether a relative change (after / before - 1) leaves the bound; slower and faster are treated alike."""
    return abs(math.log1p(change)) > math.log1p(bound)


def compare(base: Run, run: Run) -> list[Difference]:
    """Every result of either run, in the order of the newer one.

    Results that have a ratio to the same result in both runs are compared by it, all others by their seconds.
    """
    floor, drift = floor_of(base, run), drift_between(base, run)
    differences = []
    for result in run.results:
        before = base.find(result.key)
        if before is None:
            verdict: Verdict = "new" if result.status == "ok" else "still missing"
            after = result.seconds if result.status == "ok" else None
            differences.append(
                Difference(result.key, result.label, "absolute", None, after, None, None, verdict, result.reason)
            )
        elif "ok" in (before.status, result.status) and before.status != result.status:
            verdict = "fixed" if result.status == "ok" else "broken"
            differences.append(
                Difference(
                    result.key,
                    result.label,
                    "absolute",
                    before.seconds if before.status == "ok" else None,
                    result.seconds if result.status == "ok" else None,
                    None,
                    None,
                    verdict,
                    result.reason or before.reason,
                )
            )
        elif result.status != "ok":
            note = result.reason
            differences.append(
                Difference(result.key, result.label, "absolute", None, None, None, None, "still missing", note)
            )
        else:
            differences.append(_compare_measured(before, result, floor, drift))
    for before in base.results:
        if run.find(before.key) is None and before.status == "ok":
            differences.append(
                Difference(before.key, before.label, "absolute", before.seconds, None, None, None, "gone")
            )
    return differences


def _compare_measured(before: Result, after: Result, floor: float, drift: float) -> Difference:
    paired = before.ratio is not None and after.ratio is not None and before.ratio.to == after.ratio.to != after.key
    if paired:
        assert before.ratio is not None
        assert after.ratio is not None
        first, second, bound_drift = before.ratio.summary, after.ratio.summary, 0.0
    else:
        assert before.summary is not None
        assert after.summary is not None
        first, second, bound_drift = before.summary, after.summary, drift
    change = second.median / first.median - 1.0
    bound = noise_bound(first, second, floor=floor, drift=bound_drift)
    verdict: Verdict = "same"
    if exceeds(change, bound):
        verdict = "slower" if change > 0 else "faster"
    kind: Literal["ratio", "absolute"] = "ratio" if paired else "absolute"
    note = "" if before.facts.get("threads") == after.facts.get("threads") else "thread counts differ"
    return Difference(after.key, after.label, kind, first.median, second.median, change, bound, verdict, note)


def incomparable(base: Run, run: Run) -> list[str]:
    """Reasons why absolute times of two runs should not be compared; empty if there are none."""
    reasons = []
    for name in ("cpu", "cores", "threads", "gpus"):
        left, right = base.environment.get(name), run.environment.get(name)
        if name == "gpus":
            left, right = ([g.get("name") for g in gpus or []] for gpus in (left, right))
        if left != right:
            reasons.append(f"{name} differs: {left} in the base, {right} now")
    if base.model.get("config") != run.model.get("config"):
        reasons.append(f"the model differs: {base.model.get('config')} in the base, {run.model.get('config')} now")
    return reasons
