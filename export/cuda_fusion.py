"""The form of a graph for ONNX Runtime on CUDA: same inputs, outputs and weights, operators of its CUDA provider.

======================  ============================================================================================
NhwcConv                a convolution with channels last, as tensor cores want them. ONNX Runtime would turn them by
                        itself (``prefer_nhwc``), but keeps every weight twice then, and does the arithmetic of sizes on
                        the GPU, from which each size has to be copied back before the next node can be launched
MultiHeadAttention      attention without a mask: flash or memory-efficient kernels, no scores in memory
GroupNorm               one pass instead of seven, with SiLU inside; channels last, too: both stand between two
                        transposes, which ONNX Runtime cancels against those of neighbours
SkipLayerNormalization  a residual sum and the norm behind it
QuickGelu               x * sigmoid(a * x): CLIP's activation, and SiLU with a = 1
BiasGelu                GELU of a layer's output and its bias
BiasSplitGelu           the gated GELU of Stable Diffusion's transformers, for the widths that have a kernel
======================  ============================================================================================

ArgMax of whole numbers has no CUDA kernel, so it gets floats. ONNX Runtime computes sizes on the CPU; where the GPU
divides by one, the divisor is made there, or it would be copied over, and no CUDA graph could be captured.

None of these kernels runs without a GPU. :func:`export.fused_operators.write_out_fusions` says in standard operators
what each means, so that the rest (which nodes were matched, how they are wired, in which precision) is compared on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.fused_operators import TO_NCHW, TO_NHWC
from export.fusion import fuse_attention
from export.graph_editing import (
    MS,
    NodeEmitter,
    add_constant,
    constant_of,
    only_reader,
    producer_of,
    remove_unread,
    replace_node,
    unused_name,
)
from export.group_norm import match_group_norm

MAX_HEAD_WIDTH = 256
"""Flash attention takes no wider heads; plain products are what is left then, and need no fusion."""
SPLIT_GELU_WIDTHS = frozenset({2560, 5120, 10240, 6144, 12288})
"""Widths before the split for which BiasSplitGelu has a kernel; the first three are Stable Diffusion's."""
CHANNELS_OF_TENSOR_CORES = 8
"""Convolutions whose channels this does not divide stay as they are."""


@dataclass(frozen=True)
class CudaFusionCounts:
    """How often each operator was put in."""

    convolution: int
    """Convolutions that were given channels last."""
    attention: int
    group_norm: int
    group_norm_silu: int
    """Those of ``group_norm`` with SiLU inside."""
    skip_layer_norm: int
    quick_gelu: int
    bias_gelu: int
    bias_split_gelu: int

    def __str__(self) -> str:
        return (
            f"{self.convolution} convolutions, {self.attention} attentions, "
            f"{self.group_norm} group norms ({self.group_norm_silu} with SiLU), "
            f"{self.skip_layer_norm} residual layer norms, {self.quick_gelu} quick GELUs, {self.bias_gelu} bias GELUs "
            f"and {self.bias_split_gelu} split GELUs fused"
        )


def fuse_for_ort_cuda(model: ir.Model) -> CudaFusionCounts:
    """Rewrite a portable float32 graph for ONNX Runtime's CUDA provider. In place.

    Args:
        model: as :func:`export.onnx_from_stage.onnx_from_stage` makes it, static shapes still attached. Precision is
            decided afterwards.
    """
    graph = model.graph
    attention = fuse_attention(model, MAX_HEAD_WIDTH)
    norms = _at_each(graph, "InstanceNormalization", _fuse_group_norm)
    _at_each(graph, "ArgMax", _floats_for_argmax)
    _at_each(graph, "Range", _divisor_on_gpu)
    counts = CudaFusionCounts(
        convolution=sum(map(bool, _at_each(graph, "Conv", _turn_convolution))),
        attention=attention,
        group_norm=sum(found is not None for found in norms),
        group_norm_silu=sum(bool(found) for found in norms),
        skip_layer_norm=sum(map(bool, _at_each(graph, "LayerNormalization", _fuse_skip_layer_norm))),
        bias_split_gelu=sum(map(bool, _at_each(graph, "Gelu", _fuse_split_gelu))),
        bias_gelu=sum(map(bool, _at_each(graph, "Gelu", _fuse_bias_gelu))),
        quick_gelu=sum(map(bool, _at_each(graph, "Sigmoid", _fuse_quick_gelu))),
    )
    if any(node.domain == MS for node in graph):
        model.opset_imports[MS] = 1
    return counts


def _at_each(graph: ir.Graph, op_type: str, fuse: Callable[[ir.Graph, ir.Node], bool | None]) -> list[bool | None]:
    """Call ``fuse`` for every node of an operator and give its answers; nodes that it leaves unread are removed, so
    that the next pattern does not meet them."""
    remove_unread(graph)
    found = [fuse(graph, node) for node in list(graph) if node.op_type == op_type]
    remove_unread(graph)
    return found


