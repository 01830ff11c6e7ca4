"""Words to embeddings: the text tower runs once for a word, whatever the vocabulary it occurs in.

Both classifiers compare masks with L2-normalised text embeddings (paper section 3.3, odise.md section 5.1). The mask
classifier's are ``text_proj(clip_text(mask_prompt))``, CLIP's are ``clip_text(clip_prompt)``. The label variant has
different prompts for the two, hence two passes; the caption variant one.

Embeddings are looked for in memory, then on disk (:mod:`odise_rt.embedding_cache`), list by list and then word by word;
only what is left is encoded. Long lists are encoded and stored in chunks: a run that is stopped, even by ``kill -9``,
goes on at the last chunk, and beside the embeddings themselves only one chunk is in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.backends.pool import StagePool
from odise_rt.bundle import Bundle
from odise_rt.embedding_cache import EmbeddingCache
from odise_rt.errors import BackendError
from odise_rt.prompts import fill
from odise_rt.tokenizer import Tokenizer
from odise_rt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the prompts encoded so far and their total."""

BATCH = 32
"""Prompts that the text tower encodes at a time: enough to fill a CPU, and 10 MB of activations a layer."""
CHUNK = 2048
"""Prompts of one file on disk: 2 to 6 MB at full size, and less than a minute of encoding on a CPU."""
MEMORY_BYTES = 128 << 20
"""Bound on embeddings in memory, with what leads to them: about 30,000 words at full size."""
_LIST_BYTES, _PROMPT_BYTES = 1000, 400  # of Python's objects; measured

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
        self._locks: dict[str, _SharedLock] = {}
        self._locks_lock = threading.Lock()

    def embed(self, vocabulary: Vocabulary, progress: Progress | None = None) -> EmbeddedVocabulary:
        """Embeddings of all words of a vocabulary.

        Args:
            vocabulary: K classes with L words in all.
            progress: called while words are encoded; not at all if all are cached.

        Raises:
            BackendError: the text encoder failed, or gave embeddings that are not numbers.
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
    ) -> Mapping[str, np.ndarray]:
        facts = self._bundle.facts
        channels = {_MASK: facts.classification_dim, _CLIP: facts.clip_embed_dim}
        columns = {name: channels[name] for name in names}
        content = [self._model_key, template, list(names), vocabulary.words_hash]
        key = _hash(content)
        known = self._memory.get(key)
        if known is not None:
            return known
        # A second thread with the same words waits and then finds them in memory; other words do not wait.
        with self._one_at_a_time(key):
            known = self._memory.get(key)
            if known is not None:
                return known
            prompts = fill(template, vocabulary.words)
            arrays = self._assemble(prompts, columns, progress, held)
            for array in arrays.values():
                array.setflags(write=False)
            self._memory.put(key, vocabulary.words_hash, prompts, arrays)
        return arrays

    @contextlib.contextmanager
    def _one_at_a_time(self, key: str) -> Iterator[None]:
        with self._locks_lock:
            shared = self._locks.setdefault(key, _SharedLock())
            shared.users += 1
        try:
            with shared.lock:
                yield
        finally:
            with self._locks_lock:
                shared.users -= 1
                if not shared.users:
                    del self._locks[key]

    def _assemble(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, int],
        progress: Progress | None,
        held: contextlib.ExitStack,
    ) -> dict[str, np.ndarray]:
        """Embeddings of prompts from where they are cheapest: array name to float32 (len(prompts), channels)."""
        place = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        unique = list(place)
        rows = {name: np.empty((len(unique), channels), np.float32) for name, channels in columns.items()}
        known = np.zeros(len(unique), bool)
        chunks = [slice(start, min(start + CHUNK, len(unique))) for start in range(0, len(unique), CHUNK)]

        def take(found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
            for prompt, entry in found.items():
                row = place[prompt]
                known[row] = True
                for name, array in rows.items():
                    array[row] = entry[name]

        cache = self._cache if self._cache and self._cache.holds(len(unique) * sum(columns.values()) * 4) else None
        if cache:
            for chunk in chunks:
                stored = cache.load(self._list_key(unique[chunk], columns), columns, chunk.stop - chunk.start)
                if stored is not None:
                    known[chunk] = True
                    for name, array in rows.items():
                        array[chunk] = stored[name]
        if not known.all():
            take(self._memory.find([p for p in unique if not known[place[p]]], columns))
            if not known.all() and cache:
                take(cache.find([p for p in unique if not known[place[p]]], columns))
            if not known.all():
                self._encode(unique, rows, known, chunks, cache, progress, held)
            elif len(chunks) == 1:  # known words in a new order: next time one file has them all
                self._keep(cache, unique, rows, np.arange(len(unique)))
        if len(unique) == len(prompts):
            return rows
        order = np.fromiter((place[p] for p in prompts), np.int64, count=len(prompts))
        return {name: array[order] for name, array in rows.items()}

    def _encode(
        self,
        prompts: Sequence[str],
        rows: Mapping[str, np.ndarray],
        known: np.ndarray,
        chunks: Sequence[slice],
        cache: EmbeddingCache | None,
        progress: Progress | None,
        held: contextlib.ExitStack,
    ) -> None:
        """Fill the rows that are not known, chunk by chunk, and store each chunk when it is complete."""
        started = time.perf_counter()
        total, done = int(np.count_nonzero(~known)), 0
        stage = held.enter_context(self._stages.use("clip_text"))
        for chunk in chunks:
            missing = chunk.start + np.flatnonzero(~known[chunk])
            try:
                for start in range(0, len(missing), BATCH):
                    batch = missing[start : start + BATCH]
                    outputs = stage.run({"tokens": self._tokenizer([prompts[i] for i in batch])})
                    for name, array in rows.items():
                        if not np.isfinite(outputs[name]).all():
                            raise BackendError(
                                "the text encoder gave embeddings that are not numbers: check the bundle with `odise-rt"
                                " inspect`, or export it again with --precision fp32"
                            )
                        array[batch] = normalise(outputs[name])
                    known[batch] = True
                    done += len(batch)
                    if progress is not None:
                        progress(done, total)
            except BaseException:  # stopped or failed: what is encoded of this chunk is kept
                self._keep(cache, prompts, rows, missing[known[missing]])
                raise
            if len(missing):
                self._keep(cache, prompts, rows, np.arange(chunk.start, chunk.stop))
        logger.info("encoded %d prompts in %.2f s", total, time.perf_counter() - started)

    def _list_key(self, prompts: Sequence[str], columns: Iterable[str]) -> str:
        return _hash([self._model_key, sorted(columns), list(prompts)])

    def _keep(
        self, cache: EmbeddingCache | None, prompts: Sequence[str], rows: Mapping[str, np.ndarray], which: np.ndarray
    ) -> None:
        """Store some rows as a word list of their own."""
        if cache and len(which):
            words = [prompts[i] for i in which]
            cache.store(self._list_key(words, rows), words, {name: array[which] for name, array in rows.items()})


def model_key(bundle: Bundle) -> str:
    """Identity of a bundle's text encoder: same graph, weights and tokenizer, same embeddings."""
    text = f"1 {bundle.stages['clip_text'].file.digest} {bundle.tokenizer_sha256} {bundle.facts.pad_token}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _SharedLock:
    """A lock and how many threads hold or want it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


@dataclass(frozen=True)
class _WordList:
    """Embeddings of one vocabulary under one prompt."""

    vocabulary: str
    """Hash of its words."""
    prompts: Sequence[str]
    """Of its rows."""
    arrays: Mapping[str, np.ndarray]
    size: int
    """Bytes of memory."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.arrays))


