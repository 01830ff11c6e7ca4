"""A tiny ODISE with random weights and open gates, so that every path carries signal."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from training.config import ODISE_TINY, OdiseConfig, caption_variant
from training.models.odise import Odise


def small_config() -> OdiseConfig:
    """odise-tiny with a 64-pixel window: the fastest config that still has every part."""
    head = dataclasses.replace(ODISE_TINY.head, queries=5, pixel_decoder_layers=1, mask_decoder_layers=4)
    return dataclasses.replace(ODISE_TINY, name="test", window=64, head=head)


def make_model(config: OdiseConfig, seed: int = 0) -> Odise:
    """A model whose captioner gates are open."""
    torch.manual_seed(seed)
    model = Odise(config).eval()
    model.refresh_null_text_embedding()
    with torch.no_grad():
        for gate in (model.implicit_captioner.caption_gate, model.implicit_captioner.time_gate):
            gate.normal_()
    return model


@pytest.fixture(scope="session")
def label_model() -> Odise:
    return make_model(small_config())


@pytest.fixture(scope="session")
def caption_model() -> Odise:
    return make_model(caption_variant(small_config()))