def _fuse_group_norm(graph: ir.Graph, norm: ir.Node) -> bool | None:
    """Fuse a GroupNorm and perhaps the SiLU behind it; returns whether there is, or None if this is no GroupNorm."""
    found = match_group_norm(norm)
    if found is None or found.channels // found.groups % 2:
        return None  # the kernel works on pairs of channels of one group
    weight, bias = constant_of(found.weight), constant_of(found.bias)
    assert weight is not None
    assert bias is not None
    last, silu = _silu_behind(found.result)
    emit = NodeEmitter(graph, f"{norm.name}/fused")
    turned = _channels_last(emit, found.source)
    normed = emit(
        "GroupNorm",
        turned,
        emit.constant(weight.reshape(-1).astype(np.float32)),
        emit.constant(bias.reshape(-1).astype(np.float32)),
        domain=MS,
        groups=found.groups,
        epsilon=found.epsilon,
        activation=int(silu),
        channels_last=1,
    )
    normed.shape, normed.type = turned.shape, found.source.type
    replace_node(graph, last, emit.nodes, emit("Transpose", normed, perm=list(TO_NCHW)))
    return silu


def _channels_last(emit: NodeEmitter, value: ir.Value) -> ir.Value:
    """A map (N, C, H, W) as (N, H, W, C)."""
    turned = emit("Transpose", value, perm=list(TO_NHWC))
    turned.shape, turned.type = _last_shape(value), value.type
    return turned


def _last_shape(value: ir.Value) -> ir.Shape:
    """The shape of a map (N, C, H, W) with its channels last."""
    assert value.shape is not None
    dims = list(value.shape)
    return ir.Shape([dims[axis] for axis in TO_NHWC])


def _turn_convolution(graph: ir.Graph, convolution: ir.Node) -> bool:
    """Turn a convolution of two axes with constant weights to channels last; returns whether it was one."""
    source, kernel, *others = convolution.inputs
    output, weight = convolution.outputs[0], constant_of(kernel)
    if source is None or kernel is None or weight is None or weight.ndim != 4 or source.shape is None:
        return False
    if convolution.attributes.get_int("group", 1) != 1 or output.shape is None:
        return False
    if any(channels % CHANNELS_OF_TENSOR_CORES for channels in weight.shape[:2]):
        return False
    emit = NodeEmitter(graph, f"{output.name}/turned")
    # Of the same block as before (export.precision.node_blocks).
    name = unused_name(graph, f"{kernel.name}_ohwi")
    last = add_constant(graph, name, ir.tensor(np.ascontiguousarray(weight.transpose(TO_NHWC)), name=name))
    attributes = {key: value for key, value in convolution.attributes.items() if key != "group"}
    inputs = [_channels_last(emit, source), last, *(value for value in others if value is not None)]
    convolved = emit("NhwcConv", *inputs, domain=MS, **attributes)
    convolved.shape, convolved.type = _last_shape(output), output.type
    replace_node(graph, convolution, emit.nodes, emit("Transpose", convolved, perm=list(TO_NCHW)))
    return True


def _floats_for_argmax(graph: ir.Graph, node: ir.Node) -> bool:
    """Give an ArgMax of whole numbers floats: float32 holds all that vocabularies count to."""
    source = node.inputs[0]
    if source is None or source.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
        return False
    emit = NodeEmitter(graph, f"{source.name}/floats")
    floats = emit("Cast", source, to=int(ir.DataType.FLOAT))
    floats.shape, floats.type = source.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, emit.nodes)
    node.replace_input_with(0, floats)
    return True


def _silu_behind(node: ir.Node) -> tuple[ir.Node, bool]:
    """The Mul of ``x * sigmoid(x)`` if that is all that happens to the node's output, else the node itself."""
    value = node.outputs[0]
    readers = [use.node for use in value.uses()]
    sigmoid = next((reader for reader in readers if reader.op_type == "Sigmoid"), None)
    if len(readers) != 2 or sigmoid is None or value.is_graph_output():
        return node, False
    product = only_reader(sigmoid.outputs[0], "Mul")
    if product is None or not any(reader is product for reader in readers):
        return node, False
    return product, True


