"""The byte-pair tokenizer of the small text towers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from odise_rt.errors import CheckpointError
from training.config import ODISE_TINY
from training.data.sticker_world.nouns import all_nouns
from training.pretrain.tokenizer import broad_nouns, encode_texts, main, train_tokenizer, with_markers

FIXTURE = Path(__file__).parents[2] / "fixtures" / "sticker_world"
TOKENIZER = train_tokenizer(["a photo of a dog on the grass", *broad_nouns()], 1024)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs", "Zs", "Zl", "Zp", "Cc")), min_size=1, max_size=30))
def test_any_word_is_spelt_and_read_back(text: str) -> None:
    from unicodedata import normalize

    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert ids
    assert max(ids) < 1022
    assert TOKENIZER.decode(ids).removeprefix(" ") == normalize("NFC", text).lower().removeprefix(" ")


def test_case_and_spaces_do_not_matter() -> None:
    plain = TOKENIZER.encode("a red fire engine", add_special_tokens=False).ids
    assert TOKENIZER.encode("  A Red\n fire \t ENGINE ", add_special_tokens=False).ids == plain


def test_the_markers_are_the_last_two_ids_and_no_text_yields_them() -> None:
    assert TOKENIZER.get_vocab_size() == 1024
    assert TOKENIZER.token_to_id("<|startoftext|>") == 1022
    assert TOKENIZER.token_to_id("<|endoftext|>") == 1023
    ids = TOKENIZER.encode("<|endoftext|> <|startoftext|> <|reserved900|>", add_special_tokens=False).ids
    assert max(ids) < 1022
    assert TOKENIZER.id_to_token(max(ids)).find("reserved9") == -1


def test_too_few_pairs_are_filled_up() -> None:
    small = train_tokenizer(["dog"], 1024)
    assert small.get_vocab_size() == 1024
    assert small.token_to_id("<|endoftext|>") == 1023


def test_encoding_marks_pads_and_cuts() -> None:
    tokens = encode_texts(TOKENIZER, ["dog", "", "dog " * 40], 8)
    assert tokens.shape == (3, 8)
    assert tokens.dtype == torch.int64
    assert tokens[0].tolist()[:1] == [1022]
    assert tokens[1].tolist() == [1022, 1023, 0, 0, 0, 0, 0, 0]
    assert tokens[2, -1] == 1023
    assert tokens.argmax(-1).tolist() == [tokens[0].tolist().index(1023), 1, 7]
    assert encode_texts(TOKENIZER, [""], 4, pad=1023).tolist() == [[1022, 1023, 1023, 1023]]


def test_the_broad_list_holds_every_name() -> None:
    assert {name for noun in all_nouns() for name in noun.names} <= set(broad_nouns())


def test_the_command_writes_a_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    assert main(["--captions", str(FIXTURE / "annotations/captions_train.json"), "--out", str(out)]) == 0
    loaded = Tokenizer.from_file(str(out))
    assert loaded.get_vocab_size() == 4096
    assert loaded.token_to_id("<|startoftext|>") == 4094
    assert len(loaded.encode("dog", add_special_tokens=False).ids) == 1


def test_a_tokenizer_without_the_models_markers_is_refused(byte_tokenizer_json: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"source has the ids \(None, None\) .* odise-tiny needs \(4094, 4095\)"):
        with_markers(byte_tokenizer_json, ODISE_TINY, Path("source"))
    text = train_tokenizer(["a dog"]).to_str()
    assert with_markers(text, ODISE_TINY, Path("source")).to_str() == text


def test_a_file_without_captions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"images": []}))
    assert main(["--captions", str(wrong), "--out", str(tmp_path / "out.json")]) == 1
    assert "wrong.json" in capsys.readouterr().err
