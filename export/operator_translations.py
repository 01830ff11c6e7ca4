"""Our own ONNX form of operators whose translation in torch carries nodes that this model does not need.

The bodies are onnxscript: ``op.X`` adds a node to the graph that is being built.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op


def attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """``aten::scaled_dot_product_attention`` as MatMul, Softmax, MatMul: the form that engines' own fusions look for.

    torch's translation guards against rows without any allowed key; no mask of this model has such a row.
    """
    assert (is_causal, enable_gqa, dropout_p) == (False, False, 0.0), "the model uses neither"
    if scale is None:
        width = query.shape[-1] if query.shape is not None else None
        assert isinstance(width, int), "the width of a head must be known at export"
        scale = width**-0.5
    scaled = op.Mul(query, op.Constant(value_float=float(scale)))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            scores = op.Where(attn_mask, scores, op.Constant(value_float=float("-inf")))
        else:
            scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def group_norm(
    data: ir.Value,
    num_groups: int,
    weight: ir.Value,
    bias: ir.Value,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ir.Value:
    """``aten::group_norm`` as InstanceNormalization over groups: GroupNormalization comes with opset 21."""
    assert data.shape is not None, "the rank must be known at export"
    ones, zeros = np.ones(num_groups, np.float32), np.zeros(num_groups, np.float32)
    grouped = op.Reshape(data, op.Constant(value_ints=[0, num_groups, -1]))
    scale, shift = op.Constant(value=ir.tensor(ones)), op.Constant(value=ir.tensor(zeros))
    normed = op.Reshape(op.InstanceNormalization(grouped, scale, shift, epsilon=eps), op.Shape(data))
    trailing = op.Constant(value_ints=list(range(1, len(data.shape) - 1)))
    return op.Add(op.Mul(normed, op.Unsqueeze(weight, trailing)), op.Unsqueeze(bias, trailing))


TRANSLATIONS = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.group_norm.default: group_norm,
}
"""Operator to its translation, for ``torch.onnx.export(custom_translation_table=...)``."""
