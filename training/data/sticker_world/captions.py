"""Natural captions of a scene: what a person would write under the picture, in varied words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from training.data.sticker_world.nouns import Noun, plural, with_article

CAPTIONS = 5
"""Captions of a picture."""
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = (
    "",
    "",
    "",
    "there is ",
    "a photo of ",
    "a picture of ",
    "this scene shows ",
    "we can see ",
    "a close view of ",
)
_PLACES = {
    "sky": "under a clear sky",
    "night sky": "under a night sky",
    "water": "by the water",
    "leaves": "in front of leaves",
    "brick wall": "in front of a brick wall",
}


@dataclass(frozen=True)
class Placed:
    """A thing in the picture, as captions need it."""

    noun: Noun
    centre: tuple[float, float]
    """Column and row as shares of the side, (0, 0) top left."""
    visible_area: int


def _name(noun: Noun, rng: np.random.Generator) -> str:
    """The primary name mostly, a synonym now and then."""
    if noun.synonyms and rng.random() < 0.35:
        return noun.synonyms[int(rng.integers(len(noun.synonyms)))]
    return noun.name


def _counted(noun: Noun, count: int, rng: np.random.Generator) -> str:
    name = _name(noun, rng)
    return with_article(name) if count == 1 else f"{_NUMBERS.get(count, 'several')} {plural(name)}"


def join_phrases(phrases: list[str]) -> str:
    """ "a dog", "a dog and a cat", "a dog, a cat and a bus"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def stuff_phrase(noun: Noun, rng: np.random.Generator) -> str:
    """Say where things are: "on the grass", "under a night sky"."""
    if noun.name in _PLACES and rng.random() < 0.6:
        return _PLACES[noun.name]
    preposition = "in front of" if noun.name in _PLACES else "on"
    return f"{preposition} the {_name(noun, rng)}"


def _listing(things: list[Placed], stuff: list[Noun], most: int, rng: np.random.Generator) -> str:
    counts = Counter(thing.noun.name for thing in things)
    nouns = list({thing.noun.name: thing.noun for thing in things}.values())
    chosen = [nouns[int(i)] for i in rng.permutation(len(nouns))[:most]]
    text = str(rng.choice(_OPENINGS)) + join_phrases([_counted(noun, counts[noun.name], rng) for noun in chosen])
    places = [stuff[int(i)] for i in rng.permutation(len(stuff))[: int(rng.integers(1, 3))]]
    return text + "".join(" " + stuff_phrase(noun, rng) for noun in places)


def _relation(things: list[Placed], stuff: list[Noun], rng: np.random.Generator) -> str:
    first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
    across, down = (first.centre[axis] - second.centre[axis] for axis in (0, 1))
    if abs(across) > abs(down):
        relation = "to the left of" if across < 0 else "to the right of"
    else:
        relation = "above" if down < 0 else "below"
    text = f"{with_article(_name(first.noun, rng))} {relation} {with_article(_name(second.noun, rng))}"
    return f"{text} {stuff_phrase(stuff[int(rng.integers(len(stuff)))], rng)}"


def describe(things: list[Placed], stuff: list[Noun], rng: np.random.Generator) -> list[str]:
    """Write captions.

    Args:
        things: Visible things, any order.
        stuff: Kinds of stuff in the picture, at least one.
        rng: Source of every choice.

    Returns:
        :data:`CAPTIONS` lower-case sentences without a final full stop. The first names every thing and every stuff,
        the others pick a few of them or say how two stand to each other.
    """
    if not things:
        return [f"a photo of the {_name(noun, rng)}" for noun in (stuff * CAPTIONS)[:CAPTIONS]]
    counts = Counter(thing.noun.name for thing in things)
    nouns = {thing.noun.name: thing.noun for thing in things}
    full = join_phrases([_counted(noun, counts[name], rng) for name, noun in nouns.items()])
    captions = [full + " with " + join_phrases([f"{_name(noun, rng)}" for noun in stuff])]
    largest = sorted(things, key=lambda thing: -thing.visible_area)
    while len(captions) < CAPTIONS:
        if len(things) > 1 and len(captions) % 3 == 2:
            captions.append(_relation(largest[:4], stuff, rng))
        else:
            captions.append(_listing(things, stuff, int(rng.integers(1, 5)), rng))
    return captions
