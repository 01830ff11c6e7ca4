"""Text to the token ids of CLIP's text tower: start, byte-pair pieces, end, zero padding.

The pieces come from the bundle's own ``tokenizer.json``, so a model may bring any byte-pair vocabulary. Cleaning
follows CLIP's: HTML entities, Unicode oddities of copied text, white space, lower case.
"""

from __future__ import annotations

import html
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.errors import BundleError, MissingPackageError
from odise_rt.specs import ModelFacts

logger = logging.getLogger(__name__)

# What copy and paste leaves behind, as CLIP's own cleaning (ftfy) repairs it: curly quotes, ligatures.
_REPAIRS = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"'})
_LIGATURES = {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFB00, 0xFB07)}
_FULL_WIDTH = {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFFEF)}
_REPAIRS |= str.maketrans(_LIGATURES | _FULL_WIDTH)


def clean_text(text: str) -> str:
    """Bring a text into the form that CLIP was trained on, keeping upper case.

    HTML entities are decoded (twice, as text from the web needs it), Unicode is composed (NFC), quotes, ligatures and
    full-width letters become plain ones, control characters vanish, white space collapses to single blanks.
    """
    if text.isascii() and "&" not in text and text.isprintable():
        return " ".join(text.split())
    text = html.unescape(html.unescape(text))
    text = unicodedata.normalize("NFC", text).translate(_REPAIRS)
    # Cc: control, Cs: lone surrogates, which no tokenizer can encode. Joiners (Cf) stay: emoji sequences need them.
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join("".join(kept).split())


class Tokenizer:
    """Turns prompts into token ids. Safe to share between threads."""

    def __init__(self, path: Path, facts: ModelFacts) -> None:
        """Load a ``tokenizers`` JSON file.

        Raises:
            MissingPackageError: the package ``tokenizers`` is not installed.
            BundleError: the file is not a tokenizer.
        """
        try:
            import tokenizers
        except ImportError as exc:
            raise MissingPackageError(
                "words need the package 'tokenizers', which is not installed: pip install tokenizers"
            ) from exc
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the Rust side raises plain Exception
            raise BundleError(f"{path} is not a tokenizer file ({exc}): export the bundle again") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._facts = facts

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids of prompts.

        Args:
            prompts: L texts. One of more than ``context_length`` tokens is cut, its last token then being the end
                token, as CLIP does; a warning names it.

        Returns:
            int64 (L, T).
        """
        facts = self._facts
        room = facts.context_length - 2
        texts = [clean_text(p).lower() for p in prompts]
        tokens = np.full((len(texts), facts.context_length), facts.pad_token, dtype=np.int64)
        for row, encoding in enumerate(self._tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = encoding.ids
            if len(ids) > room:
                logger.warning(
                    "%.60r… has %d tokens, the text encoder reads %d: its end is ignored", texts[row], len(ids), room
                )
                ids = ids[:room]
            tokens[row, 0] = facts.start_token
            tokens[row, 1 : 1 + len(ids)] = ids
            tokens[row, 1 + len(ids)] = facts.end_token
        return tokens
