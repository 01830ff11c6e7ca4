"""Mixed precision inside a graph: fp16 or bf16 where it is safe and pays, float32 where a named rule asks for it.

Inputs and outputs stay float32, so a bundle's specs do not depend on its precision. Precision is decided in the ONNX
graph because engines increasingly refuse to decide it themselves (TensorRT 11 has strongly typed networks only).

A node is *heavy* (matrix products and convolutions: all of the time and memory), *light* (elementwise and layout), or
neither. Heavy nodes work in half precision, light ones where their data comes in it, and the rest in float32; before
that, :data:`RULES` may claim a node for float32. The rules are the same for both kinds of half precision: bf16 lacks
digits (8 bits to 11), fp16 range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.graph_editing import add_constant, remove_unread
from odise_rt.errors import ExportError

Precision = Literal["fp32", "fp16"]
"""Precision of the graphs of a bundle."""
HalfPrecision = Literal["fp16", "bf16"]
EnginePrecision = Literal["fp32", "fp16", "bf16"]
"""Precision of the graph that an engine is built from."""


def check_bundle_precision(bundle: str, engine: EnginePrecision) -> None:
    """Refuse engines that are to be more precise than their bundle.

    Raises:
        ExportError: the bundle is fp16, and the engine is not.
    """
    if bundle == "fp16" and engine != "fp16":
        raise ExportError(
            f"the bundle is fp16 and {engine} engines were asked for: its weights are rounded already; export a bundle "
            "with --precision fp32, from which engines of every precision can be built"
        )


HALF_TYPES: dict[HalfPrecision, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOATS = frozenset({ir.DataType.FLOAT, *HALF_TYPES.values()})

HEAVY = frozenset({"MatMul", "Gemm", "Conv", "NhwcConv", "MultiHeadAttention"})
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Clip", "Where"})
LAYOUT = frozenset(
    {"Reshape", "Transpose", "Concat", "Split", "Slice", "Gather", "Expand", "Unsqueeze", "Squeeze", "Identity", "Pad"}
)
_FUSED = frozenset({"GroupNorm", "SkipLayerNormalization", "BiasGelu", "QuickGelu"})
"""Operators of ONNX Runtime (:mod:`export.cuda_fusion`), whose kernels keep statistics in float32 themselves."""
LIGHT = _ARITHMETIC | LAYOUT | _FUSED | {"Relu", "Sigmoid", "Tanh", "Gelu", "MaxPool", "Resize"}
_COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})
_LOGIC = frozenset({"Not", "Or", "And", "Xor", "Cast", "ReduceMax", "ReduceMin"}) | LAYOUT
_SUFFIXES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
CAST_SUFFIX = "/precision"
"""End of the names of the casts that are added here."""


@dataclass(frozen=True)
class Rule:
    """Why some nodes stay in float32."""

    name: str
    reason: str
    find: Callable[[ir.Graph], Iterable[ir.Node]]
    """The nodes that the rule claims."""
    returns_half: bool
    """Whether light nodes behind the claimed ones go on in half precision. If not, float32 reaches to the next heavy
    node."""


def _by_operator(*op_types: str) -> Callable[[ir.Graph], list[ir.Node]]:
    return lambda graph: [node for node in graph if node.op_type in op_types]


def _computed_constants(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that depend on sizes and constants alone, and the products that take them as a matrix."""
    data: set[int] = {id(value) for value in graph.inputs}
    claimed = []
    for node in graph:
        reads_data = node.op_type not in ("Shape", "Size") and any(id(v) in data for v in node.inputs if v is not None)
        if not reads_data:
            claimed.append(node)
            continue
        data.update(id(output) for output in node.outputs)
        if node.op_type == "MatMul" and any(
            v is not None and id(v) not in data and v.producer() is not None for v in node.inputs
        ):
            claimed.append(node)
    return claimed


def _sampling(graph: ir.Graph) -> list[ir.Node]:
    """Grid sampling and its coordinates, back to the linear layer that predicts them."""
    samplers = [node for node in graph if node.op_type == "GridSample"]
    claimed = list(samplers)
    for sampler in samplers:
        claimed += _back_to_heavy(sampler.inputs[1])
    return claimed


