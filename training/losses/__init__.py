"""Training objective of both variants: matching, mask, classification and caption grounding losses."""

from training.losses.criterion import (
    CaptionWords,
    Criterion,
    CriterionOptions,
    LossWeights,
    Prediction,
)
from training.losses.mask_losses import PointOptions
from training.losses.matcher import NonFiniteLossError
from training.losses.targets import MaskTargets, SegmentTargets, collate_targets

__all__ = [
    "CaptionWords",
    "Criterion",
    "CriterionOptions",
    "LossWeights",
    "MaskTargets",
    "NonFiniteLossError",
    "PointOptions",
    "Prediction",
    "SegmentTargets",
    "collate_targets",
]
