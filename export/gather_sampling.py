"""Grid sampling in plain operators, for engines whose own cannot be trusted.

TensorRT from 10.14 on compiles GridSample in strongly typed networks to something else, without a word
(NVIDIA/TensorRT issues 4813 and 4646). The same arithmetic in other operators::

    x, y     = pixel coordinates, clipped to just outside of the image
    rows     = the image with a frame of zeros, one row of C values for each pixel
    result   = the sum over the four neighbours of  weight * Gather(rows, position)

Samples outside read the frame, so no comparison is needed, and each read is C values in one piece.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph_editing import NodeEmitter, remove_unread, replace_node
from odise_rt.errors import ExportError

_BEFORE, _AFTER = 1, 2
"""Width of the frame on the near and the far side. A coordinate clipped to the far side has a right neighbour, too."""


def replace_grid_sample(model: ir.Model) -> int:
    """Write every GridSample as gathers. In place.

    Returns:
        How many were replaced.

    Raises:
        ExportError: one samples in another way than deformable attention does.
    """
    graph = model.graph
    samplers = [node for node in graph if node.op_type == "GridSample"]
    for number, node in enumerate(samplers):
        _check(node)
        _rewrite(graph, node, number)
    remove_unread(graph)
    return len(samplers)


def _check(node: ir.Node) -> None:
    attributes = node.attributes
    found = (
        attributes.get_string("mode", "linear"),
        attributes.get_string("padding_mode", "zeros"),
        attributes.get_int("align_corners", 0),
    )
    if found[0] not in ("linear", "bilinear") or found[1:] != ("zeros", 0):
        raise ExportError(
            f"{node.name} samples with (mode, padding_mode, align_corners) = {found}: only ('linear', 'zeros', 0) can "
            "be written for TensorRT"
        )
    image = node.inputs[0]
    if image is None or image.shape is None or len(image.shape) != 4 or not isinstance(image.shape[1], int):
        raise ExportError(f"{node.name} samples something else than images with a known number of channels")


def _rewrite(graph: ir.Graph, node: ir.Node, number: int) -> None:
    image, grid = node.inputs
    assert image is not None
    assert grid is not None
    assert image.shape is not None
    emit = NodeEmitter(graph, f"{node.name or f'GridSample_{number}'}/gather")
    channels = image.shape[1]
    dtype = image.dtype or ir.DataType.FLOAT

    def number_of(value: float) -> ir.Value:
        return emit.constant(np.array(value, np.float32))

    one = emit.constant(np.array(1, np.int64))
    frame = emit.constant(np.array(_BEFORE + _AFTER, np.int64))
    half, minus_one = number_of(0.5), number_of(-1.0)

    def coordinate(part: ir.Value, axis: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Position in the frame of the near neighbour of coordinates in [-1, 1], and the weights of both neighbours."""
        size = emit("Cast", emit("Shape", image, start=axis, end=axis + 1), to=int(ir.DataType.FLOAT))
        scaled = emit("Mul", part, emit("Mul", size, half))
        # A grid of -1 is the edge of the first pixel, half a pixel before its centre.
        pixel = emit("Add", scaled, emit("Mul", emit("Add", size, minus_one), half))
        clipped = emit("Min", emit("Max", pixel, minus_one), size)
        near = emit("Floor", clipped)
        far_weight = emit("Sub", clipped, near)
        near_weight = emit("Sub", number_of(1.0), far_weight)
        position = emit("Add", emit("Cast", near, to=int(ir.DataType.INT64)), one)
        return position, near_weight, far_weight

    if grid.dtype is not None and grid.dtype != ir.DataType.FLOAT:
        grid = emit("Cast", grid, to=int(ir.DataType.FLOAT))
    last = emit.constant(np.array([3], np.int64))
    x_part, y_part = (
        emit("Slice", grid, emit.constant(np.array([i])), emit.constant(np.array([i + 1])), last) for i in (0, 1)
    )  # (N, M, P, 1) each
    column, *column_weights = coordinate(x_part, 3)
    row, *row_weights = coordinate(y_part, 2)

    pads = np.array([0, 0, _BEFORE, _BEFORE, 0, 0, _AFTER, _AFTER], np.int64)
    framed = emit("Pad", image, emit.constant(pads), mode="constant")
    turned = emit("Transpose", framed, perm=[0, 2, 3, 1])
    rows = emit("Reshape", turned, emit.constant(np.array([-1, channels], np.int64)))  # (N (H + 3) (W + 3), C)

    width = emit("Add", emit("Shape", image, start=3, end=4), frame)
    height = emit("Add", emit("Shape", image, start=2, end=3), frame)
    first = emit.constant(np.array([0], np.int64))
    scalar = emit("Squeeze", emit("Shape", image, start=0, end=1), first)
    images = emit("Range", emit.constant(np.array(0, np.int64)), scalar, one)
    starts = emit("Mul", images, emit("Mul", width, height))
    starts = emit("Reshape", starts, emit.constant(np.array([-1, 1, 1, 1], np.int64)))
    corner = emit("Add", emit("Add", emit("Mul", row, width), column), starts)  # (N, M, P, 1)

    total: ir.Value | None = None
    for down, row_weight in enumerate(row_weights):
        for right, column_weight in enumerate(column_weights):
            place = corner
            if down:
                place = emit("Add", place, width)
            if right:
                place = emit("Add", place, one)
            picked = emit("Gather", rows, emit("Squeeze", place, last), axis=0)  # (N, M, P, C)
            weight = emit("Mul", row_weight, column_weight)
            if dtype != ir.DataType.FLOAT:
                weight = emit("Cast", weight, to=int(dtype))
            term = emit("Mul", picked, weight)
            total = term if total is None else emit("Add", total, term)
    assert total is not None
    result = emit("Transpose", total, perm=[0, 3, 1, 2])
    replace_node(graph, node, emit.nodes, result)
