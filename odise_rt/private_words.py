"""Servers log nothing that their clients send; the runtime quotes words to whoever gave them."""

from __future__ import annotations

import logging


def keep_words_out_of_the_log() -> None:
    """Silence this process's log messages that quote words: about prompts that are cut and classes that repeat."""
    logging.getLogger("odise_rt.tokenizer").setLevel(logging.ERROR)
    logging.getLogger("odise_rt.vocabulary").setLevel(logging.WARNING)
