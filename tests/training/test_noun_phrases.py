"""The chunker on captions as people write them."""

from __future__ import annotations

import random

import pytest

from odise_rt.vocabulary import Vocabulary
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
        ("A man waiting at a bus stop", ["man", "bus stop"]),
        ("a boy at a skate park", ["boy", "skate park"]),
        ("A hot dog stand in the city park.", ["hot dog stand", "city park"]),
        ("A night stand, a tv stand and a train set", ["night stand", "tv stand", "train set"]),
        ("A man on skis", ["man", "man on skis", "skis"]),
        ("a person with skis and poles", ["person", "person with skis", "skis", "poles"]),
        ("A skier wearing skis has poles", ["skier", "skis", "poles"]),
        ("a street and stop sign next to parked cars", ["street", "stop sign", "parked cars"]),
        ("a couch and dining table or potted plant", ["couch", "dining table", "potted plant"]),
        ("A trash can on the left and a soda can.", ["trash can", "soda can"]),
        ("A washing machine that can stop. A dog can swim", ["washing machine", "dog"]),
        ("Swimming pool and falls", ["swimming pool", "falls"]),
        ("A man and woman sit on a bench and eat pizza", ["man", "woman", "bench", "pizza"]),
        ("A cat and dog rest while men stand and sheep graze", ["cat", "dog", "men", "sheep"]),
        ("Two dogs play, children run and a batter swing at a ball", ["dogs", "children", "batter", "ball"]),
        ("A cat sits on a bed and looks at the camera", ["cat", "bed", "camera"]),
        ("people drinking wine and eating food", ["people", "wine", "food"]),
        ("a man rides a wave and holds the board", ["man", "wave", "board"]),
        ("people about to drink coffee", ["people", "coffee"]),
        ("Un château près d’une forêt", ["un château près d'une forêt"]),
        ("", []),
        ("... and, or 12", []),
    ],
)
def test_phrases(caption: str, phrases: list[str]) -> None:
    assert noun_phrases(caption) == phrases


@pytest.mark.parametrize("classes", ["coco", "ade20k"])
@pytest.mark.parametrize("caption", ["a man and {}.", "a room with {}.", "{} on the left."])
def test_words_of_the_data_sets_are_found(classes: str, caption: str) -> None:
    words = {word for known in Vocabulary.builtin(classes) for word in known.words} - {"picture"}  # which places things
    assert [word for word in sorted(words) if word not in noun_phrases(caption.format(word))] == []


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
