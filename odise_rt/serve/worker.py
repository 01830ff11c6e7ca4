"""One request, from bytes to bytes: what a replica, or a thread of the server, does.

Nothing is written to disk, and nothing of a request stays in memory but the embeddings of its words (bounded, see
:mod:`odise_rt.text_embeddings`). What a client did wrong comes back as a :class:`Problem`, not as an exception, so that
it crosses processes unharmed and no traceback leaves the server.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from odise_rt.backends.window_batching import WindowBatching
from odise_rt.bundle import Bundle
from odise_rt.errors import VocabularyError
from odise_rt.files import decode_json
from odise_rt.preprocessing import load_image
from odise_rt.private_words import keep_words_out_of_the_log
from odise_rt.segmenter import Segmenter
from odise_rt.serve.answers import render
from odise_rt.serve.fields import segment_options
from odise_rt.serve.limits import Limits
from odise_rt.serve.problems import Problem, RequestRefused, problem_from
from odise_rt.vocabulary import MAX_WORD_CHARACTERS, Vocabulary


@dataclass(frozen=True)
class SegmentRequest:
    """What a client asks for."""

    image: bytes
    """Encoded."""
    fields: Mapping[str, Any]
    """Values of :data:`odise_rt.serve.fields.FIELDS`."""
    id: str = "-"
    """Of the request, for the log."""


@dataclass(frozen=True)
class Answer:
    """What comes back: content, or a problem."""

    content: bytes = b""
    media_type: str = "application/json"
    problem: Problem | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds of each step."""
    windows: int = 0
    segments: int = 0
    batches: tuple[tuple[str, int, int], ...] = ()
    """Runs of shared stages since the last answer of this worker: stage, windows, callers."""


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker loads the model."""

    bundle: Path | Bundle
    """Its folder; or opened, if this process compared its hashes already."""
    device: str = "auto"
    cpu_engine: str = "onnxruntime"
    threads: int | None = None
    verify: bool = True
    concurrency: int = 1
    """Requests that one worker has in work at a time."""
    batching: WindowBatching | None = None
    """Share runs between concurrent requests."""
    word_cache: bool = False
    """Keep embeddings of words on disk. Off, since words of requests would be written there as well."""
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    """Vocabularies that requests may name; encoded when the worker starts."""
    limits: Limits = field(default_factory=Limits)


class Worker:
    """Holds the model and serves requests; threads may share it."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Load the model and encode the named vocabularies.

        Raises:
            OdiseError: the bundle or the device cannot be used.
        """
        keep_words_out_of_the_log()
        self.settings = settings
        self._batches: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()
        segmenter = Segmenter.load(
            settings.bundle,
            device=settings.device,  # type: ignore[arg-type]  # checked there
            cpu_engine=settings.cpu_engine,  # type: ignore[arg-type]
            threads=settings.threads,
            verify=settings.verify,
            disk_cache=settings.word_cache,
            keep_text_encoder=True,
            window_batching=settings.batching,
            batch_observer=self._observe if settings.batching else None,
        )
        with contextlib.ExitStack() as stack:
            self.segmenter = stack.enter_context(segmenter)
            for vocabulary in settings.vocabularies.values():
                segmenter.prepare(vocabulary)
            stack.pop_all()

    def run(self, request: SegmentRequest) -> Answer:
        """Serve one request. Never raises for what a client sent."""
        try:
            return self._segment(request)
        except Exception as exc:  # the boundary: everything becomes a typed answer
            return Answer(problem=problem_from(exc, request.id), batches=self._take_batches())

    def _segment(self, request: SegmentRequest) -> Answer:
        values = request.fields
        limits = self.settings.limits
        options = segment_options(values, limits.max_pixels)
        limits.check_costs(options, self.segmenter.facts)
        vocabulary = self._vocabulary(values)
        started = time.perf_counter()
        pixels = load_image(request.image, limits.max_pixels)
        decoded = time.perf_counter()
        result = self.segmenter.segment(pixels, vocabulary, options)
        segmented = time.perf_counter()
        masks, explain = values.get("masks", "rle") == "rle", options.explain > 0
        content, media_type = render(result, pixels, values.get("format", "json"), masks, explain)
        seconds = {k: v for k, v in result.facts.seconds.items() if k != "total"}
        seconds |= {"decode": decoded - started, "render": time.perf_counter() - segmented}
        return Answer(
            content, media_type, None, seconds, result.facts.windows, len(result.segments), self._take_batches()
        )

    def _vocabulary(self, values: Mapping[str, Any]) -> Vocabulary:
        name = values.get("vocabulary_name")
        if name is not None:
            known = self.settings.vocabularies
            if name not in known:
                raise RequestRefused(
                    "unknown_vocabulary",
                    f"there is no vocabulary {name[:40]!r}: this server has {', '.join(known) or 'none'}; send words "
                    "in the field 'vocabulary' instead",
                )
            return known[name]
        return read_words(values["vocabulary"], self.settings.limits.max_words)

    def _observe(self, stage: str, windows: int, callers: int) -> None:
        with self._lock:
            self._batches.append((stage, windows, callers))

    def _take_batches(self) -> tuple[tuple[str, int, int], ...]:
        with self._lock:
            taken, self._batches = tuple(self._batches), []
        return taken

    def close(self) -> None:
        """Release the model."""
        self.segmenter.close()


def read_words(text: str, max_words: int) -> Vocabulary:
    """The vocabulary of a request: words or JSON. Unlike on the command line, never a file.

    Args:
        text: as the client sent it; one too long for so many words is refused before anything in it is read.
        max_words: bound, synonyms counted.

    Raises:
        VocabularyError: there is no word in it, there are too many, or the JSON is no vocabulary.
    """
    if len(text) > max_words * MAX_WORD_CHARACTERS:
        raise VocabularyError(
            f"the vocabulary is {len(text):,} characters long, more than {max_words:,} words, which this server "
            f"accepts, of {MAX_WORD_CHARACTERS:,} characters: send fewer"
        )
    words = _parse_words(text)
    if len(words.words) > max_words:
        raise VocabularyError(f"the vocabulary has {len(words.words):,} words, this server accepts {max_words:,}")
    return words


def _parse_words(text: str) -> Vocabulary:
    if text.lstrip()[:1] in ("{", "["):
        return Vocabulary.from_dict(decode_json(text, "the vocabulary", VocabularyError))
    return Vocabulary.parse(text)
