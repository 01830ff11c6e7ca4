"""Panoptic quality against set arithmetic on pixels, and the rules for void and crowds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from odise_rt.errors import DatasetError
from training.metrics.panoptic_quality import (
    CategoryCounts,
    PanopticQuality,
    PanopticSegment,
    picture_counts,
    picture_quality,
)


def pixels(picture: np.ndarray, identifier: int) -> set[tuple[int, int]]:
    return set(zip(*np.nonzero(picture == identifier), strict=True))


def counts_by_sets(
    truth: np.ndarray, wanted: list[PanopticSegment], predicted: np.ndarray, found: list[PanopticSegment]
) -> dict[int, tuple[float, int, int, int]]:
    """The definition, segment by segment."""
    listed = {s.id for s in wanted}
    void = {p for i in np.unique(truth).tolist() if i not in listed for p in pixels(truth, i)}
    sums: dict[int, list[float]] = {s.category_id: [0.0, 0, 0, 0] for s in [*wanted, *found]}
    matched: set[int] = set()
    for target in wanted:
        if target.iscrowd:
            continue
        hit = False
        for segment in found:
            if segment.category_id != target.category_id:
                continue
            left, right = pixels(predicted, segment.id), pixels(truth, target.id)
            iou = len(left & right) / len((left - void) | right)
            if iou > 0.5:
                sums[target.category_id][0] += iou
                sums[target.category_id][1] += 1
                matched.add(segment.id)
                hit = True
        if not hit:
            sums[target.category_id][3] += 1
    for segment in found:
        if segment.id in matched:
            continue
        own = pixels(predicted, segment.id)
        crowds = [t.id for t in wanted if t.iscrowd and t.category_id == segment.category_id]
        excused = len(own & void) + (len(own & pixels(truth, crowds[-1])) if crowds else 0)
        if excused / len(own) <= 0.5:
            sums[segment.category_id][2] += 1
    return {c: (s[0], int(s[1]), int(s[2]), int(s[3])) for c, s in sums.items() if any(s[1:])}


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = np.kron(random.integers(0, 7, (4, 4)), np.ones((4, 4), int))
    # Mostly the truth, shifted and disturbed, so that there are matches, misses and near misses.
    predicted = np.roll(truth, int(random.integers(0, 3)), axis=1)
    predicted = np.where(random.random(truth.shape) < 0.15, random.integers(0, 7, truth.shape), predicted)
    categories = random.integers(1, 4, 7)
    wanted = [
        PanopticSegment(i, int(categories[i]), bool(random.random() < 0.25))
        for i in np.unique(truth).tolist()
        if i and random.random() < 0.9
    ]
    found = [
        PanopticSegment(i, int(categories[i]) if random.random() < 0.8 else 3)
        for i in np.unique(predicted).tolist()
        if i
    ]
    counts = picture_counts(truth, wanted, predicted, found)
    plain = {c: (v.iou, v.true_positives, v.false_positives, v.false_negatives) for c, v in counts.items() if v.seen}
    expected = counts_by_sets(truth, wanted, predicted, found)
    assert plain.keys() == expected.keys()
    for category, values in expected.items():
        assert plain[category] == pytest.approx(values)


def test_void_pixels_do_not_count_in_the_union() -> None:
    truth = np.array([[1] * 6 + [0] * 4])
    predicted = np.array([[5] * 10])
    counts = picture_counts(truth, [PanopticSegment(1, 9)], predicted, [PanopticSegment(5, 9)])
    assert counts[9].iou == 1.0


@pytest.mark.parametrize(("area", "iou"), [(None, 1.0), (6, 1.0), (8, 6 / 8), (12, 0.0)])
def test_the_annotations_area_counts_in_the_union(area: int | None, iou: float) -> None:
    """ADE20K's stuff has its area from before things were pasted over it."""
    truth = np.array([[1] * 6 + [2] * 4])
    wanted = [PanopticSegment(1, 9, area=area), PanopticSegment(2, 8)]
    counts = picture_counts(truth, wanted, truth, [PanopticSegment(1, 9), PanopticSegment(2, 8)])
    assert counts[9].iou == iou
    assert counts[9].true_positives == (iou > 0)
    assert counts[9].false_positives == counts[9].false_negatives == (iou == 0)
    assert counts[8].iou == 1.0


