"""PyTorch stage to ONNX graph: portable, opset 20, standard operators, and the same bytes every time.

``torch.onnx.export`` traces and translates; :mod:`export.simplify` cleans up. What differs from run to run or from
machine to machine (stack traces, paths, generated names) is removed.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch

from export.operator_translations import TRANSLATIONS
from export.simplify import complete_types, drop_unused, fix_reshapes, simplify
from export.stages import StageGraph
from odise_rt.errors import ExportError
from odise_rt.version import __version__

OPSET = 20
"""TensorRT-RTX refuses the undecomposed Attention of later opsets; this one all engines read."""
IR_VERSION = 10


@dataclass(frozen=True)
class ExportedGraph:
    """A stage as ONNX."""

    model: ir.Model
    """Weights that need no new layout still share memory with the PyTorch module."""
    parameters: int
    """Numbers in the parameters that the stage reads."""


def onnx_from_stage(stage: StageGraph) -> ExportedGraph:
    """Trace, translate and clean one stage.

    Args:
        stage: the module with its spec.

    Returns:
        A graph with the input, output and dimension names of the spec, every value of known dtype.

    Raises:
        ExportError: the module cannot be traced with the spec's symbolic dimensions, or cannot be translated.
    """
    dynamic = tuple({axis: torch.export.Dim.DYNAMIC for axis in dims} for dims in stage.dynamic_dims())
    try:
        with torch.no_grad(), _quiet_exporter():
            traced = torch.export.export(stage.module, stage.trace_inputs(), dynamic_shapes=dynamic, strict=False)
            program = torch.onnx.export(
                traced,
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                custom_translation_table=TRANSLATIONS,
            )
            assert program is not None
            model = program.model
            simplify(model)
    except Exception as exc:  # the exporter raises many unrelated types
        reason = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise ExportError(
            f"stage {stage.name} cannot be exported: {reason.strip()[:400]}; "
            "a size that code compares or branches on must not depend on a symbolic dimension"
        ) from exc
    _adopt_spec(model, stage)
    complete_types(model)
    fix_reshapes(model.graph)
    drop_unused(model)
    make_reproducible(model)
    return ExportedGraph(model, _parameters_read(traced))


def make_reproducible(model: ir.Model) -> None:
    """Drop traces, paths and generated names; number values in order, so that equal graphs are equal files."""
    model.producer_name, model.producer_version = "odise_rt", __version__
    model.domain = model.doc_string = None
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    graph = model.graph
    graph.name, graph.doc_string = graph.name or "stage", None
    graph.metadata_props.clear()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in (*graph.inputs, *graph.initializers.values()):
        value.doc_string = None
        value.metadata_props.clear()
    counts: Counter[str] = Counter()
    for number, node in enumerate(graph):
        node.name = f"/{node.op_type}_{counts[node.op_type]}"
        counts[node.op_type] += 1
        node.doc_string = None
        node.metadata_props.clear()
        for index, output in enumerate(node.outputs):
            output.doc_string = None
            output.metadata_props.clear()
            if id(output) not in kept:
                output.name = f"v{number}" + (f".{index}" if len(node.outputs) > 1 else "")
    _rename_constants(graph)


def _adopt_spec(model: ir.Model, stage: StageGraph) -> None:
    """Give inputs, outputs and their dimensions the names that the spec has for them."""
    graph, spec = model.graph, stage.spec
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if len(values) != len(tensors):
            raise ExportError(
                f"stage {spec.name}: the graph has {len(values)} tensors at one side, the spec {len(tensors)}: "
                "the model and this version of odise_rt do not belong together"
            )
        for value, tensor in zip(values, tensors, strict=True):
            if value.dtype is None or value.dtype.name.lower() != {"float32": "float"}.get(tensor.dtype, tensor.dtype):
                raise ExportError(f"stage {spec.name}: {tensor.name} is {value.dtype}, expected {tensor.dtype}")
            fixed = [(found, dim) for found, dim in zip(value.shape or (), tensor.shape, strict=True)]
            for found, dim in fixed:
                if isinstance(found, int) and found != dim:
                    raise ExportError(
                        f"stage {spec.name}: a dimension of {tensor.name} became {found} in the graph, expected {dim}: "
                        "code in the model treats a symbolic size as a constant"
                    )
            value.name = tensor.name
            value.shape = ir.Shape(tensor.shape)
    graph.name = spec.name


def _rename_constants(graph: ir.Graph) -> None:
    """Module paths for weights; numbers, in order of first use, for constants without one."""
    used: dict[str, ir.Value] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name in graph.initializers:
                used.setdefault(str(value.name), value)
    for value in list(graph.initializers.values()):
        graph.initializers.pop(str(value.name))
    for number, (old, value) in enumerate(used.items()):
        is_weight = "." in old
        name = old if is_weight else f"c{number}"
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        graph.register_initializer(value)


def _parameters_read(traced: torch.export.ExportedProgram) -> int:
    """Numbers in the parameters that the graph reads; a stage's module may own more."""
    names = traced.graph_signature.inputs_to_parameters
    read = {
        names[node.name]
        for node in traced.graph.nodes
        if node.op == "placeholder" and node.users and node.name in names
    }
    return sum(traced.state_dict[name].numel() for name in read)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch and onnxscript warn of what they skip and of each other's future; failures are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
