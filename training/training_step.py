"""One forward pass of training, pyramid to losses: the module that DistributedDataParallel wraps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from odise_rt.windows import window_grid
from training.experiment import Precision
from training.frozen_features import FrozenFeatures, frozen_features, pyramid_from_features
from training.losses import CaptionWords, Criterion, Prediction, SegmentTargets
from training.models.mask_decoder import MaskPrediction
from training.models.odise import Odise

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ClassText:
    """CLIP embeddings of the training vocabulary."""

    embedding: Tensor
    """(L, D) of all synonyms, class by class."""
    synonym_counts: tuple[int, ...]
    """How many of the L belong to each class."""


@dataclass(frozen=True)
class StepInput:
    """A batch as the step reads it: pictures or their cached features, targets, and caption words."""

    side: int
    """Canvas side in pixels."""
    targets: SegmentTargets
    images: Tensor | None = None
    """(B, 3, S, S) uint8, unless features are given."""
    features: FrozenFeatures | None = None
    word_text: Tensor | None = None
    """(B, W, D) CLIP embeddings of caption words; caption variant only."""
    words_valid: Tensor | None = None
    """(B,) bool."""
    caption_context: Tensor | None = None
    """(B, T, context_dim) text encoder's output for the pictures' captions; conditioning "caption" only."""

    def split(self, parts: int) -> list[StepInput]:
        """Equal parts, in order, whose losses add up to those of the whole; ``parts`` divides B.

        Not with caption words: the grounding loss compares all pictures of a batch.
        """
        assert parts == 1 or self.word_text is None
        if parts == 1:
            return [self]

        def cut(tensor: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * parts if tensor is None else tensor.chunk(parts)

        features = [None] * parts if self.features is None else self.features.split(parts)
        columns = (self.targets.split(parts), cut(self.images), features, cut(self.caption_context))
        return [
            StepInput(self.side, targets, images, frozen, caption_context=context)
            for targets, images, frozen, context in zip(*columns, strict=True)
        ]


class TrainingStep(nn.Module):
    """Losses by name for a batch."""

    def __init__(
        self,
        model: Odise,
        criterion: Criterion,
        class_text: ClassText | None,
        precision: Precision = "fp32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        assert (class_text is not None) == (model.config.variant == "label")
        self.model = model
        self.criterion = criterion
        self.class_text = class_text
        self.precision = precision
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, batch: StepInput) -> dict[str, Tensor]:
        """Weighted losses; their sum is the objective."""
        device = self.model.noise.device
        with torch.autocast(device.type, _AUTOCAST.get(self.precision), enabled=self.precision != "fp32"):
            levels = self.pyramid(batch, device)
            # Offsets of deformable attention are positions: fp16 would round them to whole pixels (odise.md 4.1).
            with torch.autocast(device.type, enabled=False):
                generator = self.model.mask_generator
                mask_features, refined = generator.pixel_decoder({k: v.float() for k, v in levels.items()})
            prediction = generator.predict(mask_features, refined, aux=True)
            predictions = [self.classified(head) for head in (prediction, *prediction.aux)]
            words = self.caption_words(batch, device)
        return self.criterion(predictions, batch.targets.masks_on(device), words)

    def pyramid(self, batch: StepInput, device: torch.device) -> dict[str, Tensor]:
        """Stitched levels s2..s5."""
        if batch.features is not None:
            features = batch.features.to(device)
        else:
            assert batch.images is not None
            features = frozen_features(self.model, batch.images.to(device, non_blocking=True).float() / 255.0)
        grid = window_grid(batch.side, batch.side, self.model.config.window)
        context = None if batch.caption_context is None else batch.caption_context.to(device)
        return pyramid_from_features(self.model, features, grid, context, self.gradient_checkpointing)

    def classified(self, head: MaskPrediction) -> Prediction:
        """One prediction head with its class logits."""
        if self.class_text is None:
            assert head.object_logits is not None
            return Prediction(head.mask_logits, head.object_logits, head.mask_embedding)
        classifier = self.model.mask_classifier
        text = classifier.project_text(self.class_text.embedding.to(head.mask_embedding.device))
        scale = self.model.mask_generator.mask_embedding.logit_scale
        logits = classifier(head.mask_embedding.float(), text.float(), self.class_text.synonym_counts, scale)
        return Prediction(head.mask_logits, logits)

    def caption_words(self, batch: StepInput, device: torch.device) -> CaptionWords | None:
        """Projected words of the captions; None for the label variant."""
        if self.class_text is not None:
            return None
        assert batch.word_text is not None
        assert batch.words_valid is not None
        projected = self.model.mask_classifier.project_text(batch.word_text.to(device))
        scale = self.model.mask_generator.mask_embedding.logit_scale
        return CaptionWords(projected, batch.words_valid.to(device), scale)
