"""CLIP's tokenizer as a ``tokenizers`` file against open_clip's own."""

from __future__ import annotations

import json
import random
import unicodedata

import pytest
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer

from odise_rt.vocabulary import Vocabulary
from training.checkpoints.clip_tokenizer import END_TOKEN, START_TOKEN, openai_clip_tokenizer_json

SENTENCES = [
    "",
    "   ",
    "a photo of a cat.",
    "A Photo Of A CAT!!",
    "it's they're we'll I'd you've I'm don't rock'n'roll",
    "naïve café, crème brûlée; e\u0301 composed",
    "Straße, ΣΊΣΥΦΟΣ ὈΔΥΣΣΕΎΣ, İstanbul, ЩИТ",
    "北京 東京 서울 ไทย हिन्दी العربية",
    "1234 56.7 % $9.99 3x3 ½ ² ™ №",
    "“curly” ‘quotes’ „low“ ‚single‛ ʼn ʻokina",
    "oﬃce ﬂoor ﬁne ﬅ ŉ ǆ Ǉ ĳ",
    "emoji 😀👍🏽👩‍👩‍👧 🇩🇪",
    "tab\tnew\nline\r\n\u00a0no-break\u3000wide",
    "bell\x07 and \ufeffmark",
    "-- /\\ {}[]()<> @#$^&*_+=|~`",
    "supercalifragilisticexpialidocious " * 9,
    "word" * 200,
    "!" * 90,
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_str(openai_clip_tokenizer_json())


@pytest.fixture(scope="module")
def theirs() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.mark.parametrize("text", SENTENCES, ids=range(len(SENTENCES)))
def test_sentences(ours: Tokenizer, theirs: SimpleTokenizer, text: str) -> None:
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_names_of_three_data_sets(ours: Tokenizer, theirs: SimpleTokenizer) -> None:
    words = {word for name in ("coco", "ade20k", "lvis") for word in Vocabulary.builtin(name).words}
    assert len(words) > 1000
    assert [word for word in sorted(words) if ours.encode(word).ids != theirs.encode(word)] == []


def test_random_text(ours: Tokenizer, theirs: SimpleTokenizer) -> None:
    """Letters of two dozen scripts, marks, digits and symbols. Unassigned and control characters are left out, and
    combining marks, which a text never starts with."""
    source = random.Random(0)
    common = "abcdefghij KLMNOP '0123.,!-&"
    strange = [c for c in map(chr, range(0xA1, 0x2700)) if unicodedata.category(c)[0] in "LNPS"]
    texts = [
        "".join(source.choice(strange if source.random() < 0.3 else common) for _ in range(source.randint(1, 30)))
        for _ in range(500)
    ]
    assert [text for text in texts if ours.encode(text).ids != theirs.encode(text)] == []


def test_special_tokens_keep_their_ids_and_cannot_be_typed(ours: Tokenizer) -> None:
    assert ours.token_to_id("<start_of_text>") == START_TOKEN
    assert ours.token_to_id("<end_of_text>") == END_TOKEN
    assert ours.get_vocab_size() == END_TOKEN + 1
    assert not {START_TOKEN, END_TOKEN} & set(ours.encode("<start_of_text> owl <end_of_text>").ids)


def test_file_is_plain_json() -> None:
    content = json.loads(openai_clip_tokenizer_json())
    assert content["model"]["type"] == "BPE"
    assert content["truncation"] is None
    assert openai_clip_tokenizer_json() == openai_clip_tokenizer_json()
