"""Hungarian matching against brute force over all assignments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from training.losses.matcher import HungarianMatcher, NonFiniteLossError, pairwise_mask_costs
from training.losses.point_sampling import sample_at_points, seeded_uniform
from training.losses.targets import MaskTargets, collate_targets


def random_targets(counts: list[int], classes: int, side: int = 16) -> MaskTargets:
    generator = torch.Generator().manual_seed(5)
    indices = [torch.randint(0, count + 1, (side, side), generator=generator) for count in counts]
    labels = [torch.randint(0, classes, (count,), generator=generator) for count in counts]
    return collate_targets(indices, labels, list(range(10, 10 + len(counts))), list(range(len(counts)))).masks_on("cpu")


def test_finds_the_cheapest_assignment() -> None:
    torch.manual_seed(0)
    targets = random_targets([3, 2], classes=4)
    class_logits, mask_logits = torch.randn(2, 5, 5), torch.randn(2, 5, 4, 4)
    matches = HungarianMatcher(points=64).match(class_logits, mask_logits, targets)
    for image, count in enumerate(targets.counts):
        points = seeded_uniform(targets.seeds[image], 0, (1, 64, 2), torch.device("cpu"))
        predicted = sample_at_points(mask_logits[image : image + 1], points)[0]
        wanted = sample_at_points(targets.masks[image : image + 1, :count], points)[0]
        costs = torch.zeros(5, count)
        for query, segment in itertools.product(range(5), range(count)):
            probability = predicted[query].sigmoid()
            overlap = 2 * (probability * wanted[segment]).sum() + 1
            costs[query, segment] = (
                5 * F.binary_cross_entropy_with_logits(predicted[query], wanted[segment])
                + 5 * (1 - overlap / (probability.sum() + wanted[segment].sum() + 1))
                - 2 * class_logits[image, query].softmax(0)[targets.labels[image, segment]]
            )
        cheapest = min(
            sum(float(costs[q, s]) for s, q in enumerate(queries))
            for queries in itertools.permutations(range(5), count)
        )
        chosen = matches.image == image
        total = costs[matches.query[chosen], matches.segment[chosen]].sum()
        assert sorted(matches.segment[chosen].tolist()) == list(range(count))
        assert float(total) == pytest.approx(cheapest, abs=1e-4)


def test_a_perfect_prediction_is_matched_to_its_segment() -> None:
    masks = torch.zeros(1, 3, 32, 32, dtype=torch.bool)
    for index in range(3):
        masks[0, index, 10 * index : 10 * index + 10] = True
    targets = MaskTargets(masks.float(), torch.tensor([[2, 0, 1]]), (3,), (7,), (1,))
    mask_logits = torch.where(masks[:, [1, 2, 0]], 20.0, -20.0)
    class_logits = torch.zeros(1, 3, 4)
    matches = HungarianMatcher(points=500).match(class_logits, mask_logits, targets)
    assert matches.segment.tolist() == [1, 2, 0]


def test_of_equal_masks_the_likelier_class_decides() -> None:
    """Likelier among the classes of a query, not among the queries."""
    targets = random_targets([1], classes=1)
    class_logits = torch.tensor([[[5.0, 8.0], [4.0, 0.0], [0.0, 4.0]]])
    matches = HungarianMatcher(points=16).match(class_logits, torch.zeros(1, 3, 8, 8), targets)
    assert matches.query.tolist() == [1]


@pytest.mark.parametrize("counts", [[0, 2], [0, 0], [1, 7]], ids=["one empty", "all empty", "more than queries"])
def test_edge_counts(counts: list[int]) -> None:
    targets = random_targets(counts, classes=3)
    matches = HungarianMatcher(points=16).match(torch.randn(2, 4, 4), torch.randn(2, 4, 8, 8), targets)
    assert len(matches.query) == sum(min(count, 4) for count in counts)


def test_costs_of_every_pair_are_its_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 3, 10, generator=generator), torch.rand(2, 4, 10, generator=generator)
    cross_entropy, dice = pairwise_mask_costs(logits, targets)
    for image, query, segment in itertools.product(range(2), range(3), range(4)):
        logit, wanted = logits[image, query], targets[image, segment]
        expected = F.binary_cross_entropy_with_logits(logit, wanted)
        assert float(cross_entropy[image, query, segment]) == pytest.approx(float(expected), abs=1e-5)
        probability = logit.sigmoid()
        share = (2 * (probability * wanted).sum() + 1) / (probability.sum() + wanted.sum() + 1)
        assert float(dice[image, query, segment]) == pytest.approx(1 - float(share), abs=1e-5)


def test_costs_are_the_losses_of_identical_masks() -> None:
    logits = torch.full((1, 1, 10), 30.0)
    cross_entropy, dice = pairwise_mask_costs(logits, torch.ones(1, 1, 10))
    assert float(cross_entropy) < 1e-6
    assert float(dice) < 1e-6


def test_not_a_number_names_the_image() -> None:
    targets = random_targets([1, 1], classes=3)
    mask_logits = torch.randn(2, 4, 8, 8)
    mask_logits[1, 2, 3, 3] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"image ids \[11\].*--resume"):
        HungarianMatcher(points=64).match(torch.randn(2, 4, 4), mask_logits, targets)
