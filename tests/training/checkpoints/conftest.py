"""The very small model of both variants in the published formats, and a tokenizer for it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tests.training.checkpoints.published import Published, publish, smallest_config
from training.config import caption_variant


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The label variant."""
    return publish(smallest_config(), tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="session")
def published_caption(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The caption variant."""
    return publish(caption_variant(smallest_config()), tmp_path_factory.mktemp("caption"))


@pytest.fixture(scope="session")
def byte_tokenizer() -> str:
    """A tokenizer of bytes: enough to spell anything, and small."""
    pieces = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return str(tokenizer.to_str())
