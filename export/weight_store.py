"""Weight files that graphs refer to: every distinct tensor is stored once, whichever graph wants it.

Two graphs that run the same network (``clip_image`` and ``clip_mask``), or two forms of one graph (portable and for one
engine), name the same bytes of one file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from export.graph_editing import fixed_shape

EMBEDDED_BYTES = 1024
"""Smaller tensors stay inside the graph file, where engines look for shapes and axes."""
_PAGE = 4096
_PAGE_FROM = 1 << 20
"""Tensors from this size on start on a page of their own, so that each can be mapped into memory alone."""


class WeightStore:
    """Appends tensors to one file and remembers where equal bytes already lie."""

    def __init__(self, path: Path) -> None:
        """Start a new file at ``path``, whose folder is also that of the graphs."""
        self.path = path
        self._file = path.open("xb")
        self._places: dict[tuple[int, bytes, int], int] = {}

    def add(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Store a tensor's bytes unless they are there already.

        Args:
            tensor: any dtype; one stored matrix may serve under two shapes, but not under two types: TensorRT refuses
                weights that lie at one place with another count of values.

        Returns:
            A reference to the file with the tensor's dtype, shape and name.
        """
        data = tensor.tobytes()
        key = (int(tensor.dtype), hashlib.sha256(data).digest(), len(data))
        offset = self._places.get(key)
        if offset is None:
            alignment = _PAGE if len(data) >= _PAGE_FROM else 64
            end = self._file.tell()
            offset = end + -end % alignment
            self._file.write(b"\0" * (offset - end))
            self._file.write(data)
            self._places[key] = offset
        return ir.ExternalTensor(
            self.path.name,
            offset,
            len(data),
            tensor.dtype,
            shape=ir.Shape(fixed_shape(tensor)),
            name=tensor.name or "",
            base_dir=self.path.parent,
        )

    def flush(self) -> None:
        """Make what was added readable through the file."""
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing can be added afterwards."""
        self._file.close()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def save_graph(model: ir.Model, path: Path, store: WeightStore) -> None:
    """Write a graph file whose larger tensors lie in ``store``; the model then refers to them there as well.

    Args:
        model: its initializers are replaced by references, which frees what they held.
        path: beside the store's file.
        store: takes the tensors of :data:`EMBEDDED_BYTES` and more, in the order of the graph.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None, f"initializer {value.name} has no value"
        external = isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == store.path
        if tensor.nbytes >= EMBEDDED_BYTES and not external:
            value.const_value = store.add(tensor)
        elif tensor.nbytes < EMBEDDED_BYTES:
            value.const_value = ir.tensor(np.array(tensor.numpy()), name=tensor.name)
    store.flush()
    for value in (*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)):
        value.doc_string = None
    ir.save(model, path)
