"""Passes over freshly translated graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.simplify import complete_types, drop_no_ops, fix_reshapes, fold_weight_layout, simplify
from tests.export.conftest import graph_from_text, operators, run

RANDOM = np.random.default_rng(0)


def test_weights_are_laid_out_as_they_are_used() -> None:
    weight = RANDOM.standard_normal((12, 4), dtype=np.float32)
    model = graph_from_text(
        """g (float[N, 4] x) => (float[N, 3] y) {
            a, b, c, d = Split <axis = 0, num_outputs = 4> (w)
            t = Transpose <perm = [1, 0]> (c)  u = Unsqueeze(t, axis)  s = Squeeze(u, axis)  y = MatMul(x, s)
        }""",
        {"w": weight, "axis": np.array([0])},
    )
    assert fold_weight_layout(model.graph) == 4
    assert operators(model) == ["MatMul"]
    x = RANDOM.standard_normal((2, 4), dtype=np.float32)
    np.testing.assert_allclose(run(model, x=x)[0], x @ weight[6:9].T, rtol=1e-5)


def test_a_weight_that_two_branches_use_stays_one() -> None:
    weight = RANDOM.standard_normal((4, 4), dtype=np.float32)
    model = graph_from_text(
        """g (float[N, 4] x) => (float[N, 4] y) {
            t = Transpose <perm = [1, 0]> (w)  a = MatMul(x, t)  u = Transpose <perm = [1, 0]> (w)  y = MatMul(a, u)
        }""",
        {"w": weight},
    )
    simplify(model)
    assert operators(model) == ["MatMul", "MatMul"]
    assert len(model.graph.initializers) == 1


def test_slices_of_weights_are_folded_but_not_backwards() -> None:
    weight = np.arange(12, dtype=np.float32)
    text = """g (float[4] x) => (float[4] y) { p = Slice(w, start, end, axis, step)  y = Add(x, p) }"""
    bounds = {"start": np.array([2]), "end": np.array([10]), "axis": np.array([0]), "step": np.array([2])}
    model = graph_from_text(text, {"w": weight, **bounds})
    assert fold_weight_layout(model.graph) == 1
    np.testing.assert_array_equal(run(model, x=np.zeros(4, np.float32))[0], [2, 4, 6, 8])

    backwards = {"start": np.array([9]), "end": np.array([1]), "axis": np.array([0]), "step": np.array([-2])}
    model = graph_from_text(text, {"w": weight, **backwards})
    assert fold_weight_layout(model.graph) == 0


def test_what_does_nothing_goes() -> None:
    model = graph_from_text(
        """g (float[N, 4] x) => (float[N, 4] y) {
            a = Div(x, one)  b = Mul(a, one)  c = Slice(b, zero, last, zero, step)  d = CastLike(c, x)
            e = Mul(d, two)  f = Slice(e, zero, three, step, step)  g = Slice(e, three, last, step, step)
            y = Concat <axis = 1> (f, g)
        }""",
        {
            "one": np.float32(1),
            "two": np.float32(2),
            "zero": np.array([0]),
            "step": np.array([1]),
            "three": np.array([3]),
            "last": np.array([np.iinfo(np.int64).max]),
        },
    )
    assert drop_no_ops(model.graph) == 4
    assert operators(model) == ["Mul", "Slice", "Slice", "Concat"]


def test_reshapes_get_constant_targets_where_shapes_are_known() -> None:
    model = graph_from_text(
        """g (float[N, 8, 6, 4] x) => (float[N, 8, 6, 4] y) {
            s = Shape(x)  flat = Reshape(x, target)  r = Relu(flat)  y = Reshape(r, s)
        }""",
        {"target": np.array([0, 2, -1])},
    )
    assert fix_reshapes(model.graph) == 1
    last = list(model.graph)[-1].inputs[1]
    assert last is not None
    assert last.const_value is not None
    # N stays in its place: 0 copies it.
    np.testing.assert_array_equal(last.const_value.numpy(), [0, 8, 6, 4])
    x = RANDOM.standard_normal((3, 8, 6, 4), dtype=np.float32)
    np.testing.assert_array_equal(run(model, x=x)[0], np.maximum(x, 0))


def test_reshapes_with_two_unknown_sizes_stay() -> None:
    model = graph_from_text(
        """g (float[1, 8, h, w] x, float[h, w, 8] like) => (float[h, w, 8] y) {
            t = Transpose <perm = [0, 2, 3, 1]> (x)  s = Shape(like)  y = Reshape(t, s)
        }"""
    )
    assert fix_reshapes(model.graph) == 0


def test_simplify_leaves_the_result_alone() -> None:
    weight = RANDOM.standard_normal((6, 4), dtype=np.float32)
    model = graph_from_text(
        """g (float[N, 4] x) => (float[N, 6] y) {
            t = Transpose <perm = [1, 0]> (w)  a = MatMul(x, t)  b = MatMul(x, t)  i = Identity(b)
            c = Add(a, i)  unread = Relu(c)  y = Mul(c, one)  z = Mul(y, one)
        }""",
        {"w": weight, "one": np.float32(1)},
    )
    x = RANDOM.standard_normal((2, 4), dtype=np.float32)
    expected = run(model, x=x)[0]
    simplify(model)
    # The two equal products are one now.
    assert operators(model)[:2] == ["MatMul", "Add"]
    np.testing.assert_allclose(run(model, x=x)[0], expected, rtol=1e-6)


def test_every_value_gets_a_dtype() -> None:
    model = graph_from_text("g (float[N, 4] x) => (float[N, 4] y) { a = Relu(x)  s = Shape(a)  y = Reshape(a, s) }")
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    complete_types(model)
    dtypes = [value.dtype for node in model.graph for value in node.outputs]
    assert dtypes == [ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.FLOAT]
