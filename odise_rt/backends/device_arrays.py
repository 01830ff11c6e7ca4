"""Arrays in the memory of a GPU, whoever made them. Nothing here needs a GPU until one of them is viewed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.backends.cuda_core import import_cuda_core
from odise_rt.errors import BackendError

_DLPACK_CUDA = frozenset({2, 13})
"""DLPack's numbers for memory of a GPU and for memory that CUDA moves about."""


@dataclass(frozen=True)
class DeviceArray:
    """An array that lies on the GPU already, from ``__cuda_array_interface__`` or DLPack."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object
    """Kept alive while the array is used."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def as_device_array(value: object, stream: int) -> DeviceArray | None:
    """A view of an array on the GPU, without a copy; ``None`` for anything else, such as numpy's.

    Args:
        value: of torch, CuPy, pycuda, or whatever else offers one of the two protocols.
        stream: handle of the stream that will read it; work of its producer is waited for, on the device.

    Raises:
        BackendError: the array is not contiguous or cannot be viewed.
    """
    if isinstance(value, DeviceArray):
        return value
    if isinstance(value, np.ndarray) or not is_on_device(value):
        return None
    import_cuda_core()
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_any_interface(_described(value), stream_ptr=stream)
        shape, dtype = tuple(int(size) for size in view.shape), np.dtype(view.dtype)
        strides = tuple(int(step) for step in view.strides) if view.strides is not None else None
        pointer = int(view.ptr)
    except (BufferError, TypeError, ValueError, RuntimeError) as exc:
        raise BackendError(f"an array of type {type(value).__name__} cannot be read on the GPU: {exc}") from exc
    if strides is not None and not is_dense(shape, strides):
        raise BackendError(
            f"an array of shape {shape} has the strides {strides}: expected a C-contiguous one; call .contiguous() or "
            "ascontiguousarray first"
        )
    return DeviceArray(pointer, shape, dtype, (value, view))


class _Described:
    """An array by version 3 of the interface, which is the least that cuda-core reads."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


def _described(value: Any) -> Any:
    """The array itself, or its description where that is of an older version.

    Those versions do not name the stream that the array is written on. It is taken to be the default one, which is
    where it is with a library that knows no other.
    """
    if hasattr(value, "__dlpack__"):
        return value
    interface = value.__cuda_array_interface__
    return value if interface["version"] >= 3 else _Described({**interface, "version": 3, "stream": 1})


def as_host_array(value: Any) -> np.ndarray:
    """An array of the host: numpy's, or a view of somebody else's by DLPack, without a copy."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return np.asarray(value)
    return np.from_dlpack(value)


def is_on_device(value: Any) -> bool:
    """Whether an object is an array in the memory of a GPU, by either protocol; needs no package and no GPU."""
    if isinstance(value, DeviceArray):
        return True
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) in _DLPACK_CUDA


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides in values are those of a C-contiguous array; those of axes of length 1 do not matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
