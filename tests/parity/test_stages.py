"""Each stage, fed recorded input, gives the recorded output within 1e-4 of its scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity.reference_run import Run
from tests.parity.stages import STAGES, Arrays, compare, implicit_captioner, mask_clip, unet_taps

TOLERANCE = 1e-4
"""Largest error over largest magnitude. Float32 takes 1e-6 of it, the fixture's own rounding up to 7e-5."""


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_stage_agrees_with_the_official_implementation(run: Run, stage: Callable[[Run], Arrays]) -> None:
    rows = compare(run, stage)
    for row in rows:
        print(f"{row.key}: max {row.max_error:.2e}, mean {row.mean_error:.2e}, scale {row.scale:.3g}")
    assert rows
    assert {row.key: row.ratio for row in rows if not row.ratio <= TOLERANCE} == {}


def test_a_hundredth_of_one_weight_is_noticed(runs: dict[str, Run]) -> None:
    """The comparison itself: small faults in three networks do not pass."""
    run = runs["label"]
    model = run.model
    faults = {
        implicit_captioner: model.implicit_captioner.caption_gate,
        unet_taps: model.unet.up_blocks[1].resnets[0].conv1.weight,
        mask_clip: model.clip.visual.transformer.resblocks[1].attn.in_proj_weight,
    }
    for stage, parameter in faults.items():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
            try:
                worst = max(row.ratio for row in compare(run, stage))
            finally:
                parameter.copy_(before)
        assert worst > TOLERANCE, stage.__name__
