"""Makes a freshly translated graph small and plain: constants folded, weights laid out as they are used, no idle nodes.

torch's own optimiser spends two thirds of an export on rewrite rules that find nothing here; these passes are the ones
that matter, and take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from onnxscript.optimizer import fold_constants

from export.graph_editing import add_constant, unused_name
from odise_rt.errors import ExportError

_FOLDED_ELEMENTS = 1 << 16
"""Up to here arithmetic on constants is done at export; the layout of weights has a pass of its own."""
_LAYOUT_OPERATORS = ("Transpose", "Split", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Slice")


def simplify(model: ir.Model) -> None:
    """Fold what is constant, lay weights out as they are used, and drop what nothing reads. In place."""
    ir_passes.InlinePass()(model)
    # First, so that a weight which two branches lay out alike is laid out, stored and mapped into memory once.
    ir_passes.CommonSubexpressionEliminationPass()(model)
    fold_constants(model, input_size_limit=_FOLDED_ELEMENTS, output_size_limit=_FOLDED_ELEMENTS)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fold_weight_layout(model.graph)
    drop_no_ops(model.graph)
    fix_reshapes(model.graph)
    ir_passes.CommonSubexpressionEliminationPass()(model)
    drop_unused(model)


def drop_unused(model: ir.Model) -> None:
    """Drop nodes, functions and operator sets that nothing reads. In place."""
    ir_passes.IdentityEliminationPass()(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.RemoveUnusedFunctionsPass()(model)
    ir_passes.RemoveUnusedOpsetsPass()(model)


def fold_weight_layout(graph: ir.Graph) -> int:
    """Apply transposes, splits and the like of weights at export, so that engines find them ready to use.

    Args:
        graph: its constants must be initializers; changed in place.

    Returns:
        How many nodes went away.
    """
    folded = 0
    for node in list(graph):
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type not in _LAYOUT_OPERATORS or not inputs or any(value.const_value is None for value in inputs):
            continue
        if any(output.is_graph_output() for output in node.outputs):
            continue
        arrays = [np.asarray(value.const_value.numpy()) for value in inputs if value.const_value is not None]
        results = _apply_layout(node, arrays)
        if results is None:
            continue
        for index, (output, result) in enumerate(zip(node.outputs, results, strict=True)):
            suffix = f".{node.op_type.lower()}" + (f"{index}" if len(results) > 1 else "")
            name = unused_name(graph, f"{inputs[0].name}{suffix}")
            value = add_constant(graph, name, ir.tensor(np.ascontiguousarray(result), name=name))
            ir.convenience.replace_all_uses_with(output, value)
        graph.remove(node, safe=True)
        folded += 1
    return folded


def drop_no_ops(graph: ir.Graph) -> int:
    """Remove what does nothing: factors of one, slices of everything, casts to the same dtype.

    Returns:
        How many nodes went away.
    """
    dropped = 0
    for node in list(graph):
        if not _does_nothing(node) or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        assert source is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        graph.remove(node, safe=True)
        dropped += 1
    return dropped


def _does_nothing(node: ir.Node) -> bool:
    constants = [None if v is None or v.const_value is None else v.const_value for v in node.inputs[1:]]
    if node.op_type in ("Mul", "Div"):
        factor = constants[0]
        return factor is not None and factor.size == 1 and factor.shape.rank() == 0 and float(factor.numpy()) == 1.0
    if node.op_type == "Slice":
        if any(constant is None for constant in constants):
            return False
        starts, ends, _axes, *steps = (c.numpy() for c in constants if c is not None)
        return bool(
            (starts == 0).all() and (ends >= np.iinfo(np.int32).max).all() and all((s == 1).all() for s in steps)
        )
    if node.op_type == "CastLike":
        source, like = node.inputs
        return source is not None and like is not None and source.dtype is not None and source.dtype == like.dtype
    return False


def fix_reshapes(graph: ir.Graph) -> int:
    """Give reshapes constant targets where the known shapes allow it: fewer nodes, and clearer to every engine.

    A symbolic dimension that stays in its place becomes 0 ("as before"), another one -1 ("the rest").

    Returns:
        How many targets became constant.
    """
    fixed = 0
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        target = _constant_target(source.shape if source is not None else None, result.shape)
        if target is None:
            continue
        name = "reshape." + "_".join(str(size) for size in target)
        if name not in graph.initializers:
            add_constant(graph, name, ir.tensor(np.array(target, np.int64), name=name))
        node.replace_input_with(1, graph.initializers[name])
        node.attributes.pop("allowzero", None)
        fixed += 1
    return fixed


def _constant_target(source: ir.Shape | None, result: ir.Shape | None) -> list[int] | None:
    if source is None or result is None:
        return None
    target = []
    for axis, dim in enumerate(result):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(source) and dim.value is not None and source[axis] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and not any(dim == 0 for dim in result if isinstance(dim, int)) else None


def complete_types(model: ir.Model) -> None:
    """Infer the dtype of every value and as much of its shape as is fixed; later passes rely on both. In place.

    Raises:
        ExportError: a value's dtype cannot be inferred.
    """
    ir_passes.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
    kept = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None:
                raise ExportError(f"the dtype of {node.name} in graph {model.graph.name} cannot be inferred")
            if value.shape is not None and id(value) not in kept:
                # Generated symbols differ between versions of torch and say nothing.
                value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])


def _apply_layout(node: ir.Node, arrays: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    data = arrays[0]
    if node.op_type == "Identity":
        return [data]
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", None)
        return [np.transpose(data, perm)]
    if node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0)
        sizes = arrays[1] if len(arrays) > 1 else [data.shape[axis] // len(node.outputs)] * len(node.outputs)
        return np.split(data, np.cumsum(sizes)[:-1], axis=axis)
    if node.op_type == "Reshape":
        target = [data.shape[i] if size == 0 else int(size) for i, size in enumerate(arrays[1])]
        return [data.reshape(target)]
    if node.op_type == "Squeeze":
        return [np.squeeze(data, tuple(int(a) for a in arrays[1]) if len(arrays) > 1 else None)]
    if node.op_type == "Unsqueeze":
        return [np.expand_dims(data, tuple(int(a) for a in arrays[1]))]
    if node.op_type == "Cast":
        return [data.astype(ir.DataType(node.attributes.get_int("to")).numpy())]
    if node.op_type == "Slice":
        starts, ends = arrays[1], arrays[2]
        axes = arrays[3] if len(arrays) > 3 else np.arange(len(starts))
        steps = arrays[4] if len(arrays) > 4 else np.ones(len(starts), np.int64)
        window = [slice(None)] * data.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            if step <= 0:
                return None
            window[int(axis)] = slice(int(start), int(end), int(step))
        return [data[tuple(window)]]
    return None
