"""Words to embeddings: the text tower runs once for a word, whatever the vocabulary it occurs in.

Both classifiers compare masks with L2-normalised text embeddings (paper section 3.3, odise.md section 5.1). The mask
classifier's are ``text_proj(clip_text(mask_prompt))``, CLIP's are ``clip_text(clip_prompt)``. The label variant has
different prompts for the two, hence two passes; the caption variant one.

Embeddings are looked for in memory, then on disk (:mod:`odise_rt.embedding_cache`), list by list and then word by word;
only what is left is encoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from odise_rt.backends.pool import StagePool
from odise_rt.bundle import Bundle
from odise_rt.embedding_cache import EmbeddingCache
from odise_rt.prompts import fill
from odise_rt.tokenizer import Tokenizer
from odise_rt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the prompts encoded so far and their total."""

BATCH = 32
"""Prompts that the text tower encodes at a time: enough to fill a CPU, and 10 MB of activations a layer."""
MEMORY_BYTES = 128 << 20
"""Bound on embeddings in memory: about 30,000 words at full size."""

_MASK, _CLIP = "mask_text_embedding", "text_embedding"


@dataclass(frozen=True)
class EmbeddedVocabulary:
    """The words of a vocabulary, ready to be compared with masks. Arrays are shared and read-only."""

    mask_text: np.ndarray
    """float32 (L, P), L2-normalised: for the mask classifier."""
    clip_text: np.ndarray
    """float32 (L, D), L2-normalised: for CLIP."""


def normalise(array: np.ndarray) -> np.ndarray:
    """Divide rows by their L2 norm (at least 1e-12); float32 (..., C) in and out."""
    norm = np.sqrt(np.einsum("...c,...c->...", array, array))[..., None]
    normalised: np.ndarray = array / np.maximum(norm, np.float32(1e-12))
    return normalised


class TextEmbedder:
    """Embeds vocabularies for one bundle. Safe to share between threads; each word is encoded once."""

    def __init__(
        self, bundle: Bundle, stages: StagePool, cache: EmbeddingCache | None, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """Encode with the stage ``clip_text`` of ``stages``; ``cache=None`` keeps nothing on disk."""
        self._bundle = bundle
        self._stages = stages
        self._cache = cache
        self._tokenizer = Tokenizer(bundle.tokenizer_path, bundle.facts)
        self._model_key = model_key(bundle)
        self._memory = _Memory(memory_bytes)
        self._encoding = threading.Lock()

    def embed(self, vocabulary: Vocabulary, progress: Progress | None = None) -> EmbeddedVocabulary:
        """Embeddings of all words of a vocabulary.

        Args:
            vocabulary: K classes with L words in all.
            progress: told while words are encoded; not called when all are cached.
        """
        facts = self._bundle.facts
        # A text encoder that was loaded for one template stays for the other.
        with contextlib.ExitStack() as held:
            if facts.mask_prompt == facts.clip_prompt:
                both = self._rows(vocabulary, facts.mask_prompt, (_MASK, _CLIP), progress, held)
                return EmbeddedVocabulary(both[_MASK], both[_CLIP])
            mask = self._rows(vocabulary, facts.mask_prompt, (_MASK,), progress, held)
            clip = self._rows(vocabulary, facts.clip_prompt, (_CLIP,), progress, held)
            return EmbeddedVocabulary(mask[_MASK], clip[_CLIP])

    def _rows(
        self,
        vocabulary: Vocabulary,
        template: str,
        names: tuple[str, ...],
        progress: Progress | None,
        held: contextlib.ExitStack,
    ) -> dict[str, np.ndarray]:
        facts = self._bundle.facts
        channels = {_MASK: facts.classification_dim, _CLIP: facts.clip_embed_dim}
        columns = {name: channels[name] for name in names}
        content = [self._model_key, template, list(names), vocabulary.words_hash]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        arrays = self._memory.get(key)
        if arrays is not None:
            return arrays
        prompts = fill(template, vocabulary.words)
        # One encoder pass at a time: a second thread with the same words waits and then finds them in memory.
        with self._encoding:
            arrays = self._memory.get(key)
            if arrays is not None:
                return arrays
            arrays = self._cache.load(key, columns, len(prompts)) if self._cache else None
            if arrays is None:
                arrays = self._assemble(prompts, columns, progress, held)
                if self._cache:
                    self._cache.store(key, prompts, arrays)
            for array in arrays.values():
                array.setflags(write=False)
            self._memory.put(key, prompts, arrays)
        return arrays

    def _assemble(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, int],
        progress: Progress | None,
        held: contextlib.ExitStack,
    ) -> dict[str, np.ndarray]:
        unique = list(dict.fromkeys(prompts))
        rows = self._memory.find(unique, columns)
        missing = [p for p in unique if p not in rows]
        if missing and self._cache:
            rows |= self._cache.find(missing, columns)
            missing = [p for p in unique if p not in rows]
        if missing:
            rows |= self._encode(missing, columns, progress, held)
        return {name: np.stack([rows[p][name] for p in prompts]) for name in columns}

    def _encode(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, int],
        progress: Progress | None,
        held: contextlib.ExitStack,
    ) -> dict[str, dict[str, np.ndarray]]:
        started = time.perf_counter()
        rows: dict[str, dict[str, np.ndarray]] = {}
        stage = held.enter_context(self._stages.use("clip_text"))
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            outputs = stage.run({"tokens": self._tokenizer(batch)})
            normalised = {name: normalise(outputs[name]) for name in columns}
            for row, prompt in enumerate(batch):
                rows[prompt] = {name: array[row] for name, array in normalised.items()}
            if progress is not None:
                progress(len(rows), len(prompts))
        logger.info("encoded %d prompts in %.2f s", len(prompts), time.perf_counter() - started)
        return rows


def model_key(bundle: Bundle) -> str:
    """Identity of a bundle's text encoder: same graph, weights and tokenizer, same embeddings."""
    text = f"1 {bundle.stages['clip_text'].file.digest} {bundle.tokenizer_sha256} {bundle.facts.pad_token}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Memory:
    """Least recently used word lists, bounded by bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._lists: OrderedDict[str, tuple[dict[str, int], dict[str, np.ndarray]]] = OrderedDict()
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        with self._lock:
            entry = self._lists.get(key)
            if entry is None:
                return None
            self._lists.move_to_end(key)
            return entry[1]

    def find(self, prompts: Sequence[str], columns: Mapping[str, int]) -> dict[str, dict[str, np.ndarray]]:
        with self._lock:
            entries = [e for e in reversed(self._lists.values()) if set(columns) <= set(e[1])]
        found: dict[str, dict[str, np.ndarray]] = {}
        for index, arrays in entries:
            for prompt in prompts:
                if prompt in index and prompt not in found:
                    found[prompt] = {name: arrays[name][index[prompt]] for name in columns}
        return found

    def put(self, key: str, prompts: Sequence[str], arrays: dict[str, np.ndarray]) -> None:
        with self._lock:
            self._lists[key] = ({p: i for i, p in enumerate(prompts)}, arrays)
            size = sum(a.nbytes for _, entry in self._lists.values() for a in entry.values())
            while size > self._max_bytes and len(self._lists) > 1:
                _, (_, oldest) = self._lists.popitem(last=False)
                size -= sum(a.nbytes for a in oldest.values())
