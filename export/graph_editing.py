"""Small edits and look-ups that several graph passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

MS = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


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


class NodeEmitter:
    """Makes nodes and constants with names below a prefix, for a pass that puts several in the place of one."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        """The nodes in the order in which they were made."""

    def __call__(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: object) -> ir.Value:
        """The first output of a new node."""
        name = f"{self.prefix}/{len(self.nodes)}_{op_type}"
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        name = unused_name(self.graph, f"{self.prefix}/constant")
        return add_constant(self.graph, name, ir.tensor(array, name=name))


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


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a value that is a constant."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if there is one and it is of this operator."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output() or readers[0].node.op_type != op_type:
        return None
    return readers[0].node
