"""What a worker makes of a request before it segments."""

from __future__ import annotations

import pytest

from odise_rt import Vocabulary, VocabularyError
from odise_rt.serve.worker import read_words


def test_words_are_bounded_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_words("a; b, c", 3)) == 2
    with pytest.raises(VocabularyError, match="has 4 words, this server accepts 3"):
        read_words("a; b, c; d", 3)
    with pytest.raises(VocabularyError, match="has 4 words, this server accepts 3"):
        read_words('{"a": ["b", "c", "d"]}', 3)

    def parse(text: str) -> Vocabulary:
        raise AssertionError("it was read all the same")

    monkeypatch.setattr(Vocabulary, "parse", parse)
    monkeypatch.setattr(Vocabulary, "from_dict", parse)
    for text in ("a;" * 1501, "[" + '"a",' * 1000 + '"a"]'):
        with pytest.raises(VocabularyError, match="characters long"):
            read_words(text, 3)
