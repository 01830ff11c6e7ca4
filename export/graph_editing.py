"""Small edits that several graph passes share."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def fixed_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a constant."""
    return tuple(int(size) for size in tensor.shape.numpy())


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register an initializer under a name that must be free."""
    shape = ir.Shape(fixed_shape(tensor))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def unused_name(graph: ir.Graph, name: str) -> str:
    """The name, or the name with the first number that makes it free for an initializer."""
    number, candidate = 1, name
    while candidate in graph.initializers:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def replace_node(graph: ir.Graph, node: ir.Node, added: Sequence[ir.Node], result: ir.Value) -> None:
    """Put ``added`` in the place of ``node``; readers of its only output read ``result``, under its name."""
    old = node.outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(node, list(added))
    if old.is_graph_output():
        index = next(i for i, output in enumerate(graph.outputs) if output is old)
        graph.outputs[index] = result
    ir.convenience.replace_all_uses_with(old, result)
    name = old.name
    graph.remove(node, safe=True)
    result.name = name


def remove_unread(graph: ir.Graph) -> None:
    """Drop nodes and constants that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
