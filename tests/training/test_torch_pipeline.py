"""An image that stays on its device in PyTorch becomes what it becomes stage by stage through the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from odise_rt.errors import ImageError
from odise_rt.kernels.reference import MergedPixels, merge_errors, panoptic_merge
from odise_rt.options import SegmentOptions
from odise_rt.specs import IMAGE_STAGES
from odise_rt.vocabulary import Vocabulary
from tests.training.test_torch_stages import byte_tokenizer, small
from training.config import ODISE_TINY, OdiseConfig, caption_variant
from training.torch_pipeline import TorchPipeline, merge_pixels
from training.torch_stages import TorchBackend, TorchStage, torch_segmenter

WORDS = Vocabulary.parse("red car, automobile; dog; stuff:sky; stuff:grass")


@pytest.mark.parametrize("config", [ODISE_TINY, caption_variant(ODISE_TINY)], ids=["label", "caption"])
@pytest.mark.parametrize("unknown", [None, 0.3])
def test_the_segments_are_those_of_stages_through_the_host(config: OdiseConfig, unknown: float | None) -> None:
    model = small(config)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    options = SegmentOptions(overlap_threshold=0.0, unknown=unknown, short_edge=96, windows_per_batch=3)
    specs = TorchBackend(model).specs
    pipeline = TorchPipeline(model, {name: TorchStage(model, specs[name]) for name in IMAGE_STAGES})
    with torch_segmenter(model, byte_tokenizer(), ["dog"]) as segmenter:
        wanted, masks = segmenter.segment(pixels, WORDS, options), segmenter.find_masks(pixels, options)
    with torch_segmenter(model, byte_tokenizer(), ["dog"], pipeline=pipeline) as segmenter:
        found, kept = segmenter.segment(pixels, WORDS, options), segmenter.find_masks(pixels, options)
        later = segmenter.name_masks(kept, WORDS, options)
    assert "pixels_to_segments" in found.facts.seconds
    assert found.facts.windows == wanted.facts.windows > 3
    np.testing.assert_allclose(kept.mask_logits, masks.mask_logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept.embeddings.mask, masks.embeddings.mask, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept.embeddings.clip, masks.embeddings.clip, rtol=1e-4, atol=1e-4)
    assert wanted.segments or config.variant == "caption"  # the seed gives masks that are nowhere likely
    for result in (found, later):
        assert (result.segment_map != wanted.segment_map).mean() < 0.01
        assert [(s.label, s.isthing) for s in result.segments] == [(s.label, s.isthing) for s in wanted.segments]
        for ours, theirs in zip(result.segments, wanted.segments, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)
            assert ours.area == (result.segment_map == ours.id).sum()


@pytest.mark.parametrize("size", [(40, 56), (33, 71)])
def test_pixels_go_to_the_masks_that_the_definition_gives_them_to(size: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=(7, 12, 16)).astype(np.float32)
    scores = random.uniform(0.1, 1.0, 7).astype(np.float32)
    owner, areas = merge_pixels(torch.from_numpy(logits), scores, (40, 56), size)
    assert not merge_errors(MergedPixels(owner, areas), logits, scores, (40, 56), size, tolerance=1e-5)
    assert owner.dtype == panoptic_merge(logits, scores, (40, 56), size).owner.dtype


def test_without_masks_no_pixel_has_an_owner() -> None:
    owner, areas = merge_pixels(torch.zeros(0, 8, 8), np.zeros(0, np.float32), (32, 32), (32, 32))
    assert (owner == -1).all()
    assert areas.shape == (3, 0)


def test_images_come_from_the_host() -> None:
    with pytest.raises(ImageError, match="in the host's memory"):
        TorchPipeline(small(ODISE_TINY), {}).view(torch.zeros(1))
