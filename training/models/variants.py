"""Builds the model that a config describes: the published one, or a variant of it for ablations."""

from __future__ import annotations

from training.config import OdiseConfig
from training.models.clip_features import ClipFeatureOdise
from training.models.odise import Odise


def build_odise(config: OdiseConfig) -> Odise:
    """A model with fresh weights."""
    return ClipFeatureOdise(config) if config.features == "clip" else Odise(config)
