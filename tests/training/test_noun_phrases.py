"""The chunker on captions as people write them."""

from __future__ import annotations

import random

import pytest

from training.noun_phrases import caption_words, noun_phrases


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man riding a wave on top of a surfboard.", ["man", "wave", "surfboard"]),
        ("a woman is standing next to two large brown dogs", ["woman", "large brown dogs"]),
        ("A glass of water sits on the wooden table.", ["glass", "glass of water", "water", "wooden table"]),
        ("man in suit with umbrella", ["man", "man in suit", "suit", "suit with umbrella", "umbrella"]),
        ("A parked car, a smiling woman and her watch.", ["parked car", "smiling woman", "watch"]),
        ("a car parked in front of a brick building", ["car", "brick building"]),
        ("People watch a tennis player swing a racket", ["people", "tennis player", "racket"]),
        ("In the sand lies a crab under a rainbow", ["sand", "crab", "rainbow"]),
        ("There are 3 fire engines; behind them a pine-tree.", ["fire engines", "pine-tree"]),
        ("A photo of a snowy mountain", ["snowy mountain"]),
        ("two birds flying quickly over the ocean", ["birds", "ocean"]),
        ("a running shoe and a shooting star", ["running shoe", "shooting star"]),
        ("a dog. a dog! A DOG?", ["dog"]),
        ("Un château près d’une forêt", ["un château près d'une forêt"]),
        ("", []),
        ("... and, or 12", []),
    ],
)
def test_phrases(caption: str, phrases: list[str]) -> None:
    assert noun_phrases(caption) == phrases


def test_words_are_drawn_from_one_caption() -> None:
    captions = ["a red car on a road", "two cats"]
    for seed in range(10):
        words, valid = caption_words(captions, random.Random(seed), count=8)
        assert valid
        assert len(words) == 8
        assert set(words) <= {"red car", "road"} or set(words) <= {"cats"}
    assert caption_words(captions, random.Random(3)) == caption_words(captions, random.Random(3))


@pytest.mark.parametrize("captions", [[], [""], ["it is not"]])
def test_no_phrase_is_flagged(captions: list[str]) -> None:
    assert caption_words(captions, random.Random(0), count=3) == (["", "", ""], False)
