"""The training objective: classification, mask and grounding losses of the final and every auxiliary prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distributed import mean_over_processes
from training.losses.caption_grounding import CaptionGroundingLoss
from training.losses.mask_losses import PointOptions, matched_mask_losses
from training.losses.matcher import HungarianMatcher, Matches, NonFiniteLossError
from training.losses.targets import MaskTargets


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses (odise.md 7)."""

    classification: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    word: float = 1.0
    void: float = 0.1
    """Weight of the class "no object" inside the classification loss; saved states of runs know it by this
    name."""


@dataclass(frozen=True)
class CriterionOptions:
    """Everything that defines the objective."""

    weights: LossWeights = field(default_factory=LossWeights)
    points: PointOptions = field(default_factory=PointOptions)
    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0


@dataclass(frozen=True)
class Prediction:
    """One of the mask decoder's outputs, classified."""

    mask_logits: Tensor
    """(B, Q, h, w)."""
    class_logits: Tensor
    """(B, Q, K+1), "no object" last; (B, Q, 2) [object, no object] for the caption variant."""
    mask_embedding: Tensor | None = None
    """(B, Q, P) for the grounding loss; None for the label variant."""


@dataclass(frozen=True)
class CaptionWords:
    """Words of the batch's captions for the grounding loss."""

    embedding: Tensor
    """(B, W, P) projected word embeddings."""
    valid: Tensor
    """(B,) bool."""
    logit_scale: Tensor | float


@dataclass(frozen=True)
class Divisors:
    """What sums over a batch are divided by: means over the *global* batch.

    They follow from the numbers of segments alone, so that any split of a batch, over processes or in time, gives the
    gradient of the whole; the published code divides by each process's own class weights.
    """

    segments: Tensor
    """Segments of the batch, averaged over processes, at least 1."""
    class_weight: Tensor
    """Weights of all queries' classes, averaged over processes: each segment is matched while there are queries."""

    @classmethod
    def of_batch(cls, counts: Sequence[int], queries: int, no_object_weight: float, device: torch.device) -> Divisors:
        """Make them from the numbers of segments of this process's images, of which ``queries`` each can be matched."""
        matched = sum(min(count, queries) for count in counts)
        weight = matched + no_object_weight * (len(counts) * queries - matched)
        both = mean_over_processes(torch.tensor([float(sum(counts)), weight], device=device))
        return cls(both[0].clamp(min=1.0), both[1].clamp(min=1e-6))


def classification_loss(class_logits: Tensor, labels: Tensor, no_object_weight: float, class_weight: Tensor) -> Tensor:
    """Cross-entropy over K+1 classes with a small weight on "no object".

    Args:
        class_logits: (B, Q, K+1).
        labels: (B, Q) int64, K for "no object".
        no_object_weight: weight of class K.
        class_weight: divisor, see :class:`Divisors`.
    """
    no_object = class_logits.shape[-1] - 1
    weights = torch.where(labels == no_object, no_object_weight, 1.0)
    losses = F.cross_entropy(class_logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / class_weight


def matched_labels(class_logits: Tensor, targets: MaskTargets, matches: Matches) -> Tensor:
    """(B, Q) int64: the matched segment's class, or "no object" (K)."""
    labels = torch.full(class_logits.shape[:2], class_logits.shape[-1] - 1, device=class_logits.device)
    labels[matches.image, matches.query] = targets.labels[matches.image, matches.segment]
    return labels


class Criterion:
    """Losses by name: ``class``, ``mask``, ``dice`` and, with captions, ``word``; auxiliary ones end in ``/0`` ..."""

    def __init__(self, options: CriterionOptions) -> None:
        self.options = options
        self.matcher = HungarianMatcher(options.class_cost, options.mask_cost, options.dice_cost, options.points.points)
        self.grounding = CaptionGroundingLoss()

    def __call__(
        self, predictions: Sequence[Prediction], targets: MaskTargets, words: CaptionWords | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses.

        Args:
            predictions: the final one first, then the auxiliary ones.
            targets: segments; made class-agnostic here when ``words`` is given.
            words: caption words, for the caption variant.

        Returns:
            Weighted scalars; their sum is the objective.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; names the images.
        """
        if words is not None:
            targets = targets.class_agnostic()
        classes = predictions[0].class_logits
        divisors = Divisors.of_batch(
            targets.batch_counts or targets.counts, classes.shape[1], self.options.weights.void, classes.device
        )
        losses: dict[str, Tensor] = {}
        for stream, prediction in enumerate(predictions):
            suffix = "" if stream == 0 else f"/{stream - 1}"
            for name, loss in self._losses_of(prediction, targets, words, divisors, stream).items():
                losses[name + suffix] = loss
        broken = [name for name, loss in losses.items() if not bool(loss.detach().isfinite())]
        if broken:
            raise NonFiniteLossError(
                f"losses {broken} are NaN or infinite for a batch with image ids {list(targets.image_ids)}: look at "
                "these images and go on with --resume, or start a new run with a lower learning rate, or with bf16 or "
                "fp32 instead of fp16"
            )
        return losses

    def _losses_of(
        self,
        prediction: Prediction,
        targets: MaskTargets,
        words: CaptionWords | None,
        divisors: Divisors,
        stream: int,
    ) -> dict[str, Tensor]:
        weights = self.options.weights
        matches = self.matcher.match(prediction.class_logits, prediction.mask_logits, targets, stream)
        labels = matched_labels(prediction.class_logits, targets, matches)
        mask, dice = matched_mask_losses(
            prediction.mask_logits, targets, matches, divisors.segments, self.options.points, stream
        )
        classification = classification_loss(prediction.class_logits, labels, weights.void, divisors.class_weight)
        losses = {
            "class": weights.classification * classification,
            "mask": weights.mask * mask,
            "dice": weights.dice * dice,
        }
        if words is not None:
            assert prediction.mask_embedding is not None
            losses["word"] = weights.word * self.grounding(
                prediction.mask_embedding, words.embedding, words.valid, words.logit_scale
            )
        return losses
