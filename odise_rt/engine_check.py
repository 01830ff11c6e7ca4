"""Whether an engine computes what it should: its outputs beside expected ones, whatever the engine is.

An engine that was compiled for a device may be fast and wrong (NVIDIA/TensorRT issue 4813 is about grid sampling), so
each one carries inputs and expected outputs, and is compared with them on the device before it is trusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.errors import BackendError
from odise_rt.specs import StageSpec

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Bounds:
    """How far an output may be from the expected one, relative to the largest value of the expected one."""

    max: float
    """Bound on the largest error, divided by that value."""
    mean: float
    """Bound on the mean error, divided by that value."""


FP32_BOUNDS: dict[str, Bounds] = {
    "clip_image": Bounds(1e-4, 1e-5),
    "unet_tap": Bounds(2e-4, 2e-5),
    # A pixel or patch whose logit is within rounding of the threshold may move one query.
    "mask_decoder": Bounds(3e-2, 1e-4),
    "clip_mask": Bounds(1e-2, 1e-4),
    "clip_text": Bounds(1e-4, 1e-5),
}
"""Stage to how far two float32 implementations of it may be apart."""


@dataclass(frozen=True)
class Case:
    """Inputs of a stage and the outputs that are expected for them."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class OutputCheck:
    """One output of one case. Errors are absolute."""

    case: int
    output: str
    scale: float
    """Largest absolute value that was expected."""
    max_error: float
    """Largest error of finite values."""
    mean_error: float
    not_finite: int
    """Number of NaN and infinite values among what was found."""
    passed: bool

    @property
    def relative_max(self) -> float:
        """Largest error, divided by the scale."""
        return self.max_error / max(self.scale, 1e-30)

    @property
    def relative_mean(self) -> float:
        """Mean error, divided by the scale."""
        return self.mean_error / max(self.scale, 1e-30)

    def describe(self, bounds: Bounds) -> str:
        """One sentence for a person."""
        if self.not_finite:
            return f"{self.output} of case {self.case} has {self.not_finite} NaN or infinite values"
        return (
            f"{self.output} of case {self.case} is off by at most {self.relative_max:.1e} (allowed {bounds.max:.0e}) "
            f"and on average {self.relative_mean:.1e} (allowed {bounds.mean:.0e}) of its scale"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def check_output(found: np.ndarray, expected: np.ndarray, bounds: Bounds, output: str, case: int = 0) -> OutputCheck:
    """Compare one output.

    Args:
        found: what the engine gave.
        expected: finite, of the same shape and dtype.
        bounds: relative to the largest absolute value of ``expected``.
        output: its name, for the report.
        case: number of the case, for the report.

    Raises:
        BackendError: another shape or dtype than expected.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise BackendError(
            f"{output} of case {case} is {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}: a "
            "symbolic dimension became a constant; build it again"
        )
    finite = np.isfinite(found)
    not_finite = int(finite.size - np.count_nonzero(finite))
    error = np.abs(np.where(finite, found, 0).astype(np.float64) - expected)
    scale = float(np.abs(expected).max(initial=0.0))
    largest, mean = float(error.max(initial=0.0)), float(error.mean()) if error.size else 0.0
    passed = not_finite == 0 and largest <= bounds.max * scale and mean <= bounds.mean * scale
    return OutputCheck(case, output, scale, largest, mean, not_finite, passed)


def check_stage(
    run: Callable[[Arrays], Arrays], spec: StageSpec, cases: Sequence[Case], bounds: Bounds
) -> list[OutputCheck]:
    """Run every case and compare every output.

    Args:
        run: the engine.
        spec: of the stage.
        cases: at least one.
        bounds: for every output.

    Raises:
        BackendError: a case does not fit the stage, an output has another shape, or the engine failed.
    """
    if not cases:
        raise BackendError(f"stage {spec.name}: there is nothing to compare with; build the engine again")
    checks = []
    for number, case in enumerate(cases):
        spec.check(case.inputs)
        found = run(case.inputs)
        for tensor in spec.outputs:
            checks.append(check_output(found[tensor.name], case.outputs[tensor.name], bounds, tensor.name, number))
    return checks
