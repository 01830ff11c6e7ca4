"""The speed that this project set out to reach, as ratios inside one run, and what a run reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import Summary, paired_ratio
from benchmarks.noise import exceeds, floor_of, noise_bound
from benchmarks.results import Run

Verdict = Literal["not measured", "met", "missed", "undecided"]


@dataclass(frozen=True)
class Target:
    """One bound and what was measured."""

    what: str
    bound: float
    at_most: bool
    value: float | None
    """``None``: the run did not measure it."""
    noise: float = 0.0
    """Relative difference from the bound that may be noise; 0 where the value has no spread."""

    @property
    def verdict(self) -> Verdict:
        """Whether the value keeps the bound, as far as noise lets that be said."""
        if self.value is None:
            return "not measured"
        if self.noise and not exceeds(self.value / self.bound - 1.0, self.noise):
            return "undecided"
        kept = self.value <= self.bound if self.at_most else self.value >= self.bound
        return "met" if kept else "missed"


_BF16 = (
    ("pruned", "our pruned PyTorch eager, float32", 0.6),
    ("compile", "torch.compile, float32", 0.8),
    ("compile-bf16", "torch.compile, bfloat16", 0.8),
)
"""What OpenVINO in bfloat16, which a processor may lack, is compared with: variant, its name, and the bound."""


def targets_of(run: Run) -> list[Target]:
    """The targets that apply to the run's model."""
    tiny = run.model.get("config") == "odise-tiny"
    floor = floor_of(run)

    def ratio(what: str, bound: float, measured: Summary | None) -> Target:
        if measured is None:
            return Target(what, bound, True, None)
        return Target(what, bound, True, measured.median, noise_bound(measured, floor=floor))

    found = []
    if tiny:
        found += [
            ratio("odise_rt over our pruned PyTorch eager", 0.6, _over(run, "runtime", "pruned")),
            ratio("odise_rt over torch.compile", 0.8, _over(run, "runtime", "compile")),
            *(
                ratio(f"odise_rt (OpenVINO, bfloat16) over {name}", bound, measured)
                for base, name, bound in _BF16
                if (measured := _over(run, "runtime-openvino-bf16", base)) is not None
            ),
        ]
    else:
        found.append(ratio("odise_rt over the official structure, eager", 0.5, _over(run, "runtime", "official")))
    found.append(Target("share of a picture outside the graphs", 0.15 if tiny else 0.08, True, _outside(run)))
    if run.group("words"):
        found.append(ratio("10,000 cached words over 100", 1.2, _words(run)))
    if run.group("sizes"):
        found.append(Target("R² of time as a line in windows", 0.99, False, run.fits.get("sizes", {}).get("r2")))
    return found


def _over(run: Run, first: str, second: str) -> Summary | None:
    """Ratios of two variants by round."""
    results = {r.variant: r for r in run.group("peers") if r.status == "ok"}
    if first not in results or second not in results:
        return None
    return paired_ratio(results[first].samples, results[second].samples)


def _outside(run: Run) -> float | None:
    found = next((r for r in run.group("peers") if r.variant == "runtime" and r.status == "ok"), None)
    return None if found is None else float(found.facts["outside_share"])


def _words(run: Run) -> Summary | None:
    results = {r.variant: r for r in run.group("words") if r.status == "ok"}
    many = results.get("10000 words")
    return None if many is None or many.ratio is None else many.ratio.summary
