"""A broad lexicon for when nobody says which words to expect (``--vocab auto``).

A list of names makes naming a multiple-choice test: the fewer the choices, the surer the wrong answer. A lexicon asks
with as many nouns as there are: the built-in lists merged, or a user's file of up to ``MAX_NOUNS`` classes. With the
option ``unknown``, what none of them fits is said to be unknown.

Two spellings of one noun are one class: case, spaces, hyphens, underscores and the plural do not count ("Tooth-brush",
"toothbrushes"). Across the built-in lists a class also joins one that has its name as a synonym ("plaything, toy" and
"toy"), if only one does. Plurals with a meaning of their own ("glasses") stay apart.

A plain list does not say what is a thing and what is stuff. A class is stuff if it is written so, if its name is stuff
in every built-in list that has it, or if it names a region (:data:`odise_rt.vocabulary.REGION_NOUNS`); anything else
is a thing, which keeps objects apart rather than joining them.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence

from odise_rt.errors import VocabularyError
from odise_rt.tokenizer import clean_text
from odise_rt.vocabulary import BUILTIN, Draft, Kind, Vocabulary, read_drafts

MAX_NOUNS = 100_000
"""Classes that a lexicon may have."""

_SEPARATORS = re.compile(r"[\s_\-]+")
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "teeth": "tooth",
    "feet": "foot",
    "leaves": "leaf",
    "knives": "knife",
    "shelves": "shelf",
    "wolves": "wolf",
    "loaves": "loaf",
    "calves": "calf",
    "scarves": "scarf",
    "shoes": "shoe",
    "horseshoes": "horseshoe",
    "toes": "toe",
    "canoes": "canoe",
}
_OF_THEIR_OWN = frozenset(
    (
        *("arms", "boxers", "bowls", "clothes", "customs", "draughts", "glasses", "eyeglasses", "sunglasses", "goods"),
        *("greens", "grounds", "news", "shorts", "slacks", "specs", "spectacles", "spirits", "tights", "trunks"),
    )
)
"""Plurals that mean something else than several of the singular."""


@functools.cache
def builtin_lexicon() -> Vocabulary:
    """COCO, ADE20K and LVIS as one vocabulary; see :data:`odise_rt.vocabulary.BUILTIN`."""
    merged: list[list[Draft]] = []
    for name in BUILTIN:
        if name != "auto":
            entries = Vocabulary.builtin(name)
            _merge_list(merged, [Draft(c.words, "thing" if c.isthing else "stuff") for c in entries])
    return Vocabulary(
        tuple(Draft([w for d in group for w in d.words], _joint_kind(group)).finish() for group in merged)
    )


def load_lexicon(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a lexicon: one noun on each line, or any file that :meth:`Vocabulary.load` takes.

    Commas separate synonyms, ``thing:`` and ``stuff:`` set the kind, ``_`` counts as a space, ``#`` starts a comment.
    Identifiers of OpenSeg and JSON files are dropped, as merged classes have several.

    Raises:
        VocabularyError: the file cannot be read, holds no noun, or has more than ``MAX_NOUNS`` classes.
    """
    drafts, _ = read_drafts(path)
    if len(drafts) > MAX_NOUNS:
        raise VocabularyError(
            f"the lexicon {path} has {len(drafts):,} lines, at most {MAX_NOUNS:,} are accepted: split it"
        )
    stuff = _stuff_names()
    merged: dict[str, Draft] = {}
    for draft in drafts:
        words = [clean_text(w.replace("_", " ")) for w in draft.words]
        if not all(words):
            raise VocabularyError(f"the lexicon {path} has an empty word in the class {draft.words[0]!r}: remove it")
        key = noun_key(words[0])
        kind = draft.kind or ("stuff" if key in stuff else None)
        earlier = merged.get(key)
        if earlier is None:
            merged[key] = Draft(words, kind)
        else:
            merged[key] = Draft([*earlier.words, *words], _joint_kind([earlier, Draft(words, kind)]))
    return Vocabulary(tuple(draft.finish() for draft in merged.values()))


def noun_key(word: str) -> str:
    """What spellings of one noun share: no case, spaces, hyphens or underscores, and the singular."""
    parts = _SEPARATORS.split(clean_text(word).lower().strip("-_ "))
    return "".join((*parts[:-1], _singular(parts[-1])))


def _singular(noun: str) -> str:
    """A key for singular and plural alike; not always a word."""
    if noun in _OF_THEIR_OWN:
        return noun
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if len(noun) > 4 and noun.endswith("ies"):
        return noun[:-3] + "y"
    if len(noun) > 4 and noun.endswith("ie"):  # "cookie", of which "cookies" is the plural
        return noun[:-2] + "y"
    if noun.endswith(("sses", "ches", "shes", "xes", "zes", "oes")):
        return noun[:-2]
    if len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return noun[:-1]
    return noun


@functools.cache
def _stuff_names() -> frozenset[str]:
    return frozenset(noun_key(word) for entry in builtin_lexicon() if not entry.isthing for word in entry.words)


def _merge_list(merged: list[list[Draft]], drafts: Sequence[Draft]) -> None:
    """Add one list's classes, which its authors hold to be different, to the classes of the lists before."""
    by_name = {noun_key(group[0].words[0]): group for group in merged}
    by_synonym: dict[str, list[list[Draft]]] = {}
    for group in merged:
        for key in {noun_key(word) for draft in group for word in draft.words}:
            by_synonym.setdefault(key, []).append(group)
    taken: set[int] = set()
    left = []
    for draft in drafts:
        same = by_name.get(noun_key(draft.words[0]))
        if same is None or id(same) in taken:
            left.append(draft)
        else:
            taken.add(id(same))
            same.append(draft)
    for draft in left:
        found = list(by_synonym.get(noun_key(draft.words[0]), ()))
        found += [by_name[key] for key in map(noun_key, draft.words[1:]) if key in by_name]
        one = {id(group): group for group in found}
        if len(one) == 1 and not one.keys() & taken:
            taken.update(one)
            found[0].append(draft)
        else:
            merged.append([draft])


def _joint_kind(drafts: Iterable[Draft]) -> Kind | None:
    """Thing if any of them says so: as stuff, what one list counts as objects would be joined."""
    kinds = {draft.kind for draft in drafts}
    return "thing" if "thing" in kinds else "stuff" if "stuff" in kinds else None
