"""3x3 convolutions as Winograd products, for engines that have none of their own (ONNX Runtime on CPU).

Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308) makes a 4x4 output tile from a 6x6 input
tile with 36 multiplications for each pair of channels instead of 144. Written in graph operators::

    tiles    = Conv(x, kron(B, B), stride 4)      (C, N, 36, T)   every channel alone, 6x6 tile to 36 values
    kernels  = kron(G, G) @ w                     (36, C', C)     from the weights as they are stored
    products = kernels[f] @ tiles[f]              (N, 36, C', T)  36 matrix products: nearly all of the work
    y        = DepthToSpace(kron(A, A) @ products) + bias

A large image is cut into bands of rows, so that tiles and products are never all in memory at once.

The result is that of the convolution up to rounding (about ten times that of the direct sum; exact arithmetic would
give equality). Kernels are computed in the graph on every run: stored, they would take four times the memory of the
weights, and they cost little beside the products of a large image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from export.graph_editing import MS, NodeEmitter, add_constant, fixed_shape, replace_node

TILE = 4
"""Output tile side. Two would save 2.25 instead of 4 times the multiplications and move 1.8 times the data."""
KERNEL = 3
_POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(4, 3), Fraction(-4, 3))
"""Interpolation points besides infinity. Of the small rationals tried, these round best: a quarter of the error of the
textbook's (0, 1, -1, 2, -2)."""

MIN_CHANNELS = 96
"""Least channels of a convolution that gains: with fewer, moving tiles costs more than the products save."""
MAX_BAND_BYTES = 96 << 20
"""Largest array of transformed tiles of one image. A larger image is worked on in bands of rows, one after the other:
at 512 x 512 pixels and 128 channels tiles and products take 600 MB at once, and 1/4 of that in four bands."""
MIN_TILES = 32
"""Least tiles of an image for a convolution that gains. With fewer, computing the kernels costs more than the products
save: for each pair of channels 144 bytes are written once, and 216 of 288 operations saved for each tile."""


