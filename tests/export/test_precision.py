"""Which operations stay in float32, and that the others do not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.precision import RULES, HalfPrecision, to_mixed_precision
from export.rounding import make_rounding_explicit, to_single_precision
from tests.export.conftest import graph_from_text, run

RANDOM = np.random.default_rng(0)


def _weight(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def _dtypes(model: ir.Model) -> dict[str, str]:
    """Operator to the dtypes of its first outputs, without the casts that were added."""
    found: dict[str, set[str]] = {}
    for node in model.graph:
        if not (node.name or "").endswith("/precision"):
            dtype = node.outputs[0].dtype
            assert dtype is not None
            found.setdefault(node.op_type, set()).add(dtype.name)
    return {op_type: "+".join(sorted(names)) for op_type, names in found.items()}


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 3e-3), ("bf16", 3e-2)])
def test_products_are_half_and_outputs_are_not(precision: HalfPrecision, bound: float) -> None:
    model = graph_from_text(
        """g (float[N, 32] x) => (float[N, 8] y) {
            a = MatMul(x, w1)  b = Add(a, b1)  c = Relu(b)  d = MatMul(c, w2)  e = Relu(d)  y = MatMul(e, w3)
        }""",
        {"w1": _weight(32, 64), "b1": _weight(64), "w2": _weight(64, 64), "w3": _weight(64, 8)},
    )
    x = RANDOM.standard_normal((5, 32), dtype=np.float32)
    expected = run(model, x=x)[0]
    report = to_mixed_precision(model, precision=precision)
    assert report.half == {"MatMul": 2, "Add": 1, "Relu": 2}
    assert report.to_dict()[precision] == report.half
    assert report.kept == {"decisions": 1}
    # One cast for the input, one for the product that makes the output.
    assert report.casts == 2
    make_rounding_explicit(model)  # ONNX Runtime on CPU has no bf16 products
    found = run(model, x=x)[0]
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert bound / 100 < error < bound  # about 2^-11 or 2^-8, three times in a row


def test_bfloat16_keeps_the_range_of_single_precision() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w)  b = MatMul(a, v)  y = MatMul(b, v) }"
    weights = {"w": np.full((4, 4), 1e6, np.float32), "v": _weight(4, 4)}
    model = graph_from_text(text, weights)
    expected = run(model, x=np.ones((1, 4), np.float32))[0]
    assert to_mixed_precision(model, precision="bf16").half == {"MatMul": 2}
    make_rounding_explicit(model)
    np.testing.assert_allclose(run(model, x=np.ones((1, 4), np.float32))[0], expected, rtol=0.1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_can_be_undone(precision: HalfPrecision) -> None:
    text = "g (float[N, 32] x) => (float[N, 8] y) { a = MatMul(x, w1)  b = Relu(a)  y = MatMul(b, w2) }"
    model = graph_from_text(text, {"w1": _weight(32, 64), "w2": _weight(64, 8)})
    x = RANDOM.standard_normal((5, 32), dtype=np.float32)
    expected = run(model, x=x)[0]
    to_mixed_precision(model, precision=precision)
    assert to_single_precision(model) > 0
    assert set(_dtypes(model).values()) == {"FLOAT"}
    np.testing.assert_allclose(run(model, x=x)[0], expected, atol=0.05)


@pytest.mark.parametrize("operator", ["Softmax <axis = -1>", "LayerNormalization", "Exp"])
def test_sensitive_functions_stay_whole_and_go_back_to_half(operator: str) -> None:
    extra = ", ones" if operator == "LayerNormalization" else ""
    name = operator.split(" ")[0]
    model = graph_from_text(
        f"""g (float[N, 32] x) => (float[N, 8] y) {{
            a = MatMul(x, w1)  b = {operator} (a{extra})  c = Mul(b, half)  d = MatMul(c, w1)  y = MatMul(d, w3)
        }}""",
        {"w1": _weight(32, 32), "w3": _weight(32, 8), "half": np.float32(0.5), "ones": np.ones(32, np.float32)},
    )
    to_mixed_precision(model)
    assert _dtypes(model) == {"MatMul": "FLOAT+FLOAT16", name: "FLOAT", "Mul": "FLOAT16"}


def test_sampling_coordinates_stay_whole() -> None:
    model = graph_from_text(
        """g (float[1, 16, 9, 9] image, float[1, 6, 4, 8] query) => (float[1, 16, 6, 4] y) {
            f = Conv(image, wf)
            o = MatMul(query, wo)  p = Tanh(o)  q = Mul(p, two)
            y = GridSample <align_corners = 0, mode = "linear", padding_mode = "zeros"> (f, q)
        }""",
        {"wf": _weight(16, 16, 1, 1), "wo": _weight(8, 2), "two": np.float32(2.0)},
    )
    report = to_mixed_precision(model)
    assert report.kept == {"sampling": 4}
    assert report.half == {"Conv": 1}


def test_masks_are_counted_whole() -> None:
    model = graph_from_text(
        """g (float[1, 4, 8] q, float[1, 8, 90000] f) => (float[1, 4, 8] y) {
            logits = MatMul(q, f)  mask = Greater(logits, zero)  m = Cast <to = 1> (mask)
            area = ReduceSum <keepdims = 1> (m, axis)  ft = Transpose <perm = [0, 2, 1]> (f)
            pooled = MatMul(m, ft)  y = Div(pooled, area)
        }""",
        {"zero": np.float32(0), "axis": np.array([2])},
    )
    q = RANDOM.standard_normal((1, 4, 8), dtype=np.float32)
    f = RANDOM.standard_normal((1, 8, 90000), dtype=np.float32)
    expected = run(model, q=q, f=f)[0]
    to_mixed_precision(model)
    np.testing.assert_allclose(run(model, q=q, f=f)[0], expected, rtol=1e-4)


def test_resize_matrices_stay_whole() -> None:
    model = graph_from_text(
        """g (float[N, 3, h, 32] x) => (float[N, 16, h, 8] y) {
            count = Constant <value = float[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
            start = Constant <value = float {0}> ()  stop = Constant <value = float {32}> ()
            step = Constant <value = float {1}> ()  r = Range(start, stop, step)
            axis = Constant <value = int64[1] {1}> ()  column = Unsqueeze(r, axis)
            matrix = Sub(column, count)  resized = MatMul(x, matrix)  c = Conv(resized, w)
            s = Sigmoid(c)  y = Conv(s, w2)
        }""",
        {"w": _weight(16, 3, 1, 1), "w2": _weight(16, 16, 1, 1)},
    )
    to_mixed_precision(model)
    dtypes = _dtypes(model)
    assert (dtypes["Sub"], dtypes["MatMul"]) == ("FLOAT", "FLOAT")
    assert (dtypes["Conv"], dtypes["Sigmoid"]) == ("FLOAT+FLOAT16", "FLOAT16")


def test_weights_beyond_half_stay_whole() -> None:
    model = graph_from_text(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w)  b = MatMul(a, v)  y = MatMul(b, v) }",
        {"w": np.full((4, 4), 1e6, np.float32), "v": _weight(4, 4)},
    )
    assert to_mixed_precision(model).half == {"MatMul": 1}
    assert np.isfinite(run(model, x=np.full((1, 4), 1e-6, np.float32))[0]).all()


def test_rules_have_names_and_reasons() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(len(rule.reason) > 20 for rule in RULES)
