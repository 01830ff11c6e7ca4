"""Servers log nothing that their clients send; the runtime quotes words to whoever gave them."""

from __future__ import annotations

import logging


def keep_words_out_of_the_log() -> None:
    """Silence, in this process, the messages that quote words: of prompts that are cut, and of classes that repeat."""
    logging.getLogger("odise_rt.tokenizer").setLevel(logging.ERROR)
    logging.getLogger("odise_rt.vocabulary").setLevel(logging.WARNING)