def _fuse_skip_layer_norm(graph: ir.Graph, norm: ir.Node) -> bool:
    """Fuse a sum of two token sequences with the norm of it; the sum itself may have other readers."""
    total = producer_of(norm.inputs[0], "Add")
    if total is None or len(norm.inputs) < 3 or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    first, second = total.inputs
    weight, shift = constant_of(norm.inputs[1]), constant_of(norm.inputs[2])
    if first is None or second is None or weight is None or shift is None:
        return False
    shape, value = _tokens_shape(first), total.outputs[0]
    if shape is None or shape != _tokens_shape(second) or weight.shape != (shape[2],) or shift.shape != (shape[2],):
        return False
    if value.is_graph_output() or norm.outputs[0].is_graph_output():
        return False
    node = ir.node(
        "SkipLayerNormalization",
        [first, second, norm.inputs[1], norm.inputs[2]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=MS,
        num_outputs=4,
        name=f"{norm.name}/SkipLayerNormalization",
    )
    normed, mean, deviation, summed = node.outputs
    mean.name = deviation.name = ""
    for made, old in ((normed, norm.outputs[0]), (summed, value)):
        made.name, made.shape, made.type = f"{old.name}.fused", old.shape, old.type
    graph.insert_before(total, node)
    ir.convenience.replace_all_uses_with(norm.outputs[0], normed)
    graph.remove(norm, safe=True)
    ir.convenience.replace_all_uses_with(value, summed)
    graph.remove(total, safe=True)
    return True


def _tokens_shape(value: ir.Value) -> tuple[int | None, ...] | None:
    """``(B, tokens, width)`` of computed values; unknown sizes are None."""
    if value.const_value is not None or value.shape is None or len(value.shape) != 3:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _fuse_split_gelu(graph: ir.Graph, gelu: ir.Node) -> bool:
    """Fuse ``left * gelu(right)`` of the halves of a layer's output and its bias."""
    split = producer_of(gelu.inputs[0], "Split")
    product = only_reader(gelu.outputs[0], "Mul")
    if split is None or product is None or len(split.outputs) != 2 or gelu.inputs[0] is not split.outputs[1]:
        return False
    if (
        not any(value is split.outputs[0] for value in product.inputs)
        or gelu.attributes.get_string("approximate", "none") != "none"
    ):
        return False
    matched = _layer_and_bias(split.inputs[0])
    if matched is None or only_reader(split.outputs[0], "Mul") is None or only_reader(split.outputs[1], "Gelu") is None:
        return False
    source, bias = matched
    if source.shape is None or len(source.shape) != 3 or source.shape[2] not in SPLIT_GELU_WIDTHS:
        return False
    emit = NodeEmitter(graph, f"{gelu.name}/fused")
    replace_node(graph, product, emit.nodes, emit("BiasSplitGelu", source, bias, domain=MS))
    return True


def _fuse_bias_gelu(graph: ir.Graph, gelu: ir.Node) -> bool:
    """Fuse GELU of a layer's output and its bias."""
    if gelu.attributes.get_string("approximate", "none") != "none":
        return False
    matched = _layer_and_bias(gelu.inputs[0])
    if matched is None:
        return False
    emit = NodeEmitter(graph, f"{gelu.name}/fused")
    result = emit("BiasGelu", *matched, domain=MS)
    replace_node(graph, gelu, emit.nodes, result)
    return True


def _layer_and_bias(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """``x`` and ``b`` of ``x + b``, b a constant vector of x's width, if only one node reads the sum."""
    total = producer_of(value, "Add")
    if value is None or total is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    source, bias = total.inputs
    if source is None or bias is None or source.shape is None or bias.const_value is None or bias.shape is None:
        return None
    return (source, bias) if len(bias.shape) == 1 and bias.shape[0] == source.shape[-1] else None


def _fuse_quick_gelu(graph: ir.Graph, sigmoid: ir.Node) -> bool:
    """Fuse ``x * sigmoid(a * x)``."""
    product = only_reader(sigmoid.outputs[0], "Mul")
    inner = sigmoid.inputs[0]
    if product is None or inner is None:
        return False
    scaled = producer_of(inner, "Mul")
    factor = constant_of(scaled.inputs[1]) if scaled is not None else None
    source, alpha = inner, 1.0
    unscaled = scaled.inputs[0] if scaled is not None else None
    if unscaled is not None and factor is not None and factor.size == 1:
        source, alpha = unscaled, float(factor.reshape(()))
    if not any(value is source for value in product.inputs):
        return False
    emit = NodeEmitter(graph, f"{sigmoid.name}/fused")
    result = emit("QuickGelu", source, domain=MS, alpha=alpha)
    replace_node(graph, product, emit.nodes, result)
    return True


def _divisor_on_gpu(graph: ir.Graph, count: ir.Node) -> bool:
    """Replace the divisor n of a sequence 0, 1, ..., n - 1 by the last of them plus one."""
    start, limit, step = count.inputs
    numbers = count.outputs[0]
    if limit is None or limit.const_value is not None or limit.dtype != ir.DataType.FLOAT:
        return False
    if [None if (value := constant_of(bound)) is None else float(value) for bound in (start, step)] != [0.0, 1.0]:
        return False
    divisions = [
        use.node
        for use in limit.uses()
        if use.node.op_type == "Div" and use.idx == 1 and use.node.outputs[0].shape and use.node.inputs[0] is not limit
    ]
    if not divisions:
        return False
    emit = NodeEmitter(graph, f"{numbers.name}/size")
    bounds = [emit.constant(np.array([bound], np.int64)) for bound in (-1, np.iinfo(np.int64).max, 0)]
    size = emit("Add", emit("Slice", numbers, *bounds), emit.constant(np.ones(1, np.float32)))
    for node in emit.nodes:
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([1]), ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(count, emit.nodes)
    for division in divisions:
        division.replace_input_with(1, size)
    graph.sort()
    return True
