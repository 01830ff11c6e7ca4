"""Our calls into open_clip's layers against open_clip's own forward passes."""

from __future__ import annotations

import torch

from training.models.odise import Odise
from training.models.official_structure import official_clip_image, official_clip_mask


def test_text_embedding_is_open_clips(label_model: Odise) -> None:
    clip = label_model.config.clip
    tokens = torch.zeros(3, clip.context_length, dtype=torch.int64)
    for row, length in enumerate((1, 5, clip.context_length - 2)):
        words = torch.randint(1, clip.start_token, (length,), generator=torch.Generator().manual_seed(row))
        tokens[row, : length + 2] = torch.cat([torch.tensor([clip.start_token]), words, torch.tensor([clip.end_token])])
    with torch.no_grad():
        expected = label_model.clip.encode_text(tokens, normalize=False)
        embedding, projected = label_model.clip_text(tokens)
    torch.testing.assert_close(embedding, expected, atol=2e-6, rtol=1e-5)
    assert projected.shape == (3, label_model.config.head.classification_dim)


def test_image_embedding_is_open_clips(label_model: Odise) -> None:
    windows = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = label_model.clip_pixels(windows, "bicubic")
        expected = label_model.clip.encode_image(pixels, normalize=False)
        torch.testing.assert_close(label_model.clip_image(windows), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(official_clip_image(label_model, windows), expected, atol=2e-6, rtol=1e-5)


def test_split_mask_classifier_equals_the_long_sequence(label_model: Odise) -> None:
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(1, 3, 70, 90, generator=generator)
    logits = torch.randn(1, 6, 32, 32, generator=generator)
    logits[0, 0] = -1.0  # sees CLS alone
    logits[0, 1] = 1.0  # sees everything
    with torch.no_grad():
        ours = label_model.clip_mask(image, logits)
        torch.testing.assert_close(ours, official_clip_mask(label_model, image, logits), atol=5e-6, rtol=1e-5)
    assert (ours[0, 0] - ours[0, 1]).abs().max() > 1e-3
