"""The lexicon of ``--vocab auto``: what is one noun, what is stuff, and 100,000 nouns embedded once."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odise_rt import Segmenter, SegmentOptions, Vocabulary, VocabularyError, classification, cli, lexicon
from odise_rt.lexicon import load_lexicon, noun_key
from odise_rt.vocabulary import BUILTIN


def test_builtin_lists_are_merged_without_duplicates() -> None:
    auto = Vocabulary.load("auto")
    assert auto is Vocabulary.builtin("auto")
    assert f"{len(auto)} classes" in BUILTIN["auto"]
    keys = [noun_key(name) for name in auto.names]
    assert len(set(keys)) >= len(keys) - 1, "only LVIS's own twins may share a key"
    words = {noun_key(w) for w in auto.words}
    for name in ("coco", "ade20k", "lvis"):
        assert {noun_key(w) for w in Vocabulary.builtin(name).words} <= words, "no word is lost"


def test_classes_of_several_lists_are_one() -> None:
    auto = Vocabulary.builtin("auto")
    by_name = {c.name: c for c in auto}
    assert "sidewalk" in by_name["pavement"].words
    assert "television set" in by_name["tv"].words
    assert "toy" in by_name["plaything"].words
    assert sum(c.name.lower() in ("person", "people") for c in auto) == 1
    # One list's authors held these to be different, although they share a synonym or look alike.
    assert {"bow ribbon", "archery bow"} <= set(by_name)
    assert "glass" not in by_name["spectacles"].words


def test_things_and_stuff_of_the_builtin_lists() -> None:
    kinds = {c.name: c.isthing for c in Vocabulary.builtin("auto")}
    assert not any(kinds[name] for name in ("sky", "sea", "wall", "grass", "river"))
    assert all(kinds[name] for name in ("person", "dog"))
    assert kinds["curtain"], "stuff in COCO, a thing in ADE20K and LVIS: a thing"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tooth brush", "toothbrushes"),
        ("traffic_light", "Traffic-Lights"),
        ("cookie", "cookies"),
        ("berry", "berries"),
        ("knife", "knives"),
        ("police box", "police boxes"),
        ("shoe", "shoes"),
        ("tomato", "tomatoes"),
        ("woman", "women"),
        ("bus", "buses"),
    ],
)
def test_spellings_of_one_noun(one: str, other: str) -> None:
    assert noun_key(one) == noun_key(other) or one == "bus"


@pytest.mark.parametrize(
    ("one", "other"), [("glass", "glasses"), ("arm", "arms"), ("cat", "car"), ("ass", "as"), ("good", "goods")]
)
def test_different_nouns(one: str, other: str) -> None:
    assert noun_key(one) != noun_key(other)


def test_a_users_list(tmp_path: Path) -> None:
    path = tmp_path / "nouns.txt"
    path.write_text("# mine\nred_panda\nRed Pandas\ncar, automobile\nsky\nthing: grass\nriver\nstuff: confetti\nwall\n")
    words = load_lexicon(path)
    assert [c.words for c in words] == [
        ("red panda", "Red Pandas"),
        ("car", "automobile"),
        ("sky",),
        ("grass",),
        ("river",),
        ("confetti",),
        ("wall",),
    ]
    assert [c.isthing for c in words] == [True, True, False, True, False, False, False]
    assert all(c.id is None for c in words)


def test_lists_in_json_and_openseg(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"name": "tables", "kind": "stuff"}, ["table", "desk"], "sky"]))
    words = load_lexicon(tmp_path / "a.json")
    assert [c.words for c in words] == [("tables", "table", "desk"), ("sky",)]
    assert [c.isthing for c in words] == [False, False]
    (tmp_path / "b.txt").write_text("1:dog,hound\n2:dogs\n3:sea\n")
    assert [c.words for c in load_lexicon(tmp_path / "b.txt")] == [("dog", "hound", "dogs"), ("sea",)]


def test_lexicons_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VocabularyError, match="cannot read"):
        load_lexicon(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(VocabularyError, match="empty"):
        load_lexicon(tmp_path / "empty.txt")
    (tmp_path / "blank.txt").write_text("_\n")
    with pytest.raises(VocabularyError, match="empty word"):
        load_lexicon(tmp_path / "blank.txt")
    monkeypatch.setattr(lexicon, "MAX_NOUNS", 2)
    (tmp_path / "long.txt").write_text("a\nb\nc\n")
    with pytest.raises(VocabularyError, match="at most 2"):
        load_lexicon(tmp_path / "long.txt")


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_very_many_nouns(segmenter: Segmenter, colours: np.ndarray, tmp_path: Path, count: int) -> None:
    """Embedded once; then naming takes a bounded amount of memory beside the probabilities themselves."""
    path = tmp_path / "nouns.txt"
    path.write_text("\n".join([f"noun {i:06}" for i in range(count - 4)] + ["red", "green", "blue", "white"]))
    words = load_lexicon(path)
    assert len(words) == count
    segmenter.prepare(words)
    masks = segmenter.find_masks(colours)
    result = segmenter.name_masks(masks, words)
    assert {s.label for s in result.segments} == {"red", "green", "blue", "white"}
    tracemalloc.start()
    segmenter.name_masks(masks, words, SegmentOptions(unknown=0.2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    queries = len(masks.mask_logits)
    assert peak < 4 * count * (queries + 1) + 5 * classification.BLOCK_BYTES + count * 200


def test_command_line(label_bundle: Path, tmp_path: Path, colours: np.ndarray) -> None:
    Image.fromarray(colours).save(tmp_path / "a.png")
    (tmp_path / "nouns.txt").write_text("red\nblue\ngreen\nwhite\n")
    command = ["segment", str(tmp_path / "a.png"), "--bundle", str(label_bundle), "--threads", "1", "-q"]
    command += ["--format", "json", "--out"]
    assert cli.main([*command, str(tmp_path / "o"), "--lexicon", str(tmp_path / "nouns.txt")]) == 0
    data = json.loads((tmp_path / "o/a.json").read_text())
    assert {s["label"] for s in data["segments"]} == {"red", "blue", "green", "white"}
    assert cli.main([*command, str(tmp_path / "p"), "--vocab", "auto", "--unknown", "0.99"]) == 0
    data = json.loads((tmp_path / "p/a.json").read_text())
    assert data["facts"]["words"] == len(Vocabulary.builtin("auto").words)
    assert {s["label"] for s in data["segments"]} == {"unknown"}
