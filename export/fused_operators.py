"""What the operators of :mod:`export.cuda_fusion` mean, in operators that ONNX Runtime has on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph_editing import MS, NodeEmitter, remove_unread

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
FUSED_OPERATORS = (
    "NhwcConv",
    "MultiHeadAttention",
    "GroupNorm",
    "SkipLayerNormalization",
    "QuickGelu",
    "BiasGelu",
    "BiasSplitGelu",
)


def write_out_fusions(model: ir.Model) -> int:
    """Put operators that ONNX Runtime has on CPU in the place of the fused ones, computing in float32. In place.

    Returns:
        How many nodes were written out.
    """
    graph = model.graph
    fused = [node for node in graph if node.domain == MS and node.op_type in FUSED_OPERATORS]
    for number, node in enumerate(fused):
        _write_out(graph, node, number)
    remove_unread(graph)
    return len(fused)


def _write_out(graph: ir.Graph, node: ir.Node, number: int) -> None:
    half = node.outputs[0].dtype == ir.DataType.FLOAT16
    emit = NodeEmitter(graph, f"written_out_{number}_{node.op_type}")

    def single(value: ir.Value) -> ir.Value:
        return emit("Cast", value, to=int(ir.DataType.FLOAT)) if value.dtype == ir.DataType.FLOAT16 else value

    inputs = [single(value) for value in node.inputs if value is not None]
    results: Sequence[ir.Value]
    if node.op_type == "NhwcConv":
        results = [_convolution(emit, node, *inputs)]
    elif node.op_type == "GroupNorm":
        results = [_group_norm(emit, node, *inputs)]
    elif node.op_type == "BiasSplitGelu":
        results = [_bias_split_gelu(emit, *inputs)]
    else:
        inner = ir.node(
            node.op_type,
            inputs,
            dict(node.attributes),
            domain=MS,
            num_outputs=len(node.outputs),
            name=f"{emit.prefix}/32",
        )
        for index, output in enumerate(inner.outputs):
            output.name = f"{emit.prefix}/32.{index}" if node.outputs[index].name else ""
        emit.nodes.append(inner)
        results = inner.outputs
    pairs = [(old, new) for old, new in zip(node.outputs, results, strict=True) if old.uses() or old.is_graph_output()]
    finished = [(old, emit("Cast", new, to=int(ir.DataType.FLOAT16)) if half else new) for old, new in pairs]
    graph.insert_before(node, emit.nodes)
    for old, new in finished:
        new.shape, new.type = old.shape, old.type
        if old.is_graph_output():
            graph.outputs[next(i for i, output in enumerate(graph.outputs) if output is old)] = new
        ir.convenience.replace_all_uses_with(old, new)
    names = [(new, old.name) for old, new in finished]
    graph.remove(node, safe=True)
    for new, name in names:
        new.name = name


def _convolution(emit: NodeEmitter, node: ir.Node, source: ir.Value, weight: ir.Value, *bias: ir.Value) -> ir.Value:
    """Maps are (N, H, W, C) and weights (out, h, w, in)."""
    turned = [emit("Transpose", value, perm=list(TO_NCHW)) for value in (source, weight)]
    attributes: dict[str, Any] = dict(node.attributes)
    return emit("Transpose", emit("Conv", *turned, *bias, **attributes), perm=list(TO_NHWC))


def _group_norm(emit: NodeEmitter, node: ir.Node, source: ir.Value, weight: ir.Value, bias: ir.Value) -> ir.Value:
    """Channels last: mean and variance over all pixels and the channels of a group, then weight, bias and SiLU.

    Means are taken of rows first, then of columns, then of a group's channels: one sum over all of them would round too
    much for a comparison (see :mod:`export.group_norm`).
    """
    groups = node.attributes.get_int("groups", 1)
    channels = weight.shape[0] if weight.shape is not None else None
    assert isinstance(channels, int)
    rows, columns, members = (emit.constant(np.array([axis], np.int64)) for axis in (2, 1, 2))
    by_group = emit.constant(np.array([-1, groups, channels // groups], np.int64))
    by_channel = emit.constant(np.array([-1, 1, 1, channels], np.int64))
    ones = emit.constant(np.ones((groups, channels // groups), np.float32))

    def group_mean(value: ir.Value) -> ir.Value:
        means = emit("ReduceMean", emit("ReduceMean", value, rows, keepdims=1), columns, keepdims=1)  # (N, 1, 1, C)
        grouped = emit("ReduceMean", emit("Reshape", means, by_group), members, keepdims=1)  # (N, groups, 1)
        return emit("Reshape", emit("Mul", grouped, ones), by_channel)

    centred = emit("Sub", source, group_mean(source))
    variance = group_mean(emit("Mul", centred, centred))
    epsilon = emit.constant(np.array(node.attributes.get_float("epsilon", 1e-5), np.float32))
    normed = emit("Div", centred, emit("Sqrt", emit("Add", variance, epsilon)))
    result = emit("Add", emit("Mul", normed, weight), bias)
    return emit("Mul", result, emit("Sigmoid", result)) if node.attributes.get_int("activation", 0) else result


def _bias_split_gelu(emit: NodeEmitter, source: ir.Value, bias: ir.Value) -> ir.Value:
    """The left half of ``x + b`` times the exact GELU of the right half."""
    total = emit("Add", source, bias)
    width = bias.shape[0] if bias.shape is not None else None
    assert isinstance(width, int)

    def half(start: int) -> ir.Value:
        bounds = (np.array([value], np.int64) for value in (start, start + width // 2, -1))
        return emit("Slice", total, *(emit.constant(value) for value in bounds))

    return emit("Mul", half(0), emit("Gelu", half(width // 2)))
