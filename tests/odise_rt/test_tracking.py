"""Numbers and colours stay with what they mark."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from odise_rt import PanopticResult, Segment, Segmenter, Vocabulary, VocabularyClass, tracking
from odise_rt.tracking import SegmentTracker
from odise_rt.visualize import class_colour

WORDS = Vocabulary.parse("thing: ball; thing: dog; stuff: sky")


@pytest.fixture
def template(segmenter: Segmenter, colours: np.ndarray) -> PanopticResult:
    return segmenter.segment(colours, "red")


def frame(
    template: PanopticResult, *objects: tuple[str, int, int, int], size: tuple[int, int] = (40, 60)
) -> PanopticResult:
    """A result with squares of (label, left, top, side), later ones in front; 'sky' fills what is left."""
    segment_map = np.zeros(size, np.int32)
    labels = [label for label, *_ in objects]
    for number, (label, left, top, side) in enumerate(objects, 1):
        if label == "sky":
            segment_map[segment_map == 0] = number
        else:
            segment_map[top : top + side, left : left + side] = number
    segments = []
    for number, label in enumerate(labels, 1):
        ys, xs = np.nonzero(segment_map == number)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        index = WORDS.names.index(label)
        segments.append(Segment(number, label, index, 0.9, len(ys), box, WORDS[index].isthing))
    return dataclasses.replace(template, segment_map=segment_map, segments=tuple(segments), vocabulary=WORDS)


def ids(result: PanopticResult) -> list[int | None]:
    return [s.track_id for s in result.segments]


def test_things_keep_their_numbers_while_they_move_and_change_order(template: PanopticResult) -> None:
    tracker = SegmentTracker()
    first = tracker.update(
        frame(template, ("ball", 0, 0, 10), ("ball", 30, 0, 10), ("dog", 0, 20, 12), ("sky", 0, 0, 0))
    )
    assert ids(first) == [1, 2, 3, 4]
    colours = tracker.colours(first)
    assert len(set(colours)) == 4
    for step in range(1, 8):
        moved = frame(
            template, ("sky", 0, 0, 0), ("dog", step, 20, 12), ("ball", 30 - step, 0, 10), ("ball", 2 * step, 0, 10)
        )
        # the sky is drawn first here and fills everything: put it behind
        moved.segment_map[moved.segment_map == 0] = 1
        found = tracker.update(moved)
        if step < 5:  # then the balls meet
            assert ids(found) == [4, 3, 2, 1]
            assert tracker.colours(found) == colours[::-1]


def test_best_overlap_wins(template: PanopticResult) -> None:
    tracker = SegmentTracker()
    tracker.update(frame(template, ("ball", 0, 0, 10), ("ball", 12, 0, 10)))
    found = tracker.update(frame(template, ("ball", 9, 0, 10), ("ball", 0, 20, 10)))
    assert ids(found) == [2, 3], "the nearer track goes on; the other ball is new"


def test_classes_of_one_name_are_told_apart(template: PanopticResult) -> None:
    """As OpenSeg's files have them; colours go by the class, too."""
    skies = Vocabulary((*(VocabularyClass(("sky",), isthing=False),) * 2, *(VocabularyClass(("ball",)),) * 2))
    segment_map = np.repeat(np.arange(1, 5, dtype=np.int32), 10)[:, None].repeat(20, axis=1)
    segments = tuple(
        Segment(k + 1, skies[k].name, k, 0.9, 200, (0, 10 * k, 20, 10 * k + 10), skies[k].isthing) for k in range(4)
    )
    result = dataclasses.replace(template, segment_map=segment_map, segments=segments, vocabulary=skies)
    tracker = SegmentTracker()
    for _ in range(3):
        found = tracker.update(result)
        assert ids(found) == [1, 2, 3, 4]
        assert tracker.colours(found) == [class_colour(k, 0) for k in range(4)]


def test_labels_are_told_apart(template: PanopticResult) -> None:
    tracker = SegmentTracker()
    tracker.update(frame(template, ("ball", 0, 0, 10)))
    assert ids(tracker.update(frame(template, ("dog", 0, 0, 10)))) == [2]
    assert ids(tracker.update(frame(template, ("ball", 0, 0, 10)))) == [1], "back within the patience"


def test_forgotten_after_a_while(template: PanopticResult) -> None:
    tracker = SegmentTracker(patience=3)
    ball, empty = frame(template, ("ball", 0, 0, 10)), frame(template, ("dog", 30, 20, 9))
    tracker.update(ball)
    for _ in range(3):
        tracker.update(empty)
    assert ids(tracker.update(ball)) == [1]
    for _ in range(4):
        tracker.update(empty)
    assert len(tracker) == 1
    again = tracker.update(ball)
    assert ids(again) == [3]
    assert tracker.colours(again) == [class_colour(0, 0)], "the colour is free again"


def test_stuff_is_one_track_wherever_it_is(template: PanopticResult) -> None:
    tracker = SegmentTracker()
    first = tracker.update(frame(template, ("dog", 0, 0, 30), ("sky", 0, 0, 0)))
    second = tracker.update(frame(template, ("dog", 20, 0, 39), ("sky", 0, 0, 0)))
    assert ids(first)[1] == ids(second)[1]


def test_another_size_starts_things_anew(template: PanopticResult) -> None:
    tracker = SegmentTracker()
    tracker.update(frame(template, ("ball", 0, 0, 10), ("sky", 0, 0, 0)))
    assert ids(tracker.update(frame(template, ("ball", 0, 0, 10), ("sky", 0, 0, 0), size=(20, 30)))) == [3, 2]


def test_memory_is_bounded(template: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_LOST", 5)
    tracker = SegmentTracker(patience=1000)
    for step in range(50):
        tracker.update(frame(template, ("ball", (step * 13) % 50, (step * 7) % 30, 3)))
    assert len(tracker) <= 6


def test_frames_without_segments(template: PanopticResult) -> None:
    tracker = SegmentTracker()
    nothing = dataclasses.replace(template, segments=(), segment_map=np.zeros((40, 60), np.int32))
    assert tracker.update(nothing).segments == ()
    assert ids(tracker.update(frame(template, ("ball", 0, 0, 10)))) == [1]
    assert tracker.colours(tracker.update(nothing)) == []
