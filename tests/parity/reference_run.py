"""One variant's run: our model, the recording, and the image, words and windows that both share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from odise_rt.classification import Classification, Classifier, MaskEmbeddings, classify, clip_weights
from odise_rt.postprocessing import MaskResizer
from odise_rt.preprocessing import PreparedImage, prepare
from odise_rt.prompts import fill
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise
from odise_rt.tokenizer import Tokenizer
from odise_rt.vocabulary import Vocabulary
from odise_rt.windows import window_grid
from tests.parity.recorded import Recorded
from training.models.odise import Odise
from training.models.windows import cut_windows
from training.torch_stages import model_facts

STUFF = ("sky", "grass", "road", "building", "tree")
UNSEEN = "purple elephant balloon"
"""The one class of the run that has no synonym among COCO's names."""
WINDOWS = {"": 0, "#5": 5}
"""Suffix of a recorded name to the window that it belongs to."""


class Run:
    """One variant: our model, the recording, and what both need around them."""

    def __init__(self, variant: str, model: Odise, recorded: Recorded, tokenizer_json: str, folder: Path) -> None:
        """``folder`` takes the tokenizer, which the runtime reads from a file."""
        self.variant = variant
        self.model = model
        self.recorded = recorded
        self.facts = model_facts(model)
        self.tokenizer_json = tokenizer_json
        path = folder / f"{variant}_tokenizer.json"
        path.write_text(tokenizer_json, "utf-8")
        self.tokenizer = Tokenizer(path, self.facts)

    def tensor(self, key: str) -> Tensor:
        """A recorded tensor as a stage's input."""
        return torch.from_numpy(self.recorded[key].copy())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The classes of the run."""
        entries = self.recorded.json("labels_json")
        things = [words for words in entries if words[0] not in STUFF]
        stuff = [words for words in entries if words[0] in STUFF]
        by_name = {entry.name: entry for entry in Vocabulary.from_lists(things=things, stuff=stuff)}
        return Vocabulary(tuple(by_name[words[0]] for words in entries))

    @cached_property
    def seen(self) -> np.ndarray:
        """bool (K,)."""
        return np.array([name != UNSEEN for name in self.vocabulary.names])

    @cached_property
    def image(self) -> PreparedImage:
        """The image, which already has its test size."""
        pixels = self.recorded["input.image"].transpose(1, 2, 0)
        return prepare(pixels, pixels.shape[:2], self.facts.size_divisor)

    @cached_property
    def windows(self) -> Tensor:
        """The windows of :data:`WINDOWS`, (2, 3, side, side)."""
        canvas = torch.from_numpy(self.image.canvas)
        height, width = canvas.shape[2:]
        cut = cut_windows(canvas, window_grid(height, width, self.facts.window))
        return cut[list(WINDOWS.values())]

    @cached_property
    def resizer(self) -> MaskResizer:
        """From mask logits to the image."""
        height, width = self.image.canvas.shape[2:]
        return MaskResizer((height // 4, width // 4), self.image.network_size, self.image.original_size)

    def embed_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Our text embeddings of the words: projected (L, P) of the mask prompt, (L, D) of CLIP's; unnormalised."""
        prompts = [
            fill(template, self.vocabulary.words) for template in (self.facts.mask_prompt, self.facts.clip_prompt)
        ]
        mask, clip = (self.model.clip_text(torch.from_numpy(self.tokenizer(texts))) for texts in prompts)
        return mask[1].numpy(), clip[0].numpy()

    def classify(self, mask: np.ndarray, clip: np.ndarray, object_logits: np.ndarray | None) -> Classification:
        """The runtime's classification of masks from their embeddings, (1, Q, C) each, with recorded text embeddings.

        The text embeddings of CLIP's prompt were not recorded; ours stand in for them.
        """
        mask_text, clip_text = self.recorded["text_head.text_embed"], self.embed_words()[1]
        no_object = self.recorded["text_head.null_embed"][0] if self.variant == "label" else None
        classifier = Classifier(
            self.facts,
            no_object,
            EmbeddedVocabulary(normalise(mask_text), normalise(clip_text)),
            self.vocabulary.first_word,
            clip_weights(self.seen, self.facts.clip_weight_seen, self.facts.clip_weight_unseen),
        )
        objects = None if object_logits is None else object_logits[0]
        return classify(MaskEmbeddings(mask[0], clip[0], objects), classifier)
