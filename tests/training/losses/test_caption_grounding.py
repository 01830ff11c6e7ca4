"""Grounding loss against explicit loops, and its contrast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from training.losses.caption_grounding import CaptionGroundingLoss, caption_scores


def loop_scores(masks: torch.Tensor, words: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.zeros(len(masks), len(words))
    for i in range(len(masks)):
        for j in range(len(words)):
            per_word = []
            for word in words[j]:
                similarity = torch.stack([F.cosine_similarity(mask, word, dim=0) * scale for mask in masks[i]])
                per_word.append((similarity.softmax(0) * similarity).sum())
            scores[i, j] = torch.stack(per_word).mean()
    return scores


def test_scores_equal_the_loops() -> None:
    torch.manual_seed(0)
    masks, words = torch.randn(3, 5, 7), torch.randn(2, 4, 7)
    assert torch.allclose(caption_scores(masks, words, 9.0), loop_scores(masks, words, 9.0), atol=1e-5)


def test_loss_with_invalid_captions() -> None:
    torch.manual_seed(1)
    masks, words, valid = torch.randn(3, 5, 7), torch.randn(3, 4, 7), torch.tensor([True, False, True])
    scores, own = loop_scores(masks, words, 5.0), torch.arange(3)
    image_to_caption = F.cross_entropy(scores, own, weight=valid.float())
    caption_to_image = (F.cross_entropy(scores.T, own, reduction="none") * valid).mean()
    expected = 0.5 * (image_to_caption + caption_to_image)
    assert torch.allclose(CaptionGroundingLoss()(masks, words, valid, 5.0), expected, atol=1e-5)


def test_no_valid_caption_is_finite() -> None:
    torch.manual_seed(2)
    masks, words = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    loss = CaptionGroundingLoss()(masks, words, torch.tensor([False, False]), 5.0)
    expected = 0.5 * F.cross_entropy(loop_scores(masks, words, 5.0), torch.arange(2))
    assert torch.allclose(loss, expected, atol=1e-5)


def test_masks_that_explain_their_own_caption_cost_little() -> None:
    words = torch.eye(4)[:, None].expand(4, 8, 4)
    own = torch.eye(4)[:, None].expand(4, 3, 4)
    everyone = torch.ones(4, dtype=torch.bool)
    good = CaptionGroundingLoss()(own, words, everyone, 14.0)
    mixed = CaptionGroundingLoss()(own.roll(1, 0), words, everyone, 14.0)
    assert float(good) < 1e-4
    assert float(mixed) > 10


def test_length_of_embeddings_does_not_matter() -> None:
    torch.manual_seed(3)
    masks, words, valid = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2, dtype=torch.bool)
    loss = CaptionGroundingLoss()
    assert float(loss(3 * masks, 0.2 * words, valid, 5.0)) == pytest.approx(
        float(loss(masks, words, valid, 5.0)), abs=1e-5
    )
