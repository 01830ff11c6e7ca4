"""Words to CLIP text embeddings for training, each computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from odise_rt.prompts import fill
from odise_rt.tokenizer import Tokenizer
from training.models.odise import Odise
from training.torch_stages import model_facts

_BATCH = 256


class WordEmbedder:
    """Embeds words in the model's prompt with its frozen text tower and remembers the latest of them."""

    def __init__(self, model: Odise, tokenizer_json: str, remembered: int = 65536) -> None:
        """Wrap a model.

        Args:
            model: supplies the text tower, on any device.
            tokenizer_json: text of its tokenizer file.
            remembered: how many embeddings are kept.
        """
        self.model = model
        facts = model_facts(model)
        self.template = facts.mask_prompt
        self.remembered = remembered
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(tokenizer_json, encoding="utf-8")
            self.tokenizer = Tokenizer(path, facts)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """CLIP embeddings (L, D) of whole texts, without a template and not remembered."""
        device = self.model.noise.device
        rows = [
            self.model.text_encoder(torch.from_numpy(self.tokenizer(texts[start : start + _BATCH])).to(device))
            for start in range(0, len(texts), _BATCH)
        ]
        return torch.cat(rows).float()

    def __call__(self, words: Sequence[str]) -> Tensor:
        """CLIP embeddings (L, D) of words in the model's mask prompt, not normalised."""
        missing = list(dict.fromkeys(word for word in words if word not in self._known))
        if missing:
            for word, embedding in zip(missing, self.embed(fill(self.template, missing)), strict=True):
                self._known[word] = embedding
        found = torch.stack([self._known[word] for word in words])
        for word in words:
            self._known.move_to_end(word)
        while len(self._known) > self.remembered:
            self._known.popitem(last=False)
        return found
