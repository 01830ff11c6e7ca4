"""GroupNorm in steps that round well on every engine.

How an engine sums an InstanceNormalization is its own affair: ONNX Runtime on CPU adds up a whole group in one float32
accumulator. For the million values of a group at full resolution that leaves an error of 6e-5 of the standard
deviation, 70 times PyTorch's (measured, version 1.32), which the attention behind it multiplies. Means of means, first
of rows and then of the rest, keep it at 2e-6 for 1.1 to 1.4 times the time of a layer that takes a hundredth of the
whole. Only float32 graphs need it: fp16 products round more than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.graph_editing import (
    NodeEmitter,
    add_constant,
    constant_of,
    only_reader,
    producer_of,
    remove_unread,
    replace_node,
    unused_name,
)

MIN_GROUP_VALUES = 1 << 17
"""With fewer values in a group the accumulator is good to 1e-5, and fewer nodes are faster."""

_PRECISE = "/precise"
"""End of the prefix that all nodes and constants have in their names which are put in here."""


@dataclass(frozen=True)
class GroupNorm:
    """A matched subgraph on ``(N, C, H, W)``."""

    source: ir.Value
    groups: int
    channels: int
    epsilon: float
    weight: ir.Value
    """``(C, 1, 1)``."""
    bias: ir.Value
    """``(C, 1, 1)``."""
    result: ir.Node
    """The Add of the bias."""


def apply_precise_group_norm(model: ir.Model) -> int:
    """Rewrite GroupNorms over large groups. In place.

    Returns:
        How many were rewritten.
    """
    graph = model.graph
    matches = [match_group_norm(node) for node in graph if node.op_type == "InstanceNormalization"]
    found = [match for match in matches if match is not None and _is_large(match)]
    for match in found:
        _rewrite(graph, match)
    return len(found)


def restore_group_norm(model: ir.Model) -> int:
    """Undo :func:`apply_precise_group_norm`, for engines with a GroupNorm of their own. In place.

    Returns:
        How many were restored.
    """
    graph = model.graph
    steps: dict[str, list[ir.Node]] = {}
    for node in graph:
        prefix = (node.name or "").rpartition("/")[0]
        if prefix.endswith(_PRECISE):
            steps.setdefault(prefix, []).append(node)
    for prefix, nodes in steps.items():
        _restore(graph, prefix, nodes)
    remove_unread(graph)
    return len(steps)


def _restore(graph: ir.Graph, prefix: str, nodes: list[ir.Node]) -> None:
    source, bias, result = nodes[0].inputs[0], nodes[-1].inputs[1], nodes[-1]
    weight, epsilon = (graph.initializers[f"{prefix}/{kind}"].const_value for kind in ("weight", "epsilon"))
    assert source is not None
    assert source.shape is not None
    assert bias is not None
    assert weight is not None
    assert epsilon is not None
    factors = weight.numpy()
    groups, channels = factors.shape[0], factors.size
    emit = NodeEmitter(graph, f"{prefix.removesuffix(_PRECISE)}/group_norm")
    grouped = emit("Reshape", source, emit.constant(np.array([0, groups, -1], np.int64)))
    ones, zeros = (emit.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    normed = emit("InstanceNormalization", grouped, ones, zeros, epsilon=float(epsilon.numpy()))
    shape = emit("Shape", source)
    restored = emit("Reshape", normed, shape)
    scaled = emit("Mul", restored, emit.constant(factors.reshape(channels, 1, 1).astype(np.float32)))
    shifted = emit("Add", scaled, bias)
    shape.type = ir.TensorType(ir.DataType.INT64)
    for value in (grouped, normed):
        value.type, value.shape = source.type, ir.Shape([source.shape[0], groups, None])
    for value in (restored, scaled):
        value.type, value.shape = source.type, source.shape
    replace_node(graph, result, emit.nodes, shifted)


def match_group_norm(norm: ir.Node) -> GroupNorm | None:
    """The GroupNorm that an InstanceNormalization is part of, or None:
    ``Add(Mul(Reshape(InstanceNormalization(Reshape(x, [0, G, -1]))), weight), bias)``.
    """
    grouped = producer_of(norm.inputs[0], "Reshape")
    restored = only_reader(norm.outputs[0], "Reshape")
    scaled = only_reader(restored.outputs[0], "Mul") if restored is not None else None
    shifted = only_reader(scaled.outputs[0], "Add") if scaled is not None else None
    if grouped is None or scaled is None or shifted is None:
        return None
    source, weight, bias = grouped.inputs[0], scaled.inputs[1], shifted.inputs[1]
    if source is None or source.shape is None or len(source.shape) != 4 or weight is None or bias is None:
        return None
    factors, scale, shift = (constant_of(value) for value in (weight, *norm.inputs[1:]))
    channels, offsets = source.shape[1], constant_of(bias)
    if factors is None or offsets is None or scale is None or shift is None or not isinstance(channels, int):
        return None
    plain = (scale == 1).all() and (shift == 0).all()
    if not plain or channels % scale.size or factors.shape != (channels, 1, 1) or offsets.shape != (channels, 1, 1):
        return None
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    return GroupNorm(source, scale.size, channels, epsilon, weight, bias, shifted)


def _is_large(norm: GroupNorm) -> bool:
    """Whether a group may have :data:`MIN_GROUP_VALUES`, as far as the size of the map is known."""
    assert norm.source.shape is not None
    height, width = norm.source.shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return True
    return norm.channels // norm.groups * height * width >= MIN_GROUP_VALUES


def _rewrite(graph: ir.Graph, norm: GroupNorm) -> None:
    prefix = f"{norm.result.name}{_PRECISE}"
    emit = NodeEmitter(graph, prefix)
    per_group = norm.channels // norm.groups

    def constant(kind: str, array: np.ndarray) -> ir.Value:
        return add_constant(graph, unused_name(graph, f"{prefix}/{kind}"), ir.tensor(array))

    rows, columns, members = (constant(f"axis{axis}", np.array([axis], np.int64)) for axis in (3, 2, 2))
    by_group = constant("by_group", np.array([-1, norm.groups, per_group], np.int64))
    by_channel = constant("by_channel", np.array([-1, norm.channels, 1, 1], np.int64))
    ones = constant("ones", np.ones((norm.groups, per_group), np.float32))

    def group_mean(row_means: ir.Value) -> ir.Value:
        """``(N, C, H, 1)`` to ``(N, G, 1)``."""
        channel_means = emit("ReduceMean", row_means, columns, keepdims=1)
        return emit("ReduceMean", emit("Reshape", channel_means, by_group), members, keepdims=1)

    mean = group_mean(emit("ReduceMean", norm.source, rows, keepdims=1))
    centred = emit("Sub", norm.source, emit("Reshape", emit("Mul", mean, ones), by_channel))

    width = emit("Cast", emit("Shape", norm.source, start=3, end=4), to=int(ir.DataType.FLOAT))
    squares = emit("Div", emit("ReduceSumSquare", centred, rows, keepdims=1), width)
    variance = emit("Add", group_mean(squares), constant("epsilon", np.array(norm.epsilon, np.float32)))
    deviation = emit("Sqrt", variance)
    weight = constant_of(norm.weight)
    assert weight is not None
    factors = constant("weight", weight.reshape(norm.groups, per_group).astype(np.float32))
    scale = emit("Reshape", emit("Div", factors, deviation), by_channel)
    result = emit("Add", emit("Mul", centred, scale), norm.bias)
    replace_node(graph, norm.result, emit.nodes, result)
