"""Graphs of :mod:`export.precision` made float32 again, and made to round on the CPU as on a GPU, to compare them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph_editing import remove_unread
from export.precision import CAST_SUFFIX, HALF_TYPES, LAYOUT, convertible

_HALVES = frozenset(HALF_TYPES.values())


def to_single_precision(model: ir.Model) -> int:
    """Undo :func:`export.precision.to_mixed_precision` but for the rounding of weights. In place.

    Returns:
        How many casts went away; 0 for a float32 graph.
    """
    graph = model.graph
    removed = 0
    for node in list(graph):
        if node.op_type != "Cast" or not (node.name or "").endswith(CAST_SUFFIX):
            continue
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        name = output.name
        leaves = output.is_graph_output()
        if leaves:
            source.shape = output.shape
            graph.outputs[next(i for i, value in enumerate(graph.outputs) if value is output)] = source
        ir.convenience.replace_all_uses_with(output, source)
        graph.remove(node, safe=True)
        if leaves:
            source.name = name
        removed += 1
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _HALVES:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in graph:
        for output in node.outputs:
            if output.dtype in _HALVES:
                output.type = ir.TensorType(ir.DataType.FLOAT)
    remove_unread(graph)
    return removed


def make_rounding_explicit(model: ir.Model) -> int:
    """Let every fp16 or bf16 node compute in float32 and round its result by an explicit cast. In place; for
    comparisons.

    ONNX Runtime has few fp16 kernels on CPU, and hardly any for bf16. Where it has none it computes in float32 and
    leaves out the rounding between neighbours, so an fp16 graph that overflows on a GPU agrees on the CPU
    (measured, version 1.32, whatever the optimisation level). Casts that are in the graph it keeps.

    Returns:
        How many nodes round now.
    """
    graph = model.graph
    wide: dict[int, ir.Value] = {}  # rounded value to its float32 form
    rounded = 0
    for node in list(graph):
        half = [output for output in node.outputs if output.dtype in _HALVES]
        if not half or node.op_type == "Cast":
            continue
        if node.op_type in LAYOUT and half[0].dtype == ir.DataType.FLOAT16:
            continue  # rounds nothing, and runs as it is; in bf16 some of them do not
        for index in convertible(node):
            value = node.inputs[index]
            if value is None or value.dtype not in _HALVES:
                continue
            if id(value) not in wide:
                cast = _named_cast(value, ir.DataType.FLOAT, f"{value.name}.wide")
                graph.insert_before(node, cast)
                wide[id(value)] = cast.outputs[0]
            node.replace_input_with(index, wide[id(value)])
        for output in half:
            assert output.dtype is not None
            cast = _named_cast(output, output.dtype, f"{output.name}.rounded")
            output.type = ir.TensorType(ir.DataType.FLOAT)
            readers = [use for use in output.uses() if use.node is not cast]
            for use in readers:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            graph.insert_after(node, cast)
        rounded += 1
    return rounded


def _named_cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(to)}, name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(to), value.shape
    return node
