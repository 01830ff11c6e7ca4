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


@pytest.mark.parametrize(
    "operator",
    [
        *("Softmax <axis = -1>", "LogSoftmax <axis = -1>", "LayerNormalization", "ReduceMean", "ReduceSum", "ReduceL2"),
        *("Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Sin", "Cos", "Erf"),
    ],
)
def test_sensitive_functions_stay_whole_and_go_back_to_half(operator: str) -> None:
    name = operator.split(" ")[0]
    extra = ", ones" if name in ("LayerNormalization", "Pow") else ", axis" if name.startswith("Reduce") else ""
    model = graph_from_text(
        f"""g (float[N, 32] x) => (float[N, 8] y) {{
            a = MatMul(x, w1)  b = {operator} (a{extra})  c = Mul(b, half)  d = MatMul(c, w1)  y = MatMul(d, w3)
        }}""",
        {
            "w1": _weight(32, 32),
            "w3": _weight(32, 8),
            "half": np.full(32, 0.5, np.float32),
            "ones": np.ones(32, np.float32),
            "axis": np.array([1]),
        },
    )
    to_mixed_precision(model)
    assert _dtypes(model) == {"MatMul": "FLOAT+FLOAT16", name: "FLOAT", "Mul": "FLOAT16"}


def test_statistics_of_channels_stay_whole_and_go_back_to_half() -> None:
    model = graph_from_text(
        """g (float[N, 4, 9, 9] x) => (float[N, 4, 9, 9] y) {
            a = Conv(x, w)  b = InstanceNormalization(a, ones, ones)  c = Relu(b)  d = Conv(c, w)  y = Conv(d, w)
        }""",
        {"w": _weight(4, 4, 1, 1), "ones": np.ones(4, np.float32)},
    )
    to_mixed_precision(model)
    assert _dtypes(model) == {"Conv": "FLOAT+FLOAT16", "InstanceNormalization": "FLOAT", "Relu": "FLOAT16"}


def test_light_nodes_need_all_of_their_data_in_half() -> None:
    model = graph_from_text(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w)  b = Add(a, x)  c = MatMul(b, w)  y = MatMul(c, w) }",
        {"w": _weight(4, 4)},
    )
    to_mixed_precision(model)
    assert _dtypes(model) == {"MatMul": "FLOAT+FLOAT16", "Add": "FLOAT"}


def test_light_nodes_need_all_of_their_constants_within_half() -> None:
    model = graph_from_text(
        """g (float[N, 4] x) => (float[N, 4] y) {
            a = MatMul(x, w)  b = Clip(a, low, high)  c = MatMul(b, w)  y = MatMul(c, w)
        }""",
        {"w": _weight(4, 4), "low": np.float32(0), "high": np.float32(1e6)},
    )
    to_mixed_precision(model)
    assert _dtypes(model) == {"MatMul": "FLOAT+FLOAT16", "Clip": "FLOAT"}


def test_scales_of_a_resize_stay_whole() -> None:
    model = graph_from_text(
        """g (float[N, 4, 9, 9] x) => (float[N, 4, 18, 18] y) {
            a = Conv(x, w)  b = Resize <mode = "linear"> (a, , scales)  c = Conv(b, w)  y = Conv(c, w)
        }""",
        {"w": _weight(4, 4, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)},
    )
    assert to_mixed_precision(model).half == {"Conv": 2, "Resize": 1}
    assert run(model, x=np.ones((1, 4, 9, 9), np.float32))[0].shape == (1, 4, 18, 18)


def test_sampling_coordinates_stay_whole() -> None:
    model = graph_from_text(
        """g (float[1, 16, 9, 9] image, float[1, 6, 4, 8] query) => (float[1, 16, 6, 4] y) {
            f = Conv(image, wf)
            o = MatMul(query, wo)  p = Tanh(o)  q = Mul(p, two)
            s = GridSample <align_corners = 0, mode = "linear", padding_mode = "zeros"> (f, q)
            r = Relu(s)  y = Conv(r, wf)
        }""",
        {"wf": _weight(16, 16, 1, 1), "wo": _weight(8, 2), "two": np.float32(2.0)},
    )
    report = to_mixed_precision(model)
    assert report.kept == {"sampling": 4, "decisions": 1}
    assert report.half == {"Conv": 1, "Relu": 1}  # what was sampled goes on in half precision


def test_what_is_compared_stays_whole() -> None:
    model = graph_from_text(
        """g (float[N, 4] x) => (float[N, 4] y) {
            logits = MatMul(x, w)  above = Greater(logits, zero)  s = Sigmoid(logits)  k = Where(above, s, zero)
            a = MatMul(k, w)  y = MatMul(a, w)
        }""",
        {"w": _weight(4, 4), "zero": np.float32(0)},
    )
    report = to_mixed_precision(model)
    assert report.kept == {"decisions": 3}
    assert report.half == {"MatMul": 1}  # neither a product that is compared nor what follows it


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
    report = to_mixed_precision(model)
    np.testing.assert_allclose(run(model, q=q, f=f)[0], expected, rtol=1e-4)
    assert _dtypes(model)["MatMul"] == "FLOAT"
    assert report.kept["masked sums"] == 2  # the Cast and the ReduceSum; the product leaves the graph


def test_light_nodes_behind_masked_sums_stay_whole() -> None:
    """An area need not fit into half precision, nor half of it."""
    model = graph_from_text(
        """g (float[1, 4, 90000] x) => (float[1, 4, 8] y, float[1, 4, 8] z) {
            mask = Greater(x, zero)  m = Cast <to = 1> (mask)  area = ReduceSum <keepdims = 1> (m, axis)
            half_area = Mul(area, half)  a = MatMul(half_area, w1)  y = MatMul(a, w2)
            pooled = MatMul(m, f)  half_pooled = Mul(pooled, half)  b = MatMul(half_pooled, w2)  z = MatMul(b, w2)
        }""",
        {
            "zero": np.float32(0),
            "half": np.float32(0.5),
            "axis": np.array([2]),
            "w1": _weight(1, 8),
            "w2": _weight(8, 8),
            "f": _weight(90000, 8),
        },
    )
    assert to_mixed_precision(model).kept["masked sums"] == 3
    assert _dtypes(model) == {
        "Greater": "BOOL", "Cast": "FLOAT", "ReduceSum": "FLOAT", "Mul": "FLOAT", "MatMul": "FLOAT+FLOAT16",
    }  # fmt: skip


@pytest.mark.parametrize("size", ["Constant <value = float {32}> ()", "Cast <to = 1> (width)"])
def test_resize_matrices_stay_whole(size: str) -> None:
    model = graph_from_text(
        f"""g (float[N, 3, h, 32] x) => (float[N, 16, h, 8] y) {{
            count = Constant <value = float[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
            start = Constant <value = float {{0}}> ()  shape = Shape <start = 3> (x)
            width = Squeeze(shape)  stop = {size}
            step = Constant <value = float {{1}}> ()  r = Range(start, stop, step)
            axis = Constant <value = int64[1] {{1}}> ()  column = Unsqueeze(r, axis)
            matrix = Sub(column, count)  resized = MatMul(x, matrix)
            bounded = Relu(resized)  c = Conv(bounded, w)
            s = Sigmoid(c)  y = Conv(s, w2)
        }}""",
        {"w": _weight(16, 3, 1, 1), "w2": _weight(16, 16, 1, 1)},
    )
    to_mixed_precision(model)
    dtypes = _dtypes(model)
    assert (dtypes["Sub"], dtypes["MatMul"], dtypes["Relu"]) == ("FLOAT", "FLOAT", "FLOAT")
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
