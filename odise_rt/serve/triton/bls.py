"""Stages that are models of the same Triton server, called from its Python backend ("business logic scripting")."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from odise_rt.backends.base import Device, StageFacts, windows_that_fill
from odise_rt.bundle import Bundle
from odise_rt.errors import BackendError
from odise_rt.specs import StageSpec


def backend_utils() -> Any:
    """Triton's module for Python models; it exists inside the server only.

    Raises:
        BackendError: this is not Triton's Python backend.
    """
    try:
        return importlib.import_module("triton_python_backend_utils")
    except ImportError as exc:
        raise BackendError("triton_python_backend_utils is missing: this runs inside Triton's Python backend") from exc


class TritonBackend:
    """An engine whose stages are other models of the server: :class:`odise_rt.backends.base.Backend`."""

    def __init__(self, prefix: str, device: Device) -> None:
        """Call the models ``<prefix>_<stage>``; ``device`` is where their configuration puts them."""
        self.device: Device = device
        self._prefix = prefix

    @property
    def description(self) -> str:
        """One line for logs and results."""
        return f"Triton models {self._prefix}_* on {self.device}"

    def windows_per_batch(self, side: int) -> int:
        """As many windows as fill the device."""
        return windows_that_fill(self.device, side)

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """Always: the server holds it."""
        return True

    def load(self, bundle: Bundle, stage: str) -> TritonStage:
        """A stage; Triton loads it by itself."""
        return TritonStage(f"{self._prefix}_{stage}", bundle.stages[stage].spec, self.device)


class TritonStage:
    """One model of the server: :class:`odise_rt.backends.base.Stage`."""

    def __init__(self, model: str, spec: StageSpec, device: Device) -> None:
        """Call ``model``."""
        self._model = model
        self._spec = spec
        self._utils = backend_utils()
        self.facts = StageFacts(spec.name, "triton", model, device, model, 0.0)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see :class:`odise_rt.backends.base.Stage`."""
        self._spec.check(inputs)
        utils = self._utils
        request = utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=[t.name for t in self._spec.outputs],
            inputs=[utils.Tensor(t.name, np.ascontiguousarray(inputs[t.name])) for t in self._spec.inputs],
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise BackendError(f"Triton's model {self._model} failed: {' '.join(response.error().message().split())}")
        outputs: dict[str, np.ndarray] = {}
        for tensor in self._spec.outputs:
            # The memory belongs to the response, which is gone when this returns.
            outputs[tensor.name] = np.array(utils.get_output_tensor_by_name(response, tensor.name).as_numpy())
        return outputs

    def close(self) -> None:
        """Nothing to release: the server owns the model."""