def winograd_matrices(
    points: Sequence[Fraction] = _POINTS, tile: int = TILE, kernel: int = KERNEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Cook-Toom construction in rational arithmetic.

    Args:
        points: ``tile + kernel - 2`` distinct interpolation points; infinity is added.
        tile: outputs of one step, m.
        kernel: taps, r.

    Returns:
        float64 ``A (m, n)``, ``G (n, r)`` and ``B (n, n)`` with n = m + r - 1, such that correlating d (n) with g (r)
        gives ``A @ ((G @ g) * (B @ d))``.
    """
    size = tile + kernel - 1
    if len(points) != size - 1 or len(set(points)) != size - 1:
        raise ValueError(f"{len(points)} points given, F({tile}, {kernel}) needs {size - 1} distinct ones")

    def evaluation(degree: int) -> list[list[Fraction]]:
        rows = [[point**power for power in range(degree)] for point in points]
        return [*rows, [Fraction(0)] * (degree - 1) + [Fraction(1)]]

    inverse = _inverse(evaluation(size))
    transform_in = [[inverse[row][column] for row in range(size)] for column in range(size)]
    a = np.array([[float(v) for v in row] for row in evaluation(tile)]).T
    g = np.array([[float(v) for v in row] for row in evaluation(kernel)])
    return a, g, np.array([[float(v) for v in row] for row in transform_in])


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    size = len(matrix)
    rows = [list(row) + [Fraction(int(i == j)) for j in range(size)] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column] != 0)
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column and rows[i][column] != 0:
                rows[i] = [v - rows[i][column] * p for v, p in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]


def apply_winograd(model: ir.Model) -> int:
    """Rewrite every convolution that gains from it. In place.

    Args:
        model: float32, with the static shapes of its values still attached. Its first input must have a symbolic first
            dimension.

    Returns:
        How many convolutions were rewritten.
    """
    graph = model.graph
    convolutions = [node for node in graph if _gains(node)]
    if convolutions:
        model.opset_imports[MS] = 1
        shared = _SharedConstants(graph, before=next(iter(graph)))
        for number, node in enumerate(convolutions):
            _rewrite(graph, node, shared, number)
    return len(convolutions)


def _gains(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return False
    image, weight = node.inputs[0], node.inputs[1]
    if image is None or weight is None or weight.const_value is None or weight.shape is None or image.shape is None:
        return False
    attributes = node.attributes
    plain = (
        tuple(attributes.get_ints("strides", (1, 1))) == (1, 1)
        and tuple(attributes.get_ints("pads", (0, 0, 0, 0))) == (1, 1, 1, 1)
        and tuple(attributes.get_ints("dilations", (1, 1))) == (1, 1)
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )
    out_channels, in_channels, *kernel = fixed_shape(weight.const_value)
    height, width = image.shape[2], image.shape[3]
    if not plain or kernel != [KERNEL, KERNEL] or not isinstance(height, int) or not isinstance(width, int):
        return False
    whole = height % TILE == 0 and width % TILE == 0
    enough = min(in_channels, out_channels) >= MIN_CHANNELS and height * width >= MIN_TILES * TILE**2
    return whole and enough


def band_rows(rows: int, bytes_per_row: int) -> list[int]:
    """Split rows of tiles into as few bands as :data:`MAX_BAND_BYTES` allows, of nearly equal heights."""
    count = min(rows, max(1, math.ceil(rows * bytes_per_row / MAX_BAND_BYTES)))
    return [(i + 1) * rows // count - i * rows // count for i in range(count)]


class _SharedConstants:
    """Matrices that all rewritten convolutions of a graph use."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        a, g, b = winograd_matrices()
        size = TILE + KERNEL - 1
        self.graph = graph
        self.out = self.constant("winograd.A", np.kron(a, a).astype(np.float32))  # (16, 36)
        # A one that no engine can know before the run: with it the transforms of constant weights are not folded into
        # constants four times their size, and the tile transform is not moved to a blocked layout and back.
        first = graph.inputs[0]
        shape = ir.node("Shape", [first], {"start": 0, "end": 1}, name="winograd/Shape")
        sign = ir.node("Sign", [shape.outputs[0]], name="winograd/Sign")
        one = ir.node("Cast", [sign.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="winograd/Cast")
        kernels = self.constant("winograd.G", np.kron(g, g).astype(np.float32))  # (36, 9)
        tiles = self.constant("winograd.B", np.kron(b, b).reshape(size**2, 1, size, size).astype(np.float32))
        times_g = ir.node("Mul", [kernels, one.outputs[0]], name="winograd/kernels")
        times_b = ir.node("Mul", [tiles, one.outputs[0]], name="winograd/tiles")
        graph.insert_before(before, [shape, sign, one, times_g, times_b])
        self.kernels, self.tiles = times_g.outputs[0], times_b.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return add_constant(self.graph, name, ir.tensor(array, name=name))

    def ints(self, *values: int) -> ir.Value:
        return self.constant("ints." + "_".join(str(v) for v in values), np.array(values, np.int64))


def _rewrite(graph: ir.Graph, conv: ir.Node, shared: _SharedConstants, number: int) -> None:
    image, weight = conv.inputs[0], conv.inputs[1]
    assert image is not None
    assert image.shape is not None
    assert weight is not None
    assert weight.const_value is not None
    out_channels, in_channels = fixed_shape(weight.const_value)[:2]
    height, width = image.shape[2], image.shape[3]
    assert isinstance(height, int)
    assert isinstance(width, int)
    columns, values = width // TILE, (TILE + KERNEL - 1) ** 2
    emit = NodeEmitter(graph, f"{conv.name or f'conv{number}'}/winograd")

    flat = add_constant(graph, f"{weight.name}.flat", _as_rows(weight.const_value))  # (C' C, 9)
    spread = emit("Gemm", shared.kernels, flat, transB=1)
    kernels = emit("Reshape", spread, shared.ints(1, values, out_channels, in_channels))

    def convolve(band: ir.Value, rows: int, edges: tuple[int, int]) -> ir.Value:
        """``rows`` rows of tiles of the result; ``edges`` says how many rows of zeros lie above and below the band."""
        # Each channel becomes an image of its own: (N, C, h, W) -> (C N, 1, h, W). Channels go first because the
        # product below takes its batch of 36 from behind them.
        height = rows * TILE + 2 - sum(edges)
        turned = emit("Transpose", band, perm=[1, 0, 2, 3])
        single = emit("Reshape", turned, shared.ints(-1, 1, height, width))
        cut = emit("Conv", single, shared.tiles, strides=[TILE, TILE], pads=[edges[0], 1, edges[1], 1])
        tiles = emit("Reshape", cut, shared.ints(in_channels, -1, values, rows * columns))  # (C, N, 36, T)
        products = emit("FusedMatMul", kernels, tiles, domain=MS, transBatchB=1)  # (N, 36, C', T)
        joined = emit("Reshape", products, shared.ints(0, values, -1))
        pixels = emit("MatMul", shared.out, joined)  # (N, 16, C' T)
        blocks = emit("Reshape", pixels, shared.ints(-1, TILE**2 * out_channels, rows, columns))
        return emit("DepthToSpace", blocks, blocksize=TILE, mode="DCR")

    bands = band_rows(height // TILE, values * columns * max(in_channels, out_channels) * 4)
    parts, start = [], 0
    for rows in bands:
        first, last = start == 0, start + rows == height // TILE
        band = image
        if len(bands) > 1:
            # A tile reads one row above and one below its output.
            begin, end = max(start * TILE - 1, 0), min((start + rows) * TILE + 1, height)
            band = emit("Slice", image, shared.ints(begin), shared.ints(end), shared.ints(2))
        parts.append(convolve(band, rows, (int(first), int(last))))
        start += rows
    result = parts[0] if len(parts) == 1 else emit("Concat", *parts, axis=2)
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is not None:
        result = emit("Add", result, emit("Reshape", bias, shared.ints(1, -1, 1, 1)))
    replace_node(graph, conv, emit.nodes, result)


def _as_rows(weight: ir.TensorProtocol) -> ir.TensorProtocol:
    """A weight tensor with the same bytes and the shape ``(C' C, 9)``."""
    out_channels, in_channels = fixed_shape(weight)[:2]
    shape = ir.Shape((out_channels * in_channels, KERNEL**2))
    name = f"{weight.name}.flat"
    if isinstance(weight, ir.ExternalTensor):
        return ir.ExternalTensor(
            weight.location,
            weight.offset,
            weight.length,
            weight.dtype,
            shape=shape,
            name=name,
            base_dir=weight.base_dir,
        )
    return ir.tensor(weight.numpy().reshape(-1, KERNEL**2), name=name)
