"""Typed errors of the project. Each says what came, what was expected and what to do.

OdiseError
├── InputError         an image, vocabulary or option given by the caller
│   ├── ImageError
│   │   └── ImageTooLargeError
│   ├── VideoError
│   ├── VocabularyError
│   └── OptionsError
├── ConfigError        a model configuration that contradicts itself
├── CheckpointError    a checkpoint of the wrong kind, shape or version
├── DatasetError       an annotation file or data set that is broken or inconsistent
├── BundleError        a bundle that is missing, altered, newer or unsafe
├── BackendError       an engine or device that is absent or failed
│   └── OutOfMemoryError
├── ExportError        an export that failed or did not verify
└── MissingPackageError  an optional package is not installed
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_OUT_OF_MEMORY = (
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "failed to allocate",
    "bad allocation",
    "bad_alloc",
    "memory_allocation",
    "memoryallocation",
    "allocate memory",
    "alloc_failed",
)
"""What CUDA, its libraries, cuda-core, TensorRT, ONNX Runtime, PyTorch and C++ say, in one version or another."""


class OdiseError(Exception):
    """Base of every error that this project raises on purpose."""


class InputError(OdiseError, ValueError):
    """Something the caller passed in cannot be used."""


class ImageError(InputError):
    """Not an image, a broken one, or one outside the accepted sizes."""


class ImageTooLargeError(ImageError):
    """An image with more pixels than are accepted."""


class VideoError(InputError):
    """Not a video, a broken one, or one whose frames are outside the accepted sizes or those that can be written."""


class VocabularyError(InputError):
    """A vocabulary that is empty, ambiguous or malformed."""


class OptionsError(InputError):
    """An option outside its range."""


class ConfigError(OdiseError, ValueError):
    """A model configuration that is unknown or contradicts itself."""


class CheckpointError(OdiseError):
    """A checkpoint of the wrong kind, shape or version."""


class DatasetError(OdiseError):
    """An annotation file or data set that is broken or inconsistent."""


class BundleError(OdiseError):
    """A bundle that is missing, incomplete, altered, too new or unsafe."""


class BackendError(OdiseError):
    """An inference engine or device that is absent, refused the work or failed."""


class OutOfMemoryError(BackendError):
    """The device or host ran out of memory."""


class ExportError(OdiseError):
    """An export that failed or whose result does not agree with PyTorch."""


class MissingPackageError(OdiseError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


def first_line(exc: BaseException) -> str:
    """First line of another library's exception, at most 300 characters; its type's name if it says nothing."""
    return _lines(exc)[0][:300]


def last_line(exc: BaseException) -> str:
    """Last line of such an exception, likewise: some messages are a traceback that ends in what went wrong."""
    return _lines(exc)[-1][:300]


def _lines(exc: BaseException) -> list[str]:
    return [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]


@contextlib.contextmanager
def host_memory(work: str) -> Iterator[None]:
    """Turn Python's and numpy's MemoryError into an :class:`OutOfMemoryError`; ``work`` is what was done meanwhile."""
    try:
        yield
    except MemoryError as exc:
        reason = f" ({first_line(exc)})" if str(exc) else ""
        raise OutOfMemoryError(
            f"memory ran out on the host while {work}{reason}: free memory, or use smaller images or fewer words"
        ) from exc


def is_out_of_memory(exc: BaseException | str) -> bool:
    """Whether another library's exception, or what it says, means that memory ran out, on a GPU or beside it."""
    return isinstance(exc, MemoryError) or any(word in str(exc).lower() for word in _OUT_OF_MEMORY)
