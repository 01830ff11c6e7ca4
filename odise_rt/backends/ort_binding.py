"""ONNX Runtime on buffers that stay where they are (its IOBinding): inputs and outputs lie on the device, and a CUDA
graph may be captured over them.

ONNX Runtime keeps the graphs of a session for good, one for each ``gpu_graph_id``, so only the first shapes get one;
later ones run without.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from odise_rt.errors import BackendError, OutOfMemoryError, first_line, is_out_of_memory
from odise_rt.specs import StageSpec

MAX_SHAPES = 4
"""Shapes whose buffers are kept."""
RUNS_TO_A_WAIT = 256
"""ONNX Runtime keeps the pinned buffers of a run until one waits for the GPU: a mask decoder leaves 22 kB each time."""
_NO_GRAPH = -1
"""Graph id that tells ONNX Runtime not to capture."""


class BoundSession:
    """A session on arrays that lie on the GPU already; see :class:`odise_rt.backends.base.BoundStage`.

    ONNX Runtime has memory of its own to work in, and allocates from it while it runs, so no graph is captured.
    """

    capturable = False
    scratch_bytes = 0

    def __init__(self, ort: Any, session: Any, spec: StageSpec, inputs: Mapping[str, Any], device: str) -> None:
        """Bind nothing yet.

        Args:
            ort: the onnxruntime module.
            session: that runs on the stream of whoever places the arrays.
            spec: of the stage; it gives the shapes of outputs.
            inputs: arrays of the shapes and types that will come.
            device: where arrays lie, in ONNX Runtime's words.

        Raises:
            BackendError: the inputs do not fit the spec.
        """
        dims = spec.check(inputs)
        self._session, self._device, self._stage = session, device, spec.name
        self._binding = session.io_binding()
        self._inputs = {name: tuple(array.shape) for name, array in inputs.items()}
        self.outputs = {tensor.name: tensor.resolve(dims) for tensor in spec.outputs}
        self._types = {tensor.name: np.dtype(tensor.dtype).type for tensor in (*spec.inputs, *spec.outputs)}
        # The caller waits once, for everything that it puts on the stream.
        self._without_wait = ort.RunOptions()
        self._without_wait.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._runs = 0

    def use_scratch(self, scratch: Any) -> None:
        """Nothing: the session has its own."""

    def place(self, name: str, address: int) -> None:
        """See :class:`odise_rt.backends.base.BoundStage`."""
        bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
        shape = self._inputs.get(name) or self.outputs[name]
        bind(name, self._device, 0, self._types[name], list(shape), address)

    def enqueue(self) -> None:
        """See :class:`odise_rt.backends.base.BoundStage`."""
        self._runs += 1
        options = self._without_wait if self._runs % RUNS_TO_A_WAIT else None
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as exc:  # the bindings raise many unrelated types
            raise translate(exc, f"stage {self._stage} failed on {self._inputs}") from exc

    def close(self) -> None:
        """Let go of the session."""
        self._session = self._binding = None


@dataclass
class _Bound:
    """Buffers of one shape."""

    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    graph: int


class BoundRuns:
    """Runs one session on bound buffers. Threads take turns: the buffers are shared."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        spec: StageSpec,
        device: str,
        cuda_graph: bool = False,
        max_shapes: int = MAX_SHAPES,
    ) -> None:
        """Prepare.

        Args:
            ort: the onnxruntime module.
            session: with the provider of ``device``.
            spec: of the stage; it gives the shapes of outputs.
            device: where buffers lie: ``"cuda"``, or ``"cpu"``.
            cuda_graph: capture a graph for each of the first ``max_shapes`` shapes.
            max_shapes: kept at a time.
        """
        self._ort, self._session, self._spec, self._device = ort, session, spec, device
        self._cuda_graph = cuda_graph
        self._max_shapes = max_shapes
        self._known: OrderedDict[tuple[tuple[int, ...], ...], _Bound] = OrderedDict()
        self._graphs = 0
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Run on arrays of the host.

        Args:
            inputs: checked against the spec.
            dims: the values that they give to its symbols.
        """
        with self._lock:
            bound = self._bound(inputs, dims)
            for name, value in bound.inputs.items():
                value.update_inplace(np.ascontiguousarray(inputs[name]))
            options = None
            if self._cuda_graph:
                options = self._ort.RunOptions()
                options.add_run_config_entry("gpu_graph_id", str(bound.graph))
            bound.binding.synchronize_inputs()
            self._session.run_with_iobinding(bound.binding, options)
            bound.binding.synchronize_outputs()
            # numpy() of a value on the CPU is a view: the next run would write into what the caller got.
            return {name: np.array(value.numpy(), copy=self._device == "cpu") for name, value in bound.outputs.items()}

    def _bound(self, inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> _Bound:
        key = tuple(inputs[tensor.name].shape for tensor in self._spec.inputs)
        bound = self._known.get(key)
        if bound is None:
            self._make_room()
            bound = self._known[key] = self._bind(inputs, dims)
        self._known.move_to_end(key)
        return bound

    def _make_room(self) -> None:
        """Drop the least recently used buffers that no graph was captured over."""
        free = [key for key, bound in self._known.items() if bound.graph == _NO_GRAPH]
        limit = self._max_shapes + self._graphs
        for key in free[: max(0, len(self._known) + 1 - limit)]:
            del self._known[key]

    def _bind(self, inputs: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> _Bound:
        value = self._ort.OrtValue
        graph = _NO_GRAPH
        if self._cuda_graph and self._graphs < self._max_shapes:
            graph = self._graphs = self._graphs + 1
        bound = _Bound(self._session.io_binding(), {}, {}, graph)
        for tensor in self._spec.inputs:
            # Not made from the array: on the CPU that would share its memory, which the next run writes into.
            shape, dtype = inputs[tensor.name].shape, np.dtype(tensor.dtype).type
            bound.inputs[tensor.name] = value.ortvalue_from_shape_and_type(list(shape), dtype, self._device, 0)
            bound.binding.bind_ortvalue_input(tensor.name, bound.inputs[tensor.name])
        for tensor in self._spec.outputs:
            made = value.ortvalue_from_shape_and_type(
                tensor.resolve(dims), np.dtype(tensor.dtype).type, self._device, 0
            )
            bound.outputs[tensor.name] = made
            bound.binding.bind_ortvalue_output(tensor.name, made)
        return bound


def translate(exc: Exception, what: str, said: str | None = None) -> BackendError:
    """An error of an engine as one of ours.

    Args:
        exc: the engine's.
        what: what failed.
        said: what the engine says of it; ``None``: its first line.
    """
    said = first_line(exc) if said is None else said
    if is_out_of_memory(exc):
        return OutOfMemoryError(
            f"{what}: out of memory; use a smaller short_edge or windows_per_batch=1 in SegmentOptions, or "
            f"low_memory=True in Segmenter.load ({said})"
        )
    return BackendError(f"{what}: {said}; check the bundle with `odise-rt inspect`")
