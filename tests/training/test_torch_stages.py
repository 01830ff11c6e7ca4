"""A checkpoint behind the runtime's own segmenter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from odise_rt.options import SegmentOptions
from odise_rt.vocabulary import Vocabulary
from training.config import ODISE_TINY, OdiseConfig, caption_variant
from training.models.odise import Odise
from training.torch_stages import torch_segmenter


def byte_tokenizer() -> str:
    """A tokenizer of bytes: enough to spell anything."""
    pieces = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer.to_str()


def small(config: OdiseConfig) -> Odise:
    torch.manual_seed(0)
    head = dataclasses.replace(config.head, queries=6, pixel_decoder_layers=1, mask_decoder_layers=3)
    model = Odise(dataclasses.replace(config, window=64, test_short_edge=64, test_long_edge=256, head=head)).eval()
    model.refresh_null_text_embedding()
    return model


@pytest.mark.parametrize("config", [ODISE_TINY, caption_variant(ODISE_TINY)], ids=["label", "caption"])
def test_segments_and_both_structures_agree(config: OdiseConfig) -> None:
    model = small(config)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    words = Vocabulary.parse("red car, automobile; dog; stuff:sky")
    options = SegmentOptions(overlap_threshold=0.0)
    results = []
    for structure in ("pruned", "official"):
        model.structure = structure  # type: ignore[assignment]
        with torch_segmenter(model, byte_tokenizer(), ["dog"]) as segmenter:
            results.append(segmenter.segment(pixels, words, options))
    pruned, official = results
    assert pruned.segment_map.shape == (70, 100)
    assert pruned.facts.seen_classes == 1
    assert "official" in official.facts.engine
    assert (pruned.segment_map == official.segment_map).mean() > 0.99
    assert [s.label for s in pruned.segments] == [s.label for s in official.segments]