def test_prediction_on_void_or_crowd_is_excused() -> None:
    truth = np.array([[0, 0, 0, 2, 2, 2]])
    predicted = np.array([[5, 5, 5, 6, 6, 6]])
    wanted = [PanopticSegment(2, 9, iscrowd=True)]
    found = [PanopticSegment(5, 9), PanopticSegment(6, 9)]
    assert not any(c.seen for c in picture_counts(truth, wanted, predicted, found).values())
    other = picture_counts(truth, wanted, predicted, [PanopticSegment(5, 9), PanopticSegment(6, 8)])
    assert other[8].false_positives == 1, "a crowd of another category excuses nothing"


def test_a_prediction_half_of_which_is_excused_is_wrong() -> None:
    truth, predicted = np.array([[0, 1, 1]]), np.array([[5, 5, 6]])
    found = [PanopticSegment(5, 8), PanopticSegment(6, 9)]
    counts = picture_counts(truth, [PanopticSegment(1, 7)], predicted, found)
    assert (counts[8].false_positives, counts[9].false_positives) == (1, 1)


def test_a_crowd_elsewhere_excuses_nothing() -> None:
    wanted = [PanopticSegment(1, 7), PanopticSegment(2, 9, iscrowd=True)]
    counts = picture_counts(np.array([[1, 2, 2]]), wanted, np.array([[5, 0, 0]]), [PanopticSegment(5, 9)])
    assert counts[9].false_positives == 1


def test_qualities_by_hand() -> None:
    counts = CategoryCounts(iou=1.2, true_positives=2, false_positives=1, false_negatives=3)
    assert (counts.pq, counts.sq, counts.rq) == pytest.approx((1.2 / 4, 0.6, 2 / 4))
    scores = PanopticQuality({1: counts, 2: CategoryCounts(false_positives=1), 3: CategoryCounts()}).scores([1, 2, 3])
    assert (scores.pq, scores.sq, scores.rq) == pytest.approx((15, 30, 25)), "that of what never matched is 0"
    assert scores.categories == 2
    assert (CategoryCounts().pq, CategoryCounts().sq, CategoryCounts().rq) == (0, 0, 0)


def test_a_perfect_prediction_scores_hundred_and_groups_average_classes() -> None:
    truth = np.array([[1, 1, 2, 2, 3, 3]])
    segments = [PanopticSegment(1, 10), PanopticSegment(2, 11), PanopticSegment(3, 12)]
    quality = PanopticQuality()
    quality.add(picture_counts(truth, segments, truth, segments))
    scores = quality.scores([10, 11, 12, 99])
    assert (scores.pq, scores.sq, scores.rq, scores.categories) == (100.0, 100.0, 100.0, 3)
    quality.add(picture_counts(truth, segments, np.zeros_like(truth), []))
    assert quality.scores([10]).pq == pytest.approx(100 / 1.5)
    nothing = quality.scores([99])
    assert nothing.categories == 0
    assert math.isnan(nothing.pq)


def test_quality_of_one_picture_joins_its_classes() -> None:
    counts = {1: CategoryCounts(0.8, 1, 0, 0), 2: CategoryCounts(0.0, 0, 1, 1)}
    assert picture_quality(counts) == pytest.approx(0.8 / 2)
    assert math.isnan(picture_quality({})), "a picture that is void, and nothing was found beside"


@pytest.mark.parametrize(
    ("predicted", "segments", "message"),
    [
        (np.array([[1, 2]]), [PanopticSegment(1, 1)], "not in the segment list"),
        (np.array([[1, 1]]), [PanopticSegment(1, 1), PanopticSegment(2, 1)], "no pixel"),
        (np.array([[1]]), [PanopticSegment(1, 1)], "sizes must agree"),
    ],
)
def test_inconsistent_predictions_are_refused(
    predicted: np.ndarray, segments: list[PanopticSegment], message: str
) -> None:
    with pytest.raises(DatasetError, match=f"image 3.*{message}"):
        picture_counts(np.array([[1, 1]]), [PanopticSegment(1, 1)], predicted, segments, "image 3")
