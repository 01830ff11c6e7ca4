"""The form of a graph for ONNX Runtime on CPU: same inputs, outputs and weights, faster operators.

Two rewrites pay, and both are checked like any other graph:

* attention as ``com.microsoft.MultiHeadAttention``, whose CPU kernel never holds all scores at once: for 4096 tokens
  and 8 heads these are 537 MB, written and read several times by the decomposed form;
* 3x3 convolutions as Winograd products (:mod:`export.winograd`).

SiLU and exact GELU need no help: ONNX Runtime fuses them itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from export.graph_editing import MS, only_reader, producer_of, remove_unread, replace_node

VARIANT = "ort-cpu"
"""Key of the variant in the bundle; :mod:`odise_rt.backends.ort` looks for it."""

MAX_HEAD_WIDTH = 96
"""Wider heads are as fast as plain products (measured: 1 head of 512, 4096 tokens, 1.06 times the time)."""

_SWAP = (0, 2, 1, 3)
"""Between ``(B, tokens, heads, width)`` and ``(B, heads, tokens, width)``."""


@dataclass(frozen=True)
class FusionCounts:
    """How often each rewrite was applied."""

    attention: int
    winograd: int

    def __bool__(self) -> bool:
        return self.attention + self.winograd > 0

    def __str__(self) -> str:
        return f"{self.attention} attentions fused, {self.winograd} convolutions as Winograd products"


def fuse_for_ort_cpu(model: ir.Model) -> FusionCounts:
    """Fuse attention in a portable float32 graph for ONNX Runtime's CPU provider. In place.

    Winograd products are not among this: the exporter tries them afterwards and keeps them where they agree.

    Args:
        model: as :func:`export.onnx_from_stage.onnx_from_stage` makes it, static shapes still attached.
    """
    counts = FusionCounts(attention=fuse_attention(model), winograd=0)
    remove_unread(model.graph)
    return counts


@dataclass(frozen=True)
class _Attention:
    """One matched subgraph, on inputs ``(B, tokens, heads * width)``."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    result: ir.Node
    """The Reshape back to ``(B, tokens, heads * width)``."""


def fuse_attention(model: ir.Model, max_head_width: int = MAX_HEAD_WIDTH) -> int:
    """Replace unmasked attention between token sequences; returns how many were replaced. In place."""
    graph = model.graph
    count = 0
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        found = _match(softmax, max_head_width)
        if found is None:
            continue
        model.opset_imports[MS] = 1
        node = ir.node(
            "MultiHeadAttention",
            [found.query, found.key, found.value],
            {"num_heads": found.heads, "scale": found.scale},
            domain=MS,
            name=f"{softmax.name}/MultiHeadAttention",
        )
        node.outputs[0].name = str(node.name)
        replace_node(graph, found.result, [node], node.outputs[0])
        count += 1
    return count


def _match(softmax: ir.Node, max_head_width: int) -> _Attention | None:
    """``Reshape(Transpose(Softmax(scale q @ k^T) @ v))`` with q, k, v split into heads, or None."""
    scores = producer_of(softmax.inputs[0], "MatMul")
    product = only_reader(softmax.outputs[0], "MatMul")
    if scores is None or product is None or product.inputs[0] is not softmax.outputs[0]:
        return None
    scaled, turned_key = producer_of(scores.inputs[0], "Mul"), producer_of(scores.inputs[1], "Transpose")
    if scaled is None or turned_key is None or _perm(turned_key) != (0, 1, 3, 2):
        return None
    scale = scaled.inputs[1].const_value if scaled.inputs[1] is not None else None
    sources = [_tokens(v) for v in (scaled.inputs[0], turned_key.inputs[0], product.inputs[1])]
    merged = only_reader(product.outputs[0], "Transpose")
    if scale is None or scale.size != 1 or merged is None or _perm(merged) != _SWAP:
        return None
    result = only_reader(merged.outputs[0], "Reshape")
    shape = scaled.inputs[0].shape if scaled.inputs[0] is not None else None
    if result is None or shape is None or any(source is None for source in sources):
        return None
    heads, width = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int) or width > max_head_width:
        return None
    if any(source is None or source.shape is None or source.shape[2] != heads * width for source in sources):
        return None
    if result.outputs[0].shape is None or list(result.outputs[0].shape[2:]) != [heads * width]:
        return None
    query, key, value = (source for source in sources if source is not None)
    return _Attention(query, key, value, heads, float(scale.numpy().reshape(())), result)


def _tokens(split: ir.Value | None) -> ir.Value | None:
    """``x (B, tokens, heads * width)`` of ``Transpose(Reshape(x), [0, 2, 1, 3])``, or None."""
    transpose = producer_of(split, "Transpose")
    if transpose is None or _perm(transpose) != _SWAP:
        return None
    reshape = producer_of(transpose.inputs[0], "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    return source if source is not None and source.shape is not None and len(source.shape) == 3 else None


def _perm(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes.get_ints("perm", ()))
