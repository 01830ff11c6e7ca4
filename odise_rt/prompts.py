"""Prompt templates around a word (paper section 3.3).

A template holds one ``{}``. Which one a classifier uses is a fact of the model (:class:`odise_rt.specs.ModelFacts`):
the label variant compares masks with raw words and CLIP's masks with ``PHOTO``, the caption variant uses ``PHOTO`` for
both.
"""

from __future__ import annotations

from collections.abc import Iterable

PHOTO = "a photo of a {}."


def fill(template: str, words: Iterable[str]) -> list[str]:
    """Put each word in the place of ``{}``; braces inside a word stay as they are."""
    before, _, after = template.partition("{}")
    return [f"{before}{word}{after}" for word in words]
