"""Small frozen models and close-ups shared by the tests of the pretraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from odise_rt.errors import DatasetError
from training.config import ODISE_TINY, ClipConfig, OdiseConfig
from training.data.sticker_world.sprites import find_font
from training.pretrain.closeups import CloseUpSampler
from training.pretrain.tokenizer import broad_nouns, train_tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures" / "sticker_world"


@pytest.fixture(scope="session")
def scenes_root() -> Path:
    """The committed scenes."""
    return FIXTURE


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """4096 pieces from the noun list."""
    return train_tokenizer(broad_nouns())


@pytest.fixture(scope="session")
def sampler() -> CloseUpSampler:
    """Draws close-ups; skips the test where the font is not installed."""
    try:
        find_font()
    except DatasetError:
        pytest.skip("needs the Noto Color Emoji font (Debian: apt install fonts-noto-color-emoji)")
    return CloseUpSampler(0, variants=2)


@pytest.fixture(scope="session")
def clip_config() -> ClipConfig:
    """odise-tiny's CLIP with two layers a tower."""
    return replace(ODISE_TINY.clip, layers=2, text_layers=2)


@pytest.fixture(scope="session")
def tiny() -> OdiseConfig:
    """odise-tiny."""
    return ODISE_TINY
