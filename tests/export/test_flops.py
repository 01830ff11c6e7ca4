"""Operations are counted, not looked up; these few can be counted by hand."""

from __future__ import annotations

import pytest

from export.flops import StageFlops, count_flops
from training.checkpoints import LoadedCheckpoint
from training.checkpoints.own_format import uninitialised_model
from training.config import preset
from training.torch_stages import model_facts


@pytest.fixture(scope="module")
def counts(small: LoadedCheckpoint) -> dict[str, StageFlops]:
    return count_flops(small.model, model_facts(small.model), 64, 64)


def test_text_tower_by_hand(counts: dict[str, StageFlops], small: LoadedCheckpoint) -> None:
    clip, head = small.config.clip, small.config.head
    tokens, width = clip.context_length, clip.text_width
    # Per layer: query, key, value and output, an MLP of four times the width, scores and their sum.
    layer = 2 * tokens * width * width * (4 + 8) + 2 * 2 * tokens * tokens * width
    projections = 2 * width * clip.embed_dim + 2 * clip.embed_dim * head.classification_dim
    assert counts["clip_text"].pruned == layer * clip.text_layers + projections


def test_pruning_saves_where_work_is_dead(counts: dict[str, StageFlops]) -> None:
    assert counts["unet_tap"].pruned < 0.7 * counts["unet_tap"].official
    assert counts["mask_decoder"].pruned < counts["mask_decoder"].official
    assert counts["clip_image"].pruned < counts["clip_image"].official


def test_counting_leaves_the_model_as_it_was(counts: dict[str, StageFlops], small: LoadedCheckpoint) -> None:
    before = {name: parameter.requires_grad for name, parameter in small.model.named_parameters()}
    kept = small.model.sd_text
    small.model.sd_text = None
    without = count_flops(small.model, model_facts(small.model), 64, 64)
    assert small.model.sd_text is None
    small.model.sd_text = kept
    assert without == counts
    assert before == {name: parameter.requires_grad for name, parameter in small.model.named_parameters()}


@pytest.mark.slow
def test_full_size_is_what_the_paper_model_costs() -> None:
    model = uninitialised_model(preset("odise-sd1"))
    counted = count_flops(model, model_facts(model), 512, 512)
    image = [stage for name, stage in counted.items() if name != "clip_text"]
    assert sum(stage.official for stage in image) == pytest.approx(5425e9, rel=0.01)
    assert sum(stage.pruned for stage in image) == pytest.approx(3420e9, rel=0.02)