def _decisions(graph: ir.Graph) -> list[ir.Node]:
    """Values that are compared with a threshold, or leave the graph, back to the product that makes them."""
    claimed = []
    for node in graph:
        if node.op_type in _COMPARISONS:
            claimed.append(node)
            for value in node.inputs:
                claimed += _back_to_heavy(value)
    for output in graph.outputs:
        claimed += _back_to_heavy(output)
    return claimed


def _masked_sums(graph: ir.Graph) -> list[ir.Node]:
    """Products and sums over hard masks, e.g. mask pooling: areas exceed 2048, where fp16 stops counting."""
    booleans = {id(output) for node in graph if node.op_type in _COMPARISONS for output in node.outputs}
    claimed = []
    for node in graph:
        if not any(v is not None and id(v) in booleans for v in node.inputs):
            continue
        if node.op_type in _LOGIC:
            booleans.update(id(output) for output in node.outputs)
        if node.op_type in ("MatMul", "ReduceSum", "Cast"):
            claimed.append(node)
    return claimed


RULES: tuple[Rule, ...] = (
    Rule(
        "sizes and resampling",
        "positions, reference points and resize matrices are exact only in float32, and so are pixels resized by them",
        _computed_constants,
        returns_half=False,
    ),
    Rule(
        "sampling",
        "coordinates near the border are rounded to 1/2048 in fp16: a tenth of a pixel on large levels, in every layer",
        _sampling,
        returns_half=True,
    ),
    Rule(
        "decisions",
        "mask logits decide by their sign, and outputs are compared on the host: no rounding after the last product",
        _decisions,
        returns_half=False,
    ),
    Rule(
        "masked sums",
        "the area of a mask exceeds 2048 pixels, from where fp16 no longer counts, and 65504, where it ends",
        _masked_sums,
        returns_half=False,
    ),
    Rule(
        "statistics",
        "means and variances add up as many as 4 million values",
        _by_operator("InstanceNormalization", "LayerNormalization", "ReduceMean", "ReduceSum", "ReduceL2"),
        returns_half=True,
    ),
    Rule("softmax", "sums of thousands of exponentials", _by_operator("Softmax", "LogSoftmax"), returns_half=True),
    Rule(
        "functions",
        "powers, roots and angles leave the range of fp16 or lose their argument's digits",
        _by_operator("Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Sin", "Cos", "Erf"),
        returns_half=True,
    ),
)
"""Asked in this order; the first that claims a node gives the reason."""


@dataclass(frozen=True)
class PrecisionReport:
    """What became of the nodes of a graph."""

    precision: HalfPrecision
    half: Counter[str]
    """Operator to number of nodes in that precision."""
    kept: Counter[str]
    """Rule to number of nodes that it kept in float32."""
    casts: int

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        moved = dict(sorted(self.half.items()))
        return {self.precision: moved, "kept_fp32": dict(self.kept), "casts": self.casts}


def node_blocks(graph: ir.Graph) -> dict[int, str]:
    """The block of every node, by ``id``: the module that holds the layer whose weights the node reads, or else that of
    the last node before it that reads any. ``unet.mid_block.resnets.0.conv1.weight`` belongs to the block
    ``unet.mid_block.resnets.0``.
    """
    blocks: dict[int, str] = {}
    current = "start"
    for node in graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None:
                layer = str(value.name).removesuffix(".fp16").removesuffix(".bf16").rpartition(".")[0]
                if "." in layer:
                    current = layer.rpartition(".")[0]
                    break
        blocks[id(node)] = current
    return blocks


def to_mixed_precision(
    model: ir.Model, keep: Collection[str] = (), precision: HalfPrecision = "fp16"
) -> PrecisionReport:
    """Move a float32 graph to fp16 or bf16 inside. In place.

    Args:
        model: every value must know its dtype, as after export.
        keep: blocks, as :func:`node_blocks` names them, that stay in float32; see :mod:`export.precision_search`.
        precision: of the nodes that are moved.

    Returns:
        How many nodes went where, and by which rule.
    """
    graph = model.graph
    blocks = node_blocks(graph)
    bad_blocks = Rule(
        "blocks",
        "a search found that these blocks leave the bounds in half precision",
        lambda graph: [node for node in graph if blocks[id(node)] in keep],
        returns_half=False,
    )
    rules = (bad_blocks, *RULES)
    claims: dict[int, Rule] = {}
    for rule in rules:
        for node in rule.find(graph):
            claims.setdefault(id(node), rule)
    half = _choose(graph, claims, HALF_TYPES[precision])
    casts = _convert(graph, half, HALF_TYPES[precision])
    kept = Counter(rule.name for rule in rules for node in graph if claims.get(id(node)) is rule)
    return PrecisionReport(precision, Counter(node.op_type for node in graph if id(node) in half), kept, casts)


