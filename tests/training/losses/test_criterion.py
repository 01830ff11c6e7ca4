"""The composed objective: values, names, empty images, NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from training.losses import (
    CaptionWords,
    Criterion,
    CriterionOptions,
    LossWeights,
    NonFiniteLossError,
    PointOptions,
    Prediction,
    collate_targets,
)
from training.losses.criterion import Divisors, classification_loss
from training.losses.mask_losses import matched_mask_losses
from training.losses.targets import MaskTargets, SegmentTargets

OPTIONS = CriterionOptions(points=PointOptions(points=64))


def targets_of(counts: list[int], classes: int) -> MaskTargets:
    return segments_of(counts, classes).masks_on("cpu")


def segments_of(counts: list[int], classes: int) -> SegmentTargets:
    generator = torch.Generator().manual_seed(1)
    return collate_targets(
        [torch.randint(0, n + 1, (16, 16), generator=generator) for n in counts],
        [torch.randint(0, classes, (n,), generator=generator) for n in counts],
        [100 + i for i in range(len(counts))],
        list(range(len(counts))),
    )


def test_classification_is_weighted_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4), torch.tensor([[0, 3, 3, 2, 3], [3, 3, 1, 3, 3]])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=torch.tensor([1.0, 1.0, 1.0, 0.1]))
    weight = Divisors.of_batch([2, 1], queries=5, no_object_weight=0.1, device=logits.device).class_weight
    assert torch.allclose(classification_loss(logits, labels, 0.1, weight), expected)


def test_the_published_objective_is_the_default() -> None:
    assert LossWeights() == LossWeights(classification=2.0, mask=5.0, dice=5.0, word=1.0, void=0.1)
    assert CriterionOptions() == CriterionOptions(class_cost=2.0, mask_cost=5.0, dice_cost=5.0)
    assert PointOptions() == PointOptions(points=112 * 112, oversample_ratio=3.0, importance_ratio=0.75)


@pytest.mark.parametrize("counts", [[2, 1], [1]])
def test_losses_are_what_their_names_say(counts: list[int]) -> None:
    torch.manual_seed(0)
    targets = targets_of(counts, classes=4)
    masks, classes, embedding = (torch.randn(len(counts), 6, *size) for size in ((8, 8), (5,), (7,)))
    criterion = Criterion(OPTIONS)
    losses = criterion([Prediction(masks, classes)], targets)
    matches = criterion.matcher.match(classes, masks, targets)
    labels = torch.full((len(counts), 6), 4)
    for image, query, segment in zip(matches.image, matches.query, matches.segment, strict=True):
        labels[image, query] = targets.labels[image, segment]
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])
    expected = 2 * F.cross_entropy(classes.flatten(0, 1), labels.flatten(), weight)
    torch.testing.assert_close(losses["class"], expected)
    mask, dice = matched_mask_losses(masks, targets, matches, sum(counts), OPTIONS.points, 0)
    torch.testing.assert_close((losses["mask"], losses["dice"]), (5 * mask, 5 * dice))
    words = CaptionWords(torch.randn(len(counts), 3, 7), torch.tensor([True] * len(counts)), 10.0)
    weighty = Criterion(dataclasses.replace(OPTIONS, weights=LossWeights(word=3.0)))
    word = weighty([Prediction(masks, classes[..., :2], embedding)], targets, words)["word"]
    torch.testing.assert_close(word, 3 * criterion.grounding(embedding, words.embedding, words.valid, 10.0))


def test_losses_of_parts_add_up_to_those_of_the_batch() -> None:
    torch.manual_seed(0)
    segments = segments_of([2, 0, 9, 3], classes=4)  # the third has more segments than there are queries
    masks, classes = torch.randn(4, 6, 8, 8), torch.randn(4, 6, 5)
    whole = Criterion(OPTIONS)([Prediction(masks, classes)], segments.masks_on("cpu"))
    for size in (1, 2):
        sums = dict.fromkeys(whole, torch.zeros(()))
        for part, *logits in zip(segments.split(4 // size), masks.split(size), classes.split(size), strict=True):
            for name, loss in Criterion(OPTIONS)([Prediction(*logits)], part.masks_on("cpu")).items():
                sums[name] = sums[name] + loss
        for name, loss in whole.items():
            torch.testing.assert_close(sums[name], loss)


def test_names_weights_and_auxiliary_outputs() -> None:
    torch.manual_seed(0)
    targets = targets_of([2, 3], classes=4)
    predictions = [Prediction(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 5)) for _ in range(3)]
    losses = Criterion(OPTIONS)(predictions, targets)
    assert set(losses) == {name + tail for name in ("class", "mask", "dice") for tail in ("", "/0", "/1")}
    alone = Criterion(OPTIONS)(predictions[:1], targets)
    assert all(torch.equal(alone[name], losses[name]) for name in alone)


def test_an_empty_mask_is_a_target_like_any_other() -> None:
    """It gets a query, which learns its class and an empty mask, and it counts in the divisor."""
    torch.manual_seed(0)
    index = torch.zeros(16, 16, dtype=torch.int32)
    index[:, :8] = 1
    targets = collate_targets([index], [torch.tensor([0, 2])], [1], [1]).masks_on("cpu")
    masks, classes = torch.randn(1, 4, 16, 16, requires_grad=True), torch.zeros(1, 4, 4, requires_grad=True)
    optimizer = torch.optim.Adam([masks, classes], lr=0.3)
    criterion = Criterion(OPTIONS)
    for _ in range(40):
        losses = criterion([Prediction(masks, classes)], targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    matches = criterion.matcher.match(classes, masks, targets)
    assert sorted(matches.segment.tolist()) == [0, 1]
    for query, segment in zip(matches.query.tolist(), matches.segment.tolist(), strict=True):
        assert classes[0, query].argmax() == (0, 2)[segment]
        assert bool(((masks[0, query] > 0) == targets.masks[0, segment]).float().mean() > 0.95)


def test_learning_moves_all_losses_down() -> None:
    torch.manual_seed(0)
    half, both = torch.zeros(16, 16, dtype=torch.int32), torch.zeros(16, 16, dtype=torch.int32)
    half[:, :8] = both[:, :8] = 1
    both[4:12, 8:] = 2
    targets = collate_targets([both, half], [torch.tensor([0, 2]), torch.tensor([1])], [1, 2], [1, 2]).masks_on("cpu")
    masks, classes = torch.randn(2, 4, 16, 16, requires_grad=True), torch.zeros(2, 4, 4, requires_grad=True)
    optimizer = torch.optim.Adam([masks, classes], lr=0.3)
    history = []
    for _ in range(40):
        losses = Criterion(OPTIONS)([Prediction(masks, classes)], targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    assert all(history[-1][name] < 0.35 * history[0][name] for name in history[0])


def test_images_without_segments() -> None:
    targets = targets_of([0, 0], classes=3)
    losses = Criterion(OPTIONS)([Prediction(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4))], targets)
    assert float(losses["mask"]) == float(losses["dice"]) == 0.0
    assert float(losses["class"]) > 0


def test_captions_make_labels_class_agnostic() -> None:
    torch.manual_seed(0)
    targets = targets_of([2, 2], classes=9)
    prediction = Prediction(torch.randn(2, 5, 8, 8), torch.randn(2, 5, 2), torch.randn(2, 5, 6))
    words = CaptionWords(torch.randn(2, 3, 6), torch.tensor([True, True]), 10.0)
    losses = Criterion(OPTIONS)([prediction], targets, words)
    assert set(losses) == {"class", "mask", "dice", "word"}
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_nan_in_a_class_logit_names_the_batch() -> None:
    targets = targets_of([0, 0], classes=3)
    classes = torch.zeros(2, 4, 4)
    classes[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"image ids \[100, 101\]|image ids \[100\]"):
        Criterion(OPTIONS)([Prediction(torch.randn(2, 4, 8, 8), classes)], targets)


def test_nan_in_a_word_names_the_loss_and_the_batch() -> None:
    targets = targets_of([1, 1], classes=1)
    words = CaptionWords(torch.full((2, 3, 6), float("nan")), torch.tensor([True, True]), 10.0)
    with pytest.raises(NonFiniteLossError, match=r"losses \['word'\] .* image ids \[100, 101\]"):
        Criterion(OPTIONS)(
            [Prediction(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 2), torch.randn(2, 4, 6))], targets, words
        )
