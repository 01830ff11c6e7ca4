"""config.pbtxt of each model, derived from the bundle's specs so that it cannot drift from the graphs.

A stage whose inputs and outputs all are lists of the same thing (windows, prompts) gets Triton's dynamic batching:
Triton stacks what concurrent requests bring. ``unet_tap`` takes constants beside its windows and cannot be batched that
way; its windows of one image run together all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from odise_rt.specs import Dim, StageSpec, TensorSpec

Kind = Literal["cpu", "gpu"]

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
MAX_BATCH = 64
"""Windows or prompts that Triton may stack."""


@dataclass(frozen=True)
class Tensor:
    """One input or output in Triton's words."""

    name: str
    type: str
    dims: tuple[int, ...]
    """-1: any size."""
    optional: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """One model of the repository."""

    name: str
    backend: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    file: str
    """Name of the model's file in its version folder."""
    max_batch: int = 0
    """0: the first dimension is like any other."""
    batch_delay_microseconds: int = 0
    instances: int = 1
    kind: Kind = "cpu"
    parameters: Mapping[str, str] | None = None

    def to_pbtxt(self) -> str:
        """The text of config.pbtxt."""
        lines = [
            f"name: {_text(self.name)}",
            f"backend: {_text(self.backend)}",
            f"default_model_filename: {_text(self.file)}",
            f"max_batch_size: {self.max_batch}",
            "version_policy { latest { num_versions: 1 } }",
            f"instance_group [ {{ count: {self.instances} kind: KIND_{self.kind.upper()} }} ]",
        ]
        for side, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines.append(f"{side} [")
            lines.append(",\n".join(f"  {_tensor(t)}" for t in tensors))
            lines.append("]")
        if self.max_batch:
            lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {self.batch_delay_microseconds} }}")
        for key, value in (self.parameters or {}).items():
            lines.append(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}")
        return "\n".join(lines) + "\n"


def stage_config(
    spec: StageSpec,
    name: str,
    backend: str,
    file: str,
    *,
    instances: int,
    kind: Kind,
    delay: int,
    environment: str | None = None,
) -> ModelConfig:
    """The configuration of a stage.

    Args:
        spec: of the stage.
        name: of the model.
        backend: ``"onnxruntime"``, ``"tensorrt"`` or ``"python"``.
        file: name of the graph, engine or script in the version folder.
        instances: copies on each device.
        kind: of device.
        delay: microseconds that a request may wait for others, where requests are stacked.
        environment: of the Python backend, see :class:`odise_rt.serve.triton.repository.RepositoryOptions`.
    """
    batched = _batched(spec)

    def tensors(side: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(t.name, _TYPES[t.dtype], tuple(_dim(d) for d in (t.shape[1:] if batched else t.shape))) for t in side
        )

    return ModelConfig(
        name=name,
        backend=backend,
        inputs=tensors(spec.inputs),
        outputs=tensors(spec.outputs),
        file=file,
        max_batch=MAX_BATCH if batched else 0,
        batch_delay_microseconds=delay,
        instances=instances,
        kind=kind,
        parameters=_environment(environment),
    )


def orchestrator_config(
    name: str, *, instances: int, parameters: Mapping[str, str], environment: str | None = None
) -> ModelConfig:
    """The configuration of the model that clients call: encoded image or pixels, and words, to segments."""
    return ModelConfig(
        name=name,
        backend="python",
        inputs=(
            Tensor("IMAGE", "TYPE_UINT8", (-1,), optional=True),
            Tensor("PIXELS", "TYPE_UINT8", (-1, -1, 3), optional=True),
            Tensor("VOCABULARY", "TYPE_STRING", (1,)),
            Tensor("OPTIONS", "TYPE_STRING", (1,), optional=True),
        ),
        outputs=(Tensor("SEGMENT_MAP", "TYPE_INT32", (-1, -1)), Tensor("RESULT", "TYPE_STRING", (1,))),
        file="model.py",
        instances=instances,
        kind="cpu",
        parameters={**parameters, **_environment(environment)},
    )


def _environment(path: str | None) -> dict[str, str]:
    return {} if path is None else {"EXECUTION_ENV_PATH": path}


def _batched(spec: StageSpec) -> bool:
    firsts = {t.shape[0] for t in (*spec.inputs, *spec.outputs)}
    return len(firsts) == 1 and isinstance(next(iter(firsts)), str)


def _dim(dim: Dim) -> int:
    return dim if isinstance(dim, int) else -1


def _tensor(tensor: Tensor) -> str:
    dims = ", ".join(map(str, tensor.dims))
    optional = " optional: true" if tensor.optional else ""
    return f"{{ name: {_text(tensor.name)} data_type: {tensor.type} dims: [ {dims} ]{optional} }}"


def _text(value: str) -> str:
    """A string of protobuf's text format; JSON's escapes are among its own for ASCII."""
    return json.dumps(value)
