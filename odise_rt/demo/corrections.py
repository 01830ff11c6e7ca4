"""What visitors change by hand: other names for segments, and segments that are left out.

A segment is known by a place in it, as its number changes with thresholds and size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from odise_rt.postprocessing import boxes_and_areas
from odise_rt.results import Instance, PanopticResult, Segment
from odise_rt.tokenizer import clean_text
from odise_rt.vocabulary import Vocabulary, VocabularyClass


@dataclass(frozen=True)
class Corrections:
    """What a visitor changed of one result."""

    places: tuple[tuple[float, float, str | None], ...] = ()
    """A place in the picture, as shares of its width and height in [0, 1), and what the segment there is called;
    ``None`` leaves it out. Each is made on what the ones before left, and later names win."""
    words: tuple[str, ...] = ()
    """Names that the vocabulary may lack: classes of the result, though no mask was compared with them."""


NONE = Corrections()


def corrected(result: PanopticResult, corrections: Corrections, unknown: int | None = None) -> PanopticResult:
    """A result with a visitor's names, and without what was left out.

    A corrected segment has score 1. If the result has instances, they are those of the segments, in their order, and
    may overlap: the first on top. Its segment map then stays as it is; else segments are numbered anew.

    Args:
        result: to be corrected.
        corrections: by hand. Names that are no class, also none of ``corrections.words``, change nothing.
        unknown: position of the class for what no word fits.
    """
    if corrections == NONE:
        return result
    vocabulary = with_words(result.vocabulary, corrections.words)
    classes = {_spelled(word): k for k, c in reversed(list(enumerate(vocabulary))) for word in c.words}
    classes |= {_spelled(name): k for k, name in reversed(list(enumerate(vocabulary.names)))}
    kept: dict[int, Segment] = dict(enumerate(result.segments))
    height, width = result.size
    for x, y, label in corrections.places:
        number = _owner(result, kept, int(y * height), int(x * width))
        if number is None:
            continue
        if label is None:
            del kept[number]
        elif (chosen := classes.get(_spelled(label))) is not None:
            kept[number] = _renamed(result, number, vocabulary, chosen, chosen == unknown)
    if result.instances is not None:
        instances = tuple(result.instances[number] for number in kept)
        return dataclasses.replace(result, segments=tuple(kept.values()), instances=instances, vocabulary=vocabulary)
    table = np.zeros(len(result.segments) + 1, np.int32)
    for identifier, number in enumerate(kept, 1):
        table[number + 1] = identifier
    segments = tuple(dataclasses.replace(s, id=i) for i, s in enumerate(kept.values(), 1))
    return dataclasses.replace(result, segment_map=table[result.segment_map], segments=segments, vocabulary=vocabulary)


def _owner(result: PanopticResult, kept: dict[int, Segment], row: int, column: int) -> int | None:
    """Position of the segment that one sees at a pixel, of those that are not left out."""
    if result.instances is None:
        number = int(result.segment_map[row, column]) - 1
        return number if number in kept else None
    return next((number for number in kept if _covers(result.instances[number], row, column)), None)


def _covers(instance: Instance, row: int, column: int) -> bool:
    left, top, right, bottom = instance.box
    if not (left <= column < right and top <= row < bottom):
        return False
    bit = (row - top) * (right - left) + column - left
    return bool(instance.bits[bit >> 3] >> (7 - (bit & 7)) & 1)


def _renamed(result: PanopticResult, number: int, vocabulary: Vocabulary, chosen: int, unknown: bool) -> Segment:
    segment = result.segments[number]
    if chosen == segment.class_index:
        return segment
    return dataclasses.replace(
        segment,
        label=vocabulary[chosen].name,
        class_index=chosen,
        score=1.0,
        isthing=result.instances is not None
        or vocabulary[chosen].isthing,  # an instance is one object, whatever its name
        unknown=unknown,
        corrected=True,
    )


def joined(result: PanopticResult) -> tuple[PanopticResult, list[list[int]]]:
    """A result with all of a stuff class as one segment, as it was before a visitor called another segment by its name.

    Returns:
        The result, and for each of its segments the ids of those that it was made from.
    """
    groups: dict[tuple[str, int], list[Segment]] = {}
    for segment in result.segments:
        key = ("thing", segment.id) if segment.isthing else ("stuff", segment.class_index)
        groups.setdefault(key, []).append(segment)
    parts = [[segment.id for segment in group] for group in groups.values()]
    if len(groups) == len(result.segments):
        return result, parts
    table = np.zeros(len(result.segments) + 1, np.int32)
    for identifier, ids in enumerate(parts, 1):
        table[ids] = identifier
    segment_map = table[result.segment_map]
    boxes, areas = boxes_and_areas(segment_map, len(parts))
    segments = []
    for identifier, group in enumerate(groups.values(), 1):
        segment = next((s for s in group if not s.corrected), group[0])
        if len(group) > 1:
            segment = dataclasses.replace(segment, score=1.0, corrected=True)
        segments.append(
            dataclasses.replace(segment, id=identifier, area=areas[identifier - 1], box=boxes[identifier - 1])
        )
    return dataclasses.replace(result, segment_map=segment_map, segments=tuple(segments)), parts


def with_words(vocabulary: Vocabulary, words: tuple[str, ...]) -> Vocabulary:
    """A vocabulary with a class of its own for each word that is none of its words yet.

    Whether it is a thing or stuff is decided by the word, as :meth:`Vocabulary.parse` does. If every class has an id,
    new ones have the next.
    """
    known = set(map(_spelled, vocabulary.words))
    added: list[VocabularyClass] = []
    ids = [c.id for c in vocabulary if c.id is not None]
    following = max(ids) + 1 if len(ids) == len(vocabulary) else None
    for word in words:
        if _spelled(word) not in known:
            known.add(_spelled(word))
            made = Vocabulary.from_lists([[word]])[0]
            identifier = None if following is None else following + len(added)
            added.append(VocabularyClass(made.words, made.isthing, identifier))
    return Vocabulary((*vocabulary.classes, *added)) if added else vocabulary


def _spelled(word: str) -> str:
    return clean_text(word).lower()
