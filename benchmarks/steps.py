"""What each step from the official structure to the runtime buys, by ratios of the same rounds of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness import Summary, paired_ratio
from benchmarks.noise import exceeds, floor_of, noise_bound
from benchmarks.results import Result, Run
from benchmarks.variants import WATERFALL


@dataclass(frozen=True)
class Step:
    """One step that was measured, on top of those before it."""

    name: str
    result: Result
    before: Result | None
    """The step before; ``None``: this is the first."""
    of_before: Summary
    """Ratios to the step before, 1 for the first."""
    of_first: Summary
    bound: float
    """Relative change beyond which :attr:`of_before` is not noise."""

    @property
    def saved(self) -> float:
        """Seconds of the step before that this one saves, by the ratio; negative where it costs some."""
        return 0.0 if self.before is None else self.before.seconds * (1.0 - self.of_before.median)

    @property
    def is_noise(self) -> bool:
        """Whether a step of nothing could have been measured so."""
        return not exceeds(self.of_before.median - 1.0, self.bound)


def steps_of(run: Run, steps: Sequence[tuple[str, str]] = WATERFALL) -> list[Step | tuple[str, Result]]:
    """Steps in their order; of one that has no samples its name and the result that says why."""
    results, floor = {r.variant: r for r in run.group("peers")}, floor_of(run)
    found: list[Step | tuple[str, Result]] = []
    first: Result | None = None
    before: Result | None = None
    for variant, name in steps:
        result = results.get(variant)
        if result is None:
            continue
        if result.status != "ok":
            found.append((name, result))
            continue
        first = first or result
        of_before = paired_ratio(result.samples, (before or result).samples)
        of_first = paired_ratio(result.samples, first.samples)
        found.append(Step(name, result, before, of_before, of_first, noise_bound(of_before, floor=floor)))
        before = result
    return found
