"""The package cuda-core: imported when it is needed, and its errors turned into ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from odise_rt.errors import BackendError, MissingPackageError, OutOfMemoryError, first_line, is_out_of_memory


def import_cuda_core() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is not installed, or cannot be imported: the message has the command that helps.
    """
    try:
        import cuda.core
    except ModuleNotFoundError as exc:
        raise MissingPackageError(
            "running engines on a GPU needs cuda-core, which is not installed: pip install 'odise_rt[cuda]'"
        ) from exc
    except ImportError as exc:  # its compiled half and cuda-bindings are of versions that do not go together
        raise MissingPackageError(
            f"running engines on a GPU needs cuda-core, which cannot be imported ({first_line(exc)}): "
            "pip install --upgrade cuda-core cuda-bindings"
        ) from exc
    return cuda.core


@contextlib.contextmanager
def cuda_errors(what: str) -> Iterator[None]:
    """Turns errors of cuda-core into ours. ``what`` was being done."""
    try:
        yield
    except (BackendError, MissingPackageError):
        raise
    except Exception as exc:  # cuda-core raises many types, from the driver's and its own
        raise (
            memory_error(what, str(exc))
            if is_out_of_memory(exc)
            else BackendError(f"{what}: {first_line(exc)}; run `odise-rt doctor`")
        ) from exc


def checked(results: Sequence[Any]) -> Sequence[Any]:
    """What a function of cuda-bindings gives, without its status, which comes first.

    Raises:
        RuntimeError: it failed; see :func:`cuda_errors`.
    """
    status, *values = results
    if int(status) != 0:
        raise RuntimeError(status.name)
    return values


def memory_error(what: str, reason: str) -> OutOfMemoryError:
    """The error for memory that ran out on the GPU."""
    return OutOfMemoryError(
        f"{what}: the GPU is out of memory; use a smaller short_edge or windows_per_batch=1 in SegmentOptions, or "
        f"low_memory=True in Segmenter.load ({reason.strip()[:200]})"
    )


def free_memory() -> int:
    """Free bytes on the first GPU."""
    core = import_cuda_core()
    from cuda.bindings import driver

    with cuda_errors("the free memory of the GPU cannot be read"):
        core.Device(0).set_current()
        free, _total = checked(driver.cuMemGetInfo())
    return int(free)