class _Memory:
    """Least recently used word lists, bounded by bytes; those of the latest vocabulary always stay.

    Every method costs what it touches (lists that it drops, prompts that it is given), however much is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lists: OrderedDict[str, _WordList] = OrderedDict()
        self._holders: dict[tuple[str, ...], dict[str, dict[str, int]]] = {}
        """Names of arrays to prompt to the lists that hold it, the latest last, each with its row there."""
        self._size = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all embeddings, and of what leads to them."""
        return self._size

    def get(self, key: str) -> Mapping[str, np.ndarray] | None:
        with self._lock:
            entry = self._lists.get(key)
            if entry is None:
                return None
            self._lists.move_to_end(key)
            return entry.arrays

    def find(self, prompts: Sequence[str], columns: Mapping[str, int]) -> dict[str, dict[str, np.ndarray]]:
        found: dict[str, dict[str, np.ndarray]] = {}
        with self._lock:
            tables = [table for names, table in self._holders.items() if set(columns) <= set(names)]
            for table in tables:
                for prompt in prompts:
                    holders = table.get(prompt)
                    if holders and prompt not in found:
                        latest = next(reversed(holders))
                        arrays, row = self._lists[latest].arrays, holders[latest]
                        found[prompt] = {name: arrays[name][row] for name in columns}
        return found

    def put(self, key: str, vocabulary: str, prompts: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        size = sum(a.nbytes for a in arrays.values()) + _overhead(prompts)
        entry = _WordList(vocabulary, prompts, arrays, size)
        with self._lock:
            self._drop(key)
            self._lists[key] = entry
            self._size += size
            table = self._holders.setdefault(entry.names, {})
            for row, prompt in enumerate(prompts):
                table.setdefault(prompt, {})[key] = row
            while self._size > self._max_bytes:
                oldest = next(iter(self._lists))
                if oldest == key:  # behind it are those of the same vocabulary alone
                    break
                if self._lists[oldest].vocabulary == vocabulary:
                    self._lists.move_to_end(oldest)
                else:
                    self._drop(oldest)

    def _drop(self, key: str) -> None:
        entry = self._lists.pop(key, None)
        if entry is None:
            return
        self._size -= entry.size
        table = self._holders[entry.names]
        for prompt in entry.prompts:
            holders = table.get(prompt, {})
            holders.pop(key, None)  # gone already where a prompt occurs twice
            if not holders:
                table.pop(prompt, None)


def _overhead(prompts: Sequence[str]) -> int:
    """Bytes that a word list needs beside its embeddings: of a single word, more than those at tiny scale."""
    return _LIST_BYTES + sum(_PROMPT_BYTES + sys.getsizeof(prompt) for prompt in prompts)