def _choose(graph: ir.Graph, claims: dict[int, Rule], half_type: ir.DataType) -> set[int]:
    """Ids of the nodes that work in half precision."""
    half: set[int] = set()
    offered: set[int] = set()  # values that a light node may go on with in half precision
    largest = float(ml_dtypes.finfo(half_type.numpy()).max)
    for node in graph:
        data = [v for v in _float_inputs(node) if v.const_value is None]
        constants = [v for v in _float_inputs(node) if v.const_value is not None]
        rule = claims.get(id(node))
        if rule is not None:
            if rule.returns_half:
                offered.update(id(output) for output in node.outputs)
            continue
        light = node.op_type in LIGHT and bool(data) and all(id(v) in offered for v in data)
        if (node.op_type in HEAVY or light) and data and all(_fits(v, largest) for v in constants):
            half.add(id(node))
            offered.update(id(output) for output in node.outputs)
    return half


def _convert(graph: ir.Graph, half: set[int], half_type: ir.DataType) -> int:
    """Insert casts where precision changes and convert constants; returns the number of casts."""
    cast_to: dict[tuple[int, ir.DataType], ir.Value] = {}
    produced: dict[int, ir.DataType] = {}  # value to its dtype after conversion, where it is not float32
    for node in list(graph):
        wanted = half_type if id(node) in half else ir.DataType.FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in FLOATS:
                continue
            if id(node) in half and index not in convertible(node):
                continue
            have = produced.get(id(value), ir.DataType.FLOAT)
            if have is wanted:
                continue
            key = (id(value), wanted)
            if key not in cast_to:
                cast_to[key] = _cast(graph, value, wanted)
            node.replace_input_with(index, cast_to[key])
        if id(node) in half:
            for output in node.outputs:
                if output.dtype == ir.DataType.FLOAT:
                    produced[id(output)] = half_type
                    output.type = ir.TensorType(half_type)
    assert not any(id(output) in produced for output in graph.outputs), "what leaves the graph is float32"
    remove_unread(graph)
    return sum(1 for node in graph if node.op_type == "Cast" and (node.name or "").endswith(CAST_SUFFIX))


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
    """The value in another dtype: a converted constant, or a Cast behind its producer."""
    if value.const_value is not None:
        name = f"{value.name}.{_SUFFIXES[to]}"
        tensor = ir.tensor(value.const_value.numpy().astype(to.numpy()), name=name)
        return add_constant(graph, name, tensor)
    node = ir.node("Cast", [value], {"to": int(to)}, name=f"{value.name}{CAST_SUFFIX}")
    node.outputs[0].name = f"{value.name}.{_SUFFIXES[to]}"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(to), value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(next(iter(graph)), node)
    return node.outputs[0]


def _back_to_heavy(value: ir.Value | None) -> list[ir.Node]:
    """Producers of a value through light nodes, up to and including the first heavy one on each path."""
    found: dict[int, ir.Node] = {}
    pending = [value.producer() if value is not None else None]
    while pending:
        node = pending.pop()
        if node is None or id(node) in found or node.op_type not in HEAVY | LIGHT:
            continue
        found[id(node)] = node
        if node.op_type not in HEAVY:
            pending += [v.producer() for v in node.inputs if v is not None]
    return list(found.values())


def _float_inputs(node: ir.Node) -> list[ir.Value]:
    allowed = convertible(node)
    return [
        value
        for index, value in enumerate(node.inputs)
        if value is not None and index in allowed and value.dtype in FLOATS
    ]


def convertible(node: ir.Node) -> range:
    """Inputs that share the node's dtype; Resize reads its scales, and GroupNorm its weights, in float32 always."""
    return range(1) if node.op_type in ("Resize", "GroupNorm") else range(len(node.inputs))


def _fits(constant: ir.Value, largest: float) -> bool:
    """Whether half precision holds a constant without overflow; infinities stay what they are."""
    assert constant.const_value is not None
    array = constant.const_value.numpy()
    finite = array[np.isfinite(array)]
    return finite.size == 0 or float(np.abs(finite).max()) <= largest
