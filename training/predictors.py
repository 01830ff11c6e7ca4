"""One interface over what can be evaluated: a PyTorch model or an exported bundle.

Both go through the runtime's own resizing, classification and merging; only the networks differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from odise_rt.classification import MaskEmbeddings, classify
from odise_rt.options import Output, SegmentOptions
from odise_rt.postprocessing import InstanceMask, MaskResizer, find_instances, merge_panoptic, semantic_map
from odise_rt.preprocessing import network_size, prepare
from odise_rt.prompts import fill
from odise_rt.results import Instance, Segment
from odise_rt.segmenter import Segmenter
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise
from odise_rt.vocabulary import Vocabulary
from training.models.odise import Odise
from training.torch_stages import model_constants, model_facts
from training.words import WordEmbedder


@dataclass(frozen=True)
class PicturePrediction:
    """Everything said about one picture, at its own size."""

    segment_map: npt.NDArray[np.int32]
    """(h, w), 0 = no segment."""
    segments: tuple[Segment, ...]
    semantic: npt.NDArray[np.int32] | None
    """(h, w) class indices, when asked for."""
    instances: tuple[Instance, ...]
    """Empty unless asked for."""


class Predictor(Protocol):
    """Segments pictures with one vocabulary."""

    @property
    def description(self) -> str:
        """What predicts, for the report."""
        ...

    @property
    def training_vocabulary(self) -> Sequence[str]:
        """Names seen in training."""
        ...

    def predict(self, image: npt.NDArray[np.uint8], vocabulary: Vocabulary) -> PicturePrediction:
        """Segment an RGB picture (h, w, 3)."""
        ...


class ModelPredictor:
    """Runs a PyTorch model."""

    def __init__(
        self,
        model: Odise,
        tokenizer_json: str,
        training_vocabulary: Sequence[str],
        options: SegmentOptions | None = None,
        name: str = "model",
    ) -> None:
        """Wrap a model, which may go on being trained; text projections are read at every vocabulary's first use.

        Args:
            model: on any device.
            tokenizer_json: text of its tokenizer file.
            training_vocabulary: names seen in training.
            options: outputs and thresholds.
            name: for the report.
        """
        self.model = model
        self.facts = model_facts(model)
        self.options = (options or SegmentOptions()).resolve(self.facts)
        self.embedder = WordEmbedder(model, tokenizer_json)
        self._training_vocabulary = tuple(training_vocabulary)
        self.constants = model_constants(model)
        self.name = name
        self._words: tuple[Vocabulary, EmbeddedVocabulary] | None = None

    @property
    def description(self) -> str:
        """What predicts, for the report."""
        return f"PyTorch {torch.__version__} on {self.model.noise.device}, {self.name}"

    @property
    def training_vocabulary(self) -> Sequence[str]:
        """Names seen in training."""
        return self._training_vocabulary

    @torch.no_grad()
    def embed(self, vocabulary: Vocabulary) -> EmbeddedVocabulary:
        """Both classifiers' word embeddings; the latest vocabulary's are remembered."""
        if self._words is None or self._words[0] is not vocabulary:
            mask_text = self.embedder.embed(fill(self.facts.mask_prompt, vocabulary.words))
            projected = self.model.mask_classifier.project_text(mask_text)
            clip_text = self.embedder.embed(fill(self.facts.clip_prompt, vocabulary.words))
            rows = EmbeddedVocabulary(normalise(projected.cpu().numpy()), normalise(clip_text.cpu().numpy()))
            self._words = (vocabulary, rows)
        return self._words[1]

    def predict(self, image: npt.NDArray[np.uint8], vocabulary: Vocabulary) -> PicturePrediction:
        """Segment an RGB picture (h, w, 3)."""
        options, facts = self.options, self.facts
        size = network_size(image.shape[0], image.shape[1], options.short_edge, options.long_edge)
        prepared = prepare(image, size, facts.size_divisor)
        tensor = torch.from_numpy(prepared.image).to(self.model.noise.device)
        prediction, clip_embedding = self.model.segment_features(tensor)
        objects = prediction.object_logits
        classes = classify(
            MaskEmbeddings(
                prediction.mask_embedding[0].float().cpu().numpy(),
                clip_embedding[0].float().cpu().numpy(),
                None if objects is None else objects[0].float().cpu().numpy(),
            ),
            self.embed(vocabulary),
            vocabulary.first_word,
            vocabulary.seen(self._training_vocabulary),
            facts,
            self.constants.get("no_object_embedding"),
            options.clip_weight_seen,
            options.clip_weight_unseen,
        ).probabilities
        masks = prediction.mask_logits[0].float().cpu().numpy()
        resizer = MaskResizer((masks.shape[1], masks.shape[2]), prepared.network_size, prepared.original_size)
        segment_map, merged = merge_panoptic(
            masks,
            classes,
            vocabulary.isthing,
            resizer,
            options.object_mask_threshold,
            options.overlap_threshold,
        )
        instances: list[InstanceMask] = []
        if "instance" in options.outputs:
            instances = find_instances(masks, classes, vocabulary.isthing, resizer, options.instances_per_image)
        return PicturePrediction(
            segment_map,
            tuple(
                Segment(s.id, vocabulary[s.class_index].name, s.class_index, s.score, s.area, s.box, s.isthing)
                for s in merged
            ),
            semantic_map(masks, classes, resizer) if "semantic" in options.outputs else None,
            tuple(
                Instance(
                    vocabulary[i.class_index].name,
                    i.class_index,
                    i.score,
                    i.area,
                    i.box,
                    prepared.original_size,
                    i.bits,
                )
                for i in instances
            ),
        )


class BundlePredictor:
    """Runs a bundle through the runtime."""

    def __init__(self, path: Path, options: SegmentOptions | None = None) -> None:
        """Load a bundle folder.

        Args:
            path: the folder.
            options: outputs and thresholds.
        """
        self.segmenter = Segmenter.load(path)
        self.options = options or SegmentOptions()

    @property
    def description(self) -> str:
        """What predicts, for the report."""
        bundle = self.segmenter.bundle
        return f"bundle {bundle.name} ({bundle.precision}) on {self.segmenter.device}"

    @property
    def training_vocabulary(self) -> Sequence[str]:
        """Names seen in training."""
        return tuple(self.segmenter.bundle.training_vocabulary)

    def predict(self, image: npt.NDArray[np.uint8], vocabulary: Vocabulary) -> PicturePrediction:
        """Segment an RGB picture (h, w, 3)."""
        result = self.segmenter.segment(image, vocabulary, self.options)
        return PicturePrediction(result.segment_map, result.segments, result.semantic_map, result.instances or ())


def outputs_for(metrics: Sequence[str]) -> tuple[Output, ...]:
    """Outputs that the named metrics need."""
    wanted: list[Output] = ["panoptic"]
    if "miou" in metrics:
        wanted.append("semantic")
    if "ap" in metrics:
        wanted.append("instance")
    return tuple(wanted)
