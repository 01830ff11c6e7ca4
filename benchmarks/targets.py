"""The speed that this project set out to reach, as ratios inside one run, and what a run reached."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness import paired_ratio
from benchmarks.results import Run


@dataclass(frozen=True)
class Target:
    """One bound and what was measured."""

    what: str
    bound: float
    at_most: bool
    value: float | None
    """``None``: the run did not measure it."""

    @property
    def met(self) -> bool | None:
        """Whether the value keeps the bound; ``None`` without a value."""
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


_BF16 = (
    ("pruned", "our pruned PyTorch eager, float32", 0.6),
    ("compile", "torch.compile, float32", 0.8),
    ("compile-bf16", "torch.compile, bfloat16", 0.8),
)
"""What OpenVINO in bfloat16, which a processor may lack, is compared with: variant, its name, and the bound."""


def targets_of(run: Run) -> list[Target]:
    """The targets that apply to the run's model."""
    tiny = run.model.get("config") == "odise-tiny"
    found = []
    if tiny:
        found += [
            Target("odise_rt over our pruned PyTorch eager", 0.6, True, _over(run, "runtime", "pruned")),
            Target("odise_rt over torch.compile", 0.8, True, _over(run, "runtime", "compile")),
            *(
                Target(f"odise_rt (OpenVINO, bfloat16) over {name}", bound, True, ratio)
                for base, name, bound in _BF16
                if (ratio := _over(run, "runtime-openvino-bf16", base)) is not None
            ),
        ]
    else:
        found.append(
            Target("odise_rt over the official structure, eager", 0.5, True, _over(run, "runtime", "official"))
        )
    found.append(Target("share of a picture outside the graphs", 0.15 if tiny else 0.08, True, _outside(run)))
    if run.group("words"):
        found.append(Target("10,000 cached words over 100", 1.2, True, _words(run)))
    if run.group("sizes"):
        found.append(Target("R² of time as a line in windows", 0.99, False, run.fits.get("sizes", {}).get("r2")))
    return found


def _over(run: Run, first: str, second: str) -> float | None:
    """Median of the ratios of two variants by round."""
    results = {r.variant: r for r in run.group("peers") if r.status == "ok"}
    if first not in results or second not in results:
        return None
    return paired_ratio(results[first].samples, results[second].samples).median


def _outside(run: Run) -> float | None:
    found = next((r for r in run.group("peers") if r.variant == "runtime" and r.status == "ok"), None)
    return None if found is None else float(found.facts["outside_share"])


def _words(run: Run) -> float | None:
    results = {r.variant: r for r in run.group("words") if r.status == "ok"}
    many = results.get("10000 words")
    return None if many is None or many.ratio is None else many.ratio.summary.median
