"""Point sampling and the losses of matched masks."""

from __future__ import annotations

import pytest
import torch

from training.losses.mask_losses import PointOptions, loss_points, matched_mask_losses
from training.losses.matcher import Matches
from training.losses.point_sampling import most_uncertain_points, sample_at_points, seeded_uniform
from training.losses.targets import MaskTargets

CPU = torch.device("cpu")


def one_match(masks: torch.Tensor) -> tuple[MaskTargets, Matches]:
    index = torch.zeros(1, dtype=torch.int64)
    return MaskTargets(masks, torch.zeros(1, 1, dtype=torch.int64), (1,), (1,), (3,)), Matches(index, index, index)


def test_samples_pixel_centres_and_fades_to_zero_outside() -> None:
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [3.5 / 4, 2.5 / 3], [0.5, 0.5]]])
    assert torch.allclose(sample_at_points(maps, points), torch.tensor([[[0.0, 11.0, 5.5]]]), atol=1e-5)
    edge = sample_at_points(torch.ones(1, 1, 3, 4), torch.tensor([[[0.0, 0.5]]]))
    assert float(edge) == pytest.approx(0.5)


def test_random_numbers_depend_on_seed_and_stream_only() -> None:
    first = seeded_uniform(4, 2, (3, 2), CPU)
    torch.rand(100)
    assert torch.equal(first, seeded_uniform(4, 2, (3, 2), CPU))
    assert not torch.equal(first, seeded_uniform(4, 3, (3, 2), CPU))
    assert not torch.equal(first, seeded_uniform(5, 2, (3, 2), CPU))


def test_uncertain_points_lie_where_the_logit_is_near_zero() -> None:
    columns = torch.linspace(-8, 8, 64)
    logits = columns.expand(1, 64, 64)
    candidates = seeded_uniform(0, 0, (1, 900, 2), CPU)
    chosen = most_uncertain_points(logits, candidates, 225)
    assert (chosen[..., 0] - 0.5).abs().max() < 0.2
    assert (candidates[..., 0] - 0.5).abs().max() > 0.45


def test_loss_points_mix_uncertain_and_uniform() -> None:
    logits = torch.linspace(-8, 8, 64).expand(2, 64, 64)
    options = PointOptions(points=400, oversample_ratio=3.0, importance_ratio=0.75)
    points = loss_points(logits, torch.tensor([0, 1]), (8, 9), options, stream=0)
    assert points.shape == (2, 400, 2)
    near = ((points[..., 0] - 0.5).abs() < 0.2).float().mean(1)
    assert bool((near > 0.75).all())
    assert bool((near < 0.95).all())
    again = loss_points(logits[1:], torch.tensor([0]), (9,), options, stream=0)
    assert torch.equal(points[1:], again), "points of an image must not depend on the rest of the batch"


def test_perfect_and_opposite_masks() -> None:
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., :16] = 1
    targets, matches = one_match(masks)
    # All points uniform: the most uncertain ones sit on the edge, where even a perfect mask is half right.
    options = PointOptions(points=512, importance_ratio=0.0)
    good = 60 * masks - 30
    cross_entropy, dice = matched_mask_losses(good, targets, matches, 1.0, options, 0)
    worse_cross_entropy, worse_dice = matched_mask_losses(-good, targets, matches, 1.0, options, 0)
    assert float(cross_entropy) < 0.5 < 20 < float(worse_cross_entropy)
    assert float(dice) < 0.05 < 0.9 < float(worse_dice)


def test_values_of_a_uniform_prediction() -> None:
    masks = torch.ones(1, 1, 8, 8)
    targets, matches = one_match(masks)
    targets = MaskTargets(torch.ones(1, 1, 512, 512), targets.labels, (1,), (1,), (3,))
    logits = torch.zeros(1, 1, 8, 8)
    cross_entropy, dice = matched_mask_losses(logits, targets, matches, 2.0, PointOptions(points=1000), 0)
    assert float(cross_entropy) == pytest.approx(0.6931 / 2, abs=1e-3)
    # 1 - (2 * 500 + 1) / (500 + 1000 + 1), halved by the two masks
    assert float(dice) == pytest.approx((1 - 1001 / 1501) / 2, abs=2e-3)


def test_few_points_are_smoothed_by_one_and_masks_are_summed() -> None:
    masks, zeros = torch.ones(1, 3, 512, 512), torch.zeros(3, dtype=torch.int64)
    queries = torch.arange(3)
    targets = MaskTargets(masks, torch.zeros(1, 3, dtype=torch.int64), (3,), (1,), (3,))
    logits = torch.tensor([0.0, 0.0, 30.0])[None, :, None, None].expand(1, 3, 512, 512)
    options = PointOptions(points=4, importance_ratio=0.0)
    cross_entropy, dice = matched_mask_losses(logits, targets, Matches(zeros, queries, queries), 3.0, options, 0)
    assert float(cross_entropy) == pytest.approx(2 * 0.693147 / 3, abs=1e-5)
    assert float(dice) == pytest.approx(2 * (1 - (2 * 2 + 1) / (2 + 4 + 1)) / 3, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_matched_gives_zero_with_a_gradient(dtype: torch.dtype) -> None:
    logits = torch.full((1, 2, 256, 256), -9.0, dtype=dtype, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    targets = MaskTargets(
        torch.zeros(1, 1, 8, 8, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64), (0,), (1,), (1,)
    )
    cross_entropy, dice = matched_mask_losses(logits, targets, Matches(empty, empty, empty), 1.0, PointOptions(16), 0)
    (cross_entropy + dice).backward()
    assert float(cross_entropy) == float(dice) == 0.0
    assert logits.grad is not None
