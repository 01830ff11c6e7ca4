"""Prompts to token ids as CLIP's text tower wants them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, processors

from odise_rt import BundleError
from odise_rt.prompts import PHOTO, fill
from odise_rt.tokenizer import Tokenizer, clean_text
from tests.odise_rt.fake_bundle import END, START, WORDS, make_facts


@pytest.fixture(scope="module")
def tokenizer(label_bundle: Path) -> Tokenizer:
    return Tokenizer(label_bundle / "tokenizer.json", make_facts())


def test_start_words_end_and_zero_padding(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["a photo of a red.", "blue", ""])
    assert tokens.dtype == np.int64
    assert tokens.shape == (3, 12)
    ids = [WORDS.index(w) for w in ("a", "photo", "of", "a", "red", ".")]
    assert tokens[0].tolist() == [START, *ids, END, 0, 0, 0, 0]
    assert tokens[1].tolist() == [START, WORDS.index("blue"), END] + [0] * 9
    assert tokens[2].tolist() == [START, END] + [0] * 10


def test_long_prompts_are_cut_and_end_with_the_end_token(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="odise_rt.tokenizer"):  # servers of other tests silence it
        tokens = tokenizer(["red " * 100, "red " * 10])
    assert tokens[0].tolist() == [START] + [WORDS.index("red")] * 10 + [END]
    assert np.array_equal(tokens[0], tokens[1])
    assert caplog.text.count("its end is ignored") == 1


def test_case_and_white_space_do_not_matter(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["red car", "  RED\n\t car ", "Red&nbsp;Car", "ｒｅｄ car"])
    assert (tokens == tokens[0]).all()


def test_settings_stored_in_the_file_do_not_leak(tmp_path: Path) -> None:
    """Tokenizers are often saved with padding, truncation and special tokens of their own."""
    stored = HubTokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    stored.pre_tokenizer = pre_tokenizers.Whitespace()
    stored.post_processor = processors.TemplateProcessing(single="a $A a", special_tokens=[("a", 1)])
    stored.enable_padding(length=20, pad_id=3)
    stored.enable_truncation(2)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokenizer(tmp_path / "tokenizer.json", make_facts())(["red blue green white"])
    assert tokens[0, :7].tolist() == [START, *(WORDS.index(w) for w in ("red", "blue", "green", "white")), END, 0]


@pytest.mark.parametrize("content", ["", "{}", "no JSON", "[1, 2]"])
def test_broken_tokenizer_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match="not a tokenizer file"):
        Tokenizer(tmp_path / "tokenizer.json", make_facts())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("“smart” ‘quotes’", "\"smart\" 'quotes'"),
        ("cafe\u0301", "café"),
        ("oﬃce", "office"),
        (" a\u00a0b\u2003c ", "a b c"),
        ("bell\x07\x00", "bell"),
        ("\ud800lone", "lone"),
        ("👩‍🚒", "👩‍🚒"),
        ("日本", "日本"),
    ],
)
def test_cleaning(text: str, expected: str) -> None:
    assert clean_text(text) == expected


@given(st.text(max_size=40))
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = clean_text(text)
    if "&" not in once:  # "&amp;amp;amp;" has one more level to decode
        assert clean_text(once) == once
    assert once == once.strip()
    assert "  " not in once


@given(text=st.text(max_size=200))
def test_any_text_gives_a_well_formed_row(tokenizer: Tokenizer, text: str) -> None:
    row = tokenizer([text])[0].tolist()
    assert row[0] == START
    assert row.count(END) == 1
    assert not any(row[row.index(END) + 1 :])


def test_templates_take_words_as_they_are() -> None:
    assert fill(PHOTO, ["cat", "{}", "a{b}"]) == ["a photo of a cat.", "a photo of a {}.", "a photo of a a{b}."]
    assert fill("{}", ["cat"]) == ["cat"]
