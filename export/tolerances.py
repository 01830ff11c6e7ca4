"""How far an exported graph may be from PyTorch, in one table for every export and the tests.

Errors are relative to the scale of the tensor, its largest absolute value in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.precision import EnginePrecision, Precision
from odise_rt.engine_check import FP32_BOUNDS, Bounds


@dataclass(frozen=True)
class Tolerance:
    """Bounds for the outputs of one stage."""

    bounds: Bounds
    reason: str


@dataclass(frozen=True)
class Agreement:
    """Bounds for whole results on an image."""

    panoptic: float
    """Share of pixels that must belong to the same segment."""
    semantic: float
    """Share of pixels that must get the same class."""
    reason: str


_ROUNDING = "float32 sums in another order, and Winograd products, which round ten times as much as direct sums"
_MASKS = (
    "attention masks and mask pooling cut at a logit of zero: a pixel whose logit is within rounding of zero may fall "
    "on the other side, and then moves one query visibly; the mean bounds how many do"
)
_HALF = "products of fp16 numbers (11 bits), accumulated over the depth of the network"
_BRAIN = "products of bf16 numbers (8 bits): eight times the rounding of fp16, less where that is not what decides"

STAGE_TOLERANCES: dict[tuple[str, EnginePrecision], Tolerance] = {
    ("clip_image", "fp32"): Tolerance(FP32_BOUNDS["clip_image"], _ROUNDING),
    ("unet_tap", "fp32"): Tolerance(FP32_BOUNDS["unet_tap"], _ROUNDING),
    ("mask_decoder", "fp32"): Tolerance(FP32_BOUNDS["mask_decoder"], _MASKS),
    ("clip_mask", "fp32"): Tolerance(
        FP32_BOUNDS["clip_mask"], "a patch on the edge of a mask may become visible; see mask_decoder"
    ),
    ("clip_text", "fp32"): Tolerance(FP32_BOUNDS["clip_text"], _ROUNDING),
    ("clip_image", "fp16"): Tolerance(Bounds(1e-2, 2e-3), _HALF),
    ("unet_tap", "fp16"): Tolerance(Bounds(5e-2, 5e-3), _HALF),
    ("mask_decoder", "fp16"): Tolerance(Bounds(3e-1, 1e-2), _MASKS),
    ("clip_mask", "fp16"): Tolerance(Bounds(5e-2, 2e-3), _HALF),
    ("clip_text", "fp16"): Tolerance(Bounds(1e-2, 2e-3), _HALF),
    ("clip_image", "bf16"): Tolerance(Bounds(5e-2, 1e-2), _BRAIN),
    ("unet_tap", "bf16"): Tolerance(Bounds(1e-1, 1e-2), _BRAIN),
    ("mask_decoder", "bf16"): Tolerance(Bounds(3e-1, 1e-2), _MASKS),
    ("clip_mask", "bf16"): Tolerance(Bounds(1e-1, 1e-2), _BRAIN),
    ("clip_text", "bf16"): Tolerance(Bounds(5e-2, 1e-2), _BRAIN),
}
"""Stage and precision inside the graph to bounds."""

RESULT_AGREEMENT: dict[Precision, Agreement] = {
    "fp32": Agreement(0.999, 0.999, "the bound that parity with the official implementation has to meet, too"),
    "fp16": Agreement(0.97, 0.97, "borders between segments move by a pixel; whole segments must not change"),
}
"""Precision to bounds for the runtime on the bundle against the runtime on PyTorch."""


def stage_bounds(stage: str, precision: EnginePrecision) -> Bounds:
    """The bounds of a stage; engines carry them along."""
    return STAGE_TOLERANCES[stage, precision].bounds
