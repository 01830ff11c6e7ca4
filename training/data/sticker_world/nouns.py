"""The nouns of Sticker World: 258 things and 14 kinds of stuff, and which of them no mask ever names.

The tables beside this module (``things.txt``, ``stuff.txt``) hold one noun a line with its synonyms. About a fifth of
the things and three kinds of stuff are *unseen*: the frozen models meet them in pictures and captions, the heads never
in a mask annotation. Which things is fixed by a hash of the name, so it cannot drift with the order of the table; the
stuff is listed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from odise_rt.errors import DatasetError

ClassSelection = Literal["seen", "all"]

UNSEEN_THING_SHARE = 0.2
UNSEEN_STUFF = frozenset({"water", "night sky", "carpet"})

_MASS_NOUNS = (
    *("bread", "broccoli", "popcorn", "sushi", "cheese", "clover", "fire", "flame", "grass", "water", "sand", "snow"),
    *("dirt", "soil", "lava", "magma", "foliage", "yarn"),
)
_SINGULAR_IN_S = ("ss", "us")


@dataclass(frozen=True)
class Noun:
    """One class of Sticker World."""

    name: str
    """Primary name, lower case."""
    synonyms: tuple[str, ...]
    """Other names, possibly none."""
    is_thing: bool
    emoji: str
    """The character that pictures it; empty for stuff."""
    unseen: bool
    """True if no mask annotation of the training split may name it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The primary name followed by the synonyms."""
        return (self.name, *self.synonyms)


def with_article(name: str) -> str:
    """Put "a", "an" or "some" before a noun, as a caption would: "a dog", "an owl", "some grapes"."""
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith(_SINGULAR_IN_S)
    if plural or last in _MASS_NOUNS:
        return f"some {name}"
    return f"{'an' if name[0] in 'aeio' or name.startswith('um') else 'a'} {name}"


def plural(name: str) -> str:
    """English plural of a noun's last word: "cherries", "foxes", "leaves", "fish"."""
    if name.endswith(("fish", "sheep", "deer", "shrimp")) or with_article(name).startswith("some "):
        return name
    if name.endswith("leaf"):
        return name[:-1] + "ves"
    if name.endswith("mouse"):
        return name[:-5] + "mice"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    return name + "s"


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _read_table(file_name: str) -> list[list[str]]:
    path = Path(__file__).with_name(file_name)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [[part.strip() for part in line.split("|")] for line in lines if line and not line.startswith("#")]


def _names_field(field: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in field.split(",") if part.strip())


@lru_cache(maxsize=1)
def all_nouns() -> tuple[Noun, ...]:
    """Every class, things before stuff, in table order; its position plus one is the COCO category id.

    Raises:
        DatasetError: A name occurs twice, so a word would have two meanings.
    """
    things = _read_table("things.txt")
    stuff = _read_table("stuff.txt")
    unseen_things = {
        row[1] for row in sorted(things, key=lambda row: _rank(row[1]))[: round(UNSEEN_THING_SHARE * len(things))]
    }
    nouns = [Noun(row[1], _names_field(row[2]), True, row[0], row[1] in unseen_things) for row in things]
    nouns += [Noun(row[0], _names_field(row[1]), False, "", row[0] in UNSEEN_STUFF) for row in stuff]
    taken: set[str] = set()
    for noun in nouns:
        for name in noun.names:
            if name in taken:
                raise DatasetError(f"noun table: {name!r} occurs twice; every name must belong to one class")
            taken.add(name)
    return tuple(nouns)


def category_id(noun: Noun) -> int:
    """COCO category id, 1-based."""
    return all_nouns().index(noun) + 1


def select(nouns: tuple[Noun, ...], selection: ClassSelection) -> tuple[Noun, ...]:
    """The nouns allowed by ``selection``: all of them, or only those not unseen."""
    return nouns if selection == "all" else tuple(noun for noun in nouns if not noun.unseen)


def coco_categories() -> list[dict[str, object]]:
    """The ``categories`` section of the panoptic JSON, with the synonyms and the split as additional fields."""
    return [
        {
            "id": index + 1,
            "name": noun.name,
            "supercategory": "thing" if noun.is_thing else "stuff",
            "isthing": int(noun.is_thing),
            "color": list(_rank(noun.name)[:3]),
            "synonyms": list(noun.synonyms),
            "unseen": noun.unseen,
        }
        for index, noun in enumerate(all_nouns())
    ]
