"""Mean IoU by hand and against set arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from odise_rt.errors import DatasetError
from training.metrics.mean_iou import MeanIou


def test_by_hand() -> None:
    metric = MeanIou(4)
    metric.add(np.array([[0, 0, 1, 1, -1]]), np.array([[0, 1, 1, 1, 3]]))
    iou = metric.iou()
    assert iou[:2] == pytest.approx([1 / 2, 2 / 3])
    assert np.isnan(iou[2])
    assert np.isnan(iou[3]), "predicted on void alone"
    scores = metric.scores()
    assert scores.miou == scores.miou_with_predicted == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert scores.pixel_accuracy == pytest.approx(75)
    assert scores.classes == 2
    assert metric.scores([1]).miou == pytest.approx(200 / 3)
    nothing = metric.scores([2, 3])
    assert nothing.classes == 0
    assert np.isnan([nothing.miou, nothing.miou_with_predicted, nothing.pixel_accuracy]).all()


def test_a_class_that_is_only_predicted_lowers_one_of_two_means() -> None:
    metric = MeanIou(4)
    metric.add(np.array([[0, 0, 1, 1, -1]]), np.array([[0, 2, 1, 1, 3]]))
    scores = metric.scores()
    assert scores.miou == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert scores.miou_with_predicted == pytest.approx(100 * (1 / 2 + 1 + 0) / 3), "class 3 lies on void"
    assert metric.scores([0, 1]).miou_with_predicted == pytest.approx(75), "of the group's own classes"
    metric.add(np.array([[0]]), np.array([[-1]]))
    assert metric.scores().miou_with_predicted == pytest.approx(100 * (1 / 3 + 1 + 0) / 3), "nothing is no class"


def test_each_picture_has_its_own_value() -> None:
    metric = MeanIou(3)
    assert metric.add(np.array([[0, 0, 1]]), np.array([[0, 1, 1]])) == pytest.approx(1 / 2)
    assert metric.add(np.array([[2, 2]]), np.array([[2, 2]])) == 1
    assert np.isnan(metric.add(np.array([[-1]]), np.array([[0]])))
    assert MeanIou(3).add(np.array([[2]]), np.array([[2]])) == 1, "a single pixel"
    assert metric.scores().miou == pytest.approx(100 * (1 / 2 + 1 / 2 + 1) / 3)


def test_sums_over_pictures_equal_one_big_picture() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(-1, 5, (6, 8, 8)), random.integers(-1, 5, (6, 8, 8))
    parts, whole = MeanIou(5), MeanIou(5)
    for t, p in zip(truth, predicted, strict=True):
        parts.add(t, p)
    whole.add(truth.reshape(6, 64), predicted.reshape(6, 64))
    assert np.array_equal(parts.confusion, whole.confusion)
    for k in range(5):
        t, p = truth == k, (predicted == k) & (truth != -1)
        assert whole.iou()[k] == pytest.approx((t & p).sum() / (t | p).sum())


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([[0, 1]], [[0]], "sizes"),
        ([[0, 3]], [[0, 0]], "ground truth holds"),
        ([[-2, 0]], [[0, 0]], "ground truth holds"),
        ([[0, 0]], [[0, 3]], "prediction holds"),
        ([[0, 0]], [[-2, 0]], "prediction holds"),
    ],
)
def test_bad_maps_are_refused(truth: list[list[int]], predicted: list[list[int]], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        MeanIou(3).add(np.array(truth), np.array(predicted))
