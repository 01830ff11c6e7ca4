"""Merges of recorded masks, and the whole way from pixels and words, against the recorded results."""

from __future__ import annotations

import pytest

from tests.parity.reference_run import Run
from tests.parity.whole_image import Agreement, agreement, from_raw_image, from_recorded_masks
from training.models.odise import Structure

PIXELS = 0.999
"""Share of pixels that must agree. One against two threads of the official code itself: 3 of 82,500 differ."""


def _check(found: Agreement, instance_tolerance: float) -> None:
    print(found)
    assert found.same_segments
    assert found.segments > 5
    assert found.panoptic >= PIXELS
    assert found.semantic >= PIXELS
    assert found.instance_classes
    assert found.instance_error <= instance_tolerance


def test_merges_of_recorded_masks(run: Run) -> None:
    _check(agreement(run, from_recorded_masks(run)), instance_tolerance=1e-4)


@pytest.mark.parametrize("structure", ["pruned", "official"])
def test_whole_way_from_the_raw_image(run: Run, structure: Structure) -> None:
    """In both structures: the lean one that is exported, and the baseline that computes all the official code does."""
    run.model.structure = structure
    try:
        # A mask edge that moves by a pixel changes a score by about 1e-4 of it.
        _check(agreement(run, from_raw_image(run)), instance_tolerance=1e-3)
    finally:
        run.model.structure = "pruned"
