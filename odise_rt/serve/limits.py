"""What the server accepts, and how many requests may wait.

A request takes its place in the queue before a byte of its body is read and keeps it until its answer was sent, so that
memory is bounded by places times the sizes of a request and of an answer. With no place left it is refused at once,
with an estimate of when to come back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from odise_rt.errors import OptionsError
from odise_rt.options import SegmentOptions
from odise_rt.serve.problems import RequestRefused
from odise_rt.specs import ModelFacts

DEFAULT_MAX_WORDS = 1_000
MAX_CONNECTIONS = 1_024
"""Open at a time. More replicas, requests in work or places to wait than this would never all be taken."""


@dataclass(frozen=True)
class Limits:
    """Bounds on requests.

    Raises:
        OptionsError: a bound is not positive.
    """

    max_request_bytes: int = 32 << 20
    """Whole body, image and words together."""
    max_pixels: int = 25_000_000
    """Of the image as given, checked on its header."""
    max_words: int = DEFAULT_MAX_WORDS
    """Synonyms counted, in a vocabulary that comes with a request. Named vocabularies are the operator's."""
    max_short_edge: int | None = None
    """Upper bound on the option ``short_edge``; ``None``: the model's own value. Cost grows with its square."""
    max_long_edge: int | None = None
    """The same for ``long_edge``."""
    queue: int = 16
    """Requests that may wait beyond those in work."""
    timeout: float = 120.0
    """Seconds from the end of the upload to the answer."""
    upload_timeout: float = 30.0
    """Seconds for the upload."""

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "max_pixels", "max_words", "max_short_edge", "max_long_edge"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionsError(f"{name} is {value}: expected at least 1")
        for name in ("timeout", "upload_timeout"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise OptionsError(f"{name} is {getattr(self, name)}: expected seconds above 0")
        if not 0 <= self.queue <= MAX_CONNECTIONS:
            raise OptionsError(f"queue is {self.queue}: expected 0 to {MAX_CONNECTIONS}")

    def check_costs(self, options: SegmentOptions, facts: ModelFacts) -> None:
        """Refuse network sizes and numbers of instances that would take the machine for one request.

        Raises:
            OptionsError: an option is above its bound.
        """
        for name, most in (
            ("short_edge", self.max_short_edge or facts.test_short_edge),
            ("long_edge", self.max_long_edge or facts.test_long_edge),
            ("instances_per_image", facts.instances_per_image),
        ):
            value = getattr(options, name)
            if value is not None and value > most:
                raise OptionsError(f"{name} is {value}: this server accepts at most {most}")


class Admission:
    """Counts requests in the house. For one event loop."""

    def __init__(self, queue: int, workers: int) -> None:
        """Admit ``workers`` requests in work and ``queue`` that wait."""
        self._queue = queue
        self._workers = max(1, workers)
        self.inside = 0
        self.draining = False
        self._seconds = 1.0  # of one request, as a moving average

    @property
    def capacity(self) -> int:
        """Requests that may be inside."""
        return self._workers + self._queue

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for the time of a ``with`` block.

        Raises:
            RequestRefused: the server is shutting down, or the queue is full.
        """
        if self.draining:
            raise RequestRefused("shutting_down", "the server is shutting down: try another one, or again later", 5.0)
        if self.inside >= self.capacity:
            wait = max(1.0, self._seconds * self.inside / self._workers / 2)
            raise RequestRefused(
                "overloaded", f"the queue is full ({self.inside} requests): try again in {math.ceil(wait)} s", wait
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def learn(self, seconds: float, inside: int) -> None:
        """Take one request into the estimate of the wait. What was refused or given up takes no time and says nothing.

        Args:
            seconds: from the end of its upload to its answer.
            inside: requests in the house when its upload had ended.
        """
        share = max(1.0, inside / self._workers)
        self._seconds += 0.1 * (seconds / share - self._seconds)
