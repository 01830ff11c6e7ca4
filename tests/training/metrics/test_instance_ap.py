"""Mask AP in cases whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.metrics.instance_ap import InstanceAp


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((64, 64), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_perfect_masks_score_hundred() -> None:
    metric = InstanceAp()
    truth = [(box(0, 0, 20, 20), 1, False), (box(30, 30, 60, 60), 2, False)]
    metric.add(truth, [(mask, category, 0.9) for mask, category, _ in truth], (64, 64))
    scores = metric.scores([1, 2])
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((100.0, 100.0, 100.0))


def test_iou_of_two_thirds_counts_at_four_thresholds() -> None:
    metric = InstanceAp()
    metric.add([(box(0, 0, 30, 30), 1, False)], [(box(0, 0, 20, 30), 1, 0.5)], (64, 64))
    scores = metric.scores([1])
    assert scores.ap50 == pytest.approx(100.0)
    assert scores.ap75 == pytest.approx(0.0)
    assert scores.ap == pytest.approx(40.0)  # 0.50, 0.55, 0.60, 0.65 of ten thresholds


def test_a_better_scored_false_alarm_halves_precision() -> None:
    metric = InstanceAp()
    metric.add([(box(0, 0, 20, 20), 1, False)], [(box(40, 40, 60, 60), 1, 0.9), (box(0, 0, 20, 20), 1, 0.5)], (64, 64))
    assert metric.scores([1]).ap == pytest.approx(50.0)


def test_detections_on_a_crowd_are_ignored() -> None:
    metric = InstanceAp()
    truth = [(box(0, 0, 20, 20), 1, False), (box(30, 0, 64, 64), 1, True)]
    metric.add(truth, [(box(35, 5, 50, 20), 1, 0.9), (box(0, 0, 20, 20), 1, 0.5)], (64, 64))
    assert metric.scores([1]).ap == pytest.approx(100.0)


def test_wrong_class_and_nothing_score_zero() -> None:
    metric = InstanceAp()
    metric.add([(box(0, 0, 20, 20), 1, False)], [(box(0, 0, 20, 20), 2, 0.9), (box(0, 0, 0, 0), 1, 0.9)], (64, 64))
    assert metric.scores([1, 2]).ap == 0.0


@pytest.mark.parametrize("category", [1, 2, 3])
def test_without_truth_to_find_there_is_no_ap(category: int) -> None:
    metric = InstanceAp()
    metric.add([(box(0, 0, 20, 20), 1, True), (box(30, 30, 60, 60), 4, False)], [(box(0, 0, 20, 20), 2, 0.9)], (64, 64))
    assert math.isnan(metric.scores([category]).ap)
    assert math.isnan(InstanceAp().scores([category]).ap)


def test_what_is_there_and_never_found_scores_zero() -> None:
    metric = InstanceAp()
    metric.add([(box(0, 0, 20, 20), 1, False)], [], (64, 64))
    scores = metric.scores([1])
    assert (scores.ap, scores.ap50, scores.ap75) == (0.0, 0.0, 0.0)


def test_a_mask_without_pixels_is_no_false_alarm() -> None:
    metric = InstanceAp()
    metric.add([(box(0, 0, 20, 20), 1, False)], [(box(0, 0, 0, 0), 1, 0.9), (box(0, 0, 20, 20), 1, 0.5)], (64, 64))
    assert metric.scores([1]).ap == pytest.approx(100.0)
