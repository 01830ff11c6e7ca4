"""What goes wrong with a request, as the client sees it: a status, a type for programs and one sentence for people."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from odise_rt.errors import (
    BackendError,
    ImageError,
    ImageTooLargeError,
    InputError,
    OptionsError,
    OutOfMemoryError,
    VocabularyError,
)

logger = logging.getLogger(__name__)

STATUS: dict[str, int] = {
    "bad_request": 400,
    "bad_image": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "slow_upload": 408,
    "request_too_large": 413,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "wrong_host": 421,
    "bad_vocabulary": 422,
    "unknown_vocabulary": 422,
    "bad_options": 422,
    "overloaded": 429,
    "internal": 500,
    "engine_failed": 500,
    "out_of_memory": 500,
    "not_ready": 503,
    "shutting_down": 503,
    "replica_died": 503,
    "timeout": 504,
}
"""Every type of problem and its HTTP status. Part of the API: names are kept."""
RETRYABLE = frozenset({"slow_upload", "overloaded", "not_ready", "shutting_down", "replica_died", "timeout"})
"""The same request may succeed later."""

STATUS_CLIENT_GONE = 499
"""In metrics and logs only: nobody was left to answer."""


@dataclass(frozen=True)
class Problem:
    """Why a request was not answered. Plain data, so that it crosses processes."""

    type: str
    """A key of :data:`STATUS`."""
    message: str
    """One sentence: what came, what was expected, what to do."""
    retry_after: float | None = None
    """Seconds after which to try again, where that is known."""

    @property
    def status(self) -> int:
        """HTTP status."""
        return STATUS[self.type]

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.type in RETRYABLE

    def to_dict(self, request_id: str | None = None) -> dict[str, Any]:
        """The body of the answer."""
        error = {"type": self.type, "status": self.status, "message": self.message, "retryable": self.retryable}
        return {"error": error | ({"request_id": request_id} if request_id else {})}


class RequestRefused(Exception):
    """Carries a :class:`Problem` up to where the answer is written."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        """Refuse for a reason of :data:`STATUS`."""
        super().__init__(message)
        self.problem = Problem(kind, message, retry_after)


def problem_from(exc: BaseException, request_id: str) -> Problem:
    """The problem that an exception amounts to. Unexpected ones are logged here and tell the client nothing.

    Args:
        exc: what was raised.
        request_id: written into the log, by which a client's report is found there.
    """
    if isinstance(exc, RequestRefused):
        return exc.problem
    message = " ".join(str(exc).split())
    for kind, name in (
        (ImageTooLargeError, "image_too_large"),
        (ImageError, "bad_image"),
        (VocabularyError, "bad_vocabulary"),
        (OptionsError, "bad_options"),
        (InputError, "bad_request"),
    ):
        if isinstance(exc, kind):
            return Problem(name, message)
    if isinstance(exc, OutOfMemoryError | MemoryError):
        logger.error("%s out of memory: %s", request_id, message)
        return Problem("out_of_memory", "the server ran out of memory on this image: send a smaller one or short_edge")
    if isinstance(exc, BackendError):
        logger.error("%s the engine failed: %s", request_id, message)
        return Problem("engine_failed", "the engine failed; the server's log says why under this request's id")
    logger.error("%s unexpected error", request_id, exc_info=exc)
    return Problem("internal", "an unexpected error; the server's log has the details under this request's id")
