"""A stage as a Python-backend model, for servers that come without Triton's ONNX Runtime backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.backends.base import Device
from odise_rt.backends.ort import CUDA_OPTIONS, PROVIDERS, import_onnxruntime
from odise_rt.cores import usable_cores
from odise_rt.serve.triton.bls import backend_utils


class TritonPythonModel:
    """Triton's interface to a model in Python: runs ``model.onnx`` beside it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph."""
        config = json.loads(args["model_config"])
        self._batched = int(config.get("max_batch_size", 0)) > 0
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        device: Device = "cpu" if args["model_instance_kind"] == "CPU" else "cuda"
        ort = import_onnxruntime(device)
        wanted = PROVIDERS[device]
        providers: list[Any] = [PROVIDERS["cpu"]]
        if device == "cuda":
            providers.insert(0, (wanted, CUDA_OPTIONS | {"device_id": args["model_instance_device_id"]}))
        # The stages of an image take turns, copies of one run side by side.
        copies = sum(int(group.get("count", 1)) for group in config.get("instance_group", ()))
        options = ort.SessionOptions()
        options.intra_op_num_threads = max(1, usable_cores() // max(1, copies))
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = ort.InferenceSession(str(path), options, providers=providers)
        if self._session.get_providers()[0] != wanted:
            raise RuntimeError(f"{path} was to run on {wanted} and does not: see the server's log")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run the graph; requests that Triton put together run as one batch if their shapes allow it."""
        utils = backend_utils()
        arrays = [{name: utils.get_input_tensor_by_name(r, name).as_numpy() for name in self._inputs} for r in requests]
        if self._batched and len(requests) > 1 and len({_shapes(a) for a in arrays}) == 1:
            stacked = {name: np.concatenate([a[name] for a in arrays]) for name in self._inputs}
            ends = np.cumsum([len(a[self._inputs[0]]) for a in arrays])[:-1]
            parts = [np.split(output, ends) for output in self._session.run(self._outputs, stacked)]
            results: list[Sequence[np.ndarray]] = list(zip(*parts, strict=True))
        else:
            results = [self._session.run(self._outputs, a) for a in arrays]
        return [
            utils.InferenceResponse(
                output_tensors=[
                    utils.Tensor(n, np.ascontiguousarray(v)) for n, v in zip(self._outputs, result, strict=True)
                ]
            )
            for result in results
        ]

    def finalize(self) -> None:
        """Release the graph."""
        self._session = None


def _shapes(arrays: dict[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(a.shape[1:] for a in arrays.values())
