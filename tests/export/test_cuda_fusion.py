"""Operators of ONNX Runtime's CUDA provider: put in where they belong, and meaning what the graph meant.

The CUDA kernels run nowhere here. What each operator means is written down by ``write_out_fusions``; that is compared
with numpy below, from ONNX Runtime's own description of the operators, and with the graph before fusion.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from export.cuda_fusion import SPLIT_GELU_WIDTHS, fuse_for_ort_cuda
from export.fused_operators import write_out_fusions
from export.precision import node_blocks, to_mixed_precision
from tests.export.conftest import graph_from_text, operators, run
from tests.export.test_fusion import _attention, _inputs

RANDOM = np.random.default_rng(0)


def _normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def written_out(model: ir.Model) -> ir.Model:
    copy = model.clone()
    assert write_out_fusions(copy) > 0
    return copy


GROUPS, CHANNELS = 4, 16


def _group_norm_graph(
    silu: bool = False, groups: int = GROUPS, scale: str = "ones"
) -> tuple[str, dict[str, np.ndarray]]:
    tail = "s = Sigmoid(d)  y = Mul(d, s)" if silu else "y = Identity(d)"
    text = f"""g (float[N, {CHANNELS}, 6, 10] x) => (float[N, {CHANNELS}, 6, 10] y) {{
        a = Reshape(x, split)  b = InstanceNormalization <epsilon = 1e-3> ({"a, " + scale}, zeros)
        c = Reshape(b, back)  e = Mul(c, weight)  d = Add(e, bias)  {tail}
    }}"""
    weights = {
        "split": np.array([0, groups, -1]),
        "back": np.array([-1, CHANNELS, 6, 10]),
        "ones": np.ones(groups, np.float32),
        "twos": np.full(groups, 2, np.float32),
        "zeros": np.zeros(groups, np.float32),
        "weight": _normal(CHANNELS, 1, 1),
        "bias": _normal(CHANNELS, 1, 1),
    }
    used = {name: array for name, array in weights.items() if name not in ("ones", "twos") or name == scale}
    return text, used


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(silu: bool) -> None:
    model = graph_from_text(*_group_norm_graph(silu))
    x = 3 * _normal(2, CHANNELS, 6, 10) + 1
    expected = run(model.clone(), x=x)[0]
    counts = fuse_for_ort_cuda(model)
    assert (counts.group_norm, counts.group_norm_silu) == (1, int(silu))
    assert operators(model)[:3] == ["Transpose", "GroupNorm", "Transpose"]
    node = next(node for node in model.graph if node.op_type == "GroupNorm")
    assert {name: node.attributes.get_int(name) for name in ("groups", "activation", "channels_last")} == {
        "groups": GROUPS,
        "activation": int(silu),
        "channels_last": 1,
    }
    assert node.attributes.get_float("epsilon") == pytest.approx(1e-3)
    np.testing.assert_allclose(run(written_out(model), x=x)[0], expected, atol=2e-6)


def test_group_norm_means_what_onnxruntime_says() -> None:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta over groups, channels last; then SiLU."""
    model = graph_from_text(*_group_norm_graph(silu=True))
    fuse_for_ort_cuda(model)
    node = next(node for node in model.graph if node.op_type == "GroupNorm")
    gamma, beta = (value.const_value.numpy() for value in node.inputs[1:])  # type: ignore[union-attr]
    assert gamma.dtype == beta.dtype == np.float32
    assert gamma.shape == beta.shape == (CHANNELS,)
    x = _normal(2, CHANNELS, 6, 10)
    last = x.transpose(0, 2, 3, 1).astype(np.float64).reshape(2, 60, GROUPS, -1)
    mean, variance = last.mean(axis=(1, 3), keepdims=True), last.var(axis=(1, 3), keepdims=True)
    normed = ((last - mean) / np.sqrt(variance + 1e-3)).reshape(2, 6, 10, CHANNELS) * gamma + beta
    expected = (normed / (1 + np.exp(-normed))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(run(written_out(model), x=x)[0], expected, atol=5e-6)


def test_group_norm_stays_in_fp16_with_weights_in_float32() -> None:
    text, weights = _group_norm_graph()
    text = text.replace("x) =>", "x0) =>").replace("a = Reshape(x, split)", "x = Conv(x0, w)  a = Reshape(x, split)")
    text = text.replace("y = Identity(d)", "y = Conv(d, w)")
    model = graph_from_text(text, weights | {"w": _normal(CHANNELS, CHANNELS, 1, 1) / 4})
    x = _normal(2, CHANNELS, 6, 10)
    expected = run(model.clone(), x0=x)[0]
    fuse_for_ort_cuda(model)
    to_mixed_precision(model)
    node = next(node for node in model.graph if node.op_type == "GroupNorm")
    dtypes = [value.dtype for value in (*node.inputs, *node.outputs) if value is not None]
    assert dtypes == [ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.FLOAT16]
    found = run(written_out(model), x0=x)[0]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def _convolution(channels: int, out: int, attributes: str = "pads = [1, 1, 1, 1], strides = [2, 1]") -> ir.Model:
    text = f"""g (float[N, {channels}, 9, 10] x) => (float[N, {out}, oh, ow] y)
        {{ y = Conv <{attributes}> (x, layer.block.weight, bias) }}"""
    text = text.replace("layer.block.weight", "weight")
    model = graph_from_text(text, {"weight": _normal(out, channels, 3, 3), "bias": _normal(out)})
    model.graph.initializers["weight"].name = "layer.block.weight"
    return model


def test_convolution() -> None:
    model = _convolution(16, 24)
    x = _normal(2, 16, 9, 10)
    expected = run(model.clone(), x=x)[0]
    blocks = set(node_blocks(model.graph).values())
    assert fuse_for_ort_cuda(model).convolution == 1
    assert operators(model) == ["Transpose", "NhwcConv", "Transpose"]
    node = next(node for node in model.graph if node.op_type == "NhwcConv")
    assert node.inputs[1] is not None
    assert node.inputs[1].shape == (24, 3, 3, 16)
    assert node.attributes.get_ints("pads") == (1, 1, 1, 1)
    assert node_blocks(model.graph)[id(node)] in blocks
    np.testing.assert_allclose(run(written_out(model), x=x)[0], expected, atol=1e-4)


def test_convolution_stays_in_fp16_between_its_transposes() -> None:
    text = """g (float[N, 16, 9, 10] x) => (float[N, 16, 9, 10] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, weight)  y = Conv <pads = [1, 1, 1, 1]> (a, weight)
    }"""
    model = graph_from_text(text, {"weight": _normal(16, 16, 3, 3) / 12})
    x = _normal(2, 16, 9, 10)
    expected = run(model.clone(), x=x)[0]
    fuse_for_ort_cuda(model)
    assert to_mixed_precision(model).half["NhwcConv"] == 1  # of two: what leaves the graph is in float32
    found = run(written_out(model), x=x)[0]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("channels", "out", "attributes"),
    [(4, 24, "pads = [1, 1, 1, 1]"), (16, 20, "pads = [1, 1, 1, 1]")],
)
def test_leaves_convolutions_that_tensor_cores_do_not_take(channels: int, out: int, attributes: str) -> None:
    model = _convolution(channels, out, attributes)
    assert fuse_for_ort_cuda(model).convolution == 0
    assert operators(model) == ["Conv"]


def test_leaves_convolutions_of_groups_and_of_computed_weights() -> None:
    text = "g (float[N, 16, 9, 10] x, float[16, 16, 3, 3] w) => (float[N, 16, oh, ow] y) "
    grouped = graph_from_text(
        text + "{ a = Conv <group = 2> (x, v)  b = Conv (x, w)  y = Add(a, b) }", {"v": _normal(16, 8, 3, 3)}
    )
    assert fuse_for_ort_cuda(grouped).convolution == 0


def test_argmax_gets_floats() -> None:
    model = graph_from_text("g (int64[L, 7] t) => (int64[L] y) { y = ArgMax <axis = 1, keepdims = 0> (t) }")
    tokens = RANDOM.integers(0, 49408, (5, 7))
    tokens[:, 3] = 49407
    fuse_for_ort_cuda(model)
    assert operators(model) == ["Cast", "ArgMax"]
    assert run(model, t=tokens)[0].tolist() == [3] * 5


def test_a_size_to_divide_by_is_made_where_it_is_wanted() -> None:
    """The one that Range counts to stays on the CPU; no other operator may read it."""
    text = """g (float[N, 3] x) => (float[N] y) {
        shape = Shape <start = 0, end = 1> (x)  count = Squeeze(shape)  limit = Cast <to = 1> (count)
        early = Range(zero, one, one)  other = Div(early, limit)
        numbers = Range(zero, limit, one)  shifted = Add(numbers, half)  share = Div(shifted, limit)
        y = Add(share, other)
    }"""
    constants = {"zero": np.float32(0), "one": np.float32(1), "half": np.float32(0.5)}
    model = graph_from_text(text, {name: np.array(value) for name, value in constants.items()})
    x = _normal(9, 3)
    expected = run(model.clone(), x=x)[0]
    fuse_for_ort_cuda(model)
    limit = next(node for node in model.graph if node.op_type == "Cast").outputs[0]
    assert [use.node.op_type for use in limit.uses()] == ["Range"]
    np.testing.assert_array_equal(run(model, x=x)[0], expected)


@pytest.mark.parametrize("change", [{"groups": 16}, {"scale": "twos"}])
def test_leaves_what_the_kernel_does_not_do(change: dict) -> None:  # type: ignore[type-arg]
    """One channel a group, or a scale inside of the normalisation."""
    model = graph_from_text(*_group_norm_graph(**change))
    assert fuse_for_ort_cuda(model).group_norm == 0


def test_attention() -> None:
    for width, fused in ((16, 1), (128, 1), (512, 0)):
        model = graph_from_text(_attention(width), {"scale": np.float32(0.3)})
        expected = run(model.clone(), **_inputs(width))[0]
        assert fuse_for_ort_cuda(model).attention == fused
        np.testing.assert_allclose(run(model, **_inputs(width))[0], expected, atol=1e-5)


def _residual(readers: str) -> ir.Model:
    return graph_from_text(
        f"""g (float[N, 7, 16] x, float[N, 7, 16] r) => (float[N, 7, 16] y) {{
            a = MatMul(x, w)  s = Add(a, r)  n = LayerNormalization <epsilon = 1e-4> (s, gamma, beta)
            m = MatMul(n, w)  {readers}
        }}""",
        {"w": _normal(16, 16) / 4, "gamma": _normal(16), "beta": _normal(16)},
    )


@pytest.mark.parametrize("readers", ["y = Add(m, s)", "y = Relu(m)"])
def test_residual_sum_and_norm(readers: str) -> None:
    """Whether the sum has other readers or not."""
    model = _residual(readers)
    inputs = {"x": _normal(2, 7, 16), "r": _normal(2, 7, 16)}
    expected = run(model.clone(), **inputs)[0]
    assert fuse_for_ort_cuda(model).skip_layer_norm == 1
    assert operators(model)[1] == "SkipLayerNormalization"
    np.testing.assert_allclose(run(model, **inputs)[0], expected, atol=1e-5)
    to_mixed_precision(model)
    found = run(written_out(model), **inputs)[0]
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_a_sum_with_a_constant_is_no_residual() -> None:
    model = graph_from_text(
        """g (float[N, 7, 16] x) => (float[N, 7, 16] y) {
            s = Add(x, position)  n = LayerNormalization(s, gamma, beta)  y = MatMul(n, w)
        }""",
        {"position": _normal(1, 7, 16), "w": _normal(16, 16), "gamma": _normal(16), "beta": _normal(16)},
    )
    assert fuse_for_ort_cuda(model).skip_layer_norm == 0


@pytest.mark.parametrize(("body", "alpha"), [("m = Mul(x, k)  s = Sigmoid(m)", 1.702), ("s = Sigmoid(x)", 1.0)])
def test_quick_gelu(body: str, alpha: float) -> None:
    weights = {"k": np.array(1.702, np.float32)} if "k" in body else {}
    model = graph_from_text(f"g (float[N, 8] x) => (float[N, 8] y) {{ {body}  y = Mul(x, s) }}", weights)
    assert fuse_for_ort_cuda(model).quick_gelu == 1
    assert operators(model) == ["QuickGelu"]
    x = 3 * _normal(5, 8)
    np.testing.assert_allclose(run(model, x=x)[0], x / (1 + np.exp(-alpha * x.astype(np.float64))), atol=1e-5)


def test_a_gate_of_something_else_is_no_gelu() -> None:
    model = graph_from_text("g (float[N, 8] x, float[N, 8] z) => (float[N, 8] y) { s = Sigmoid(z)  y = Mul(x, s) }")
    assert fuse_for_ort_cuda(model).quick_gelu == 0


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_bias_gelu() -> None:
    model = graph_from_text(
        "g (float[N, 3, 8] x) => (float[N, 3, 8] y) { a = MatMul(x, w)  s = Add(a, b)  y = Gelu(s) }",
        {"w": _normal(8, 8), "b": _normal(8)},
    )
    x = _normal(2, 3, 8)
    expected = run(model.clone(), x=x)[0]
    assert fuse_for_ort_cuda(model).bias_gelu == 1
    assert operators(model) == ["MatMul", "BiasGelu"]
    np.testing.assert_allclose(run(model, x=x)[0], expected, atol=1e-5)


def _gated(width: int) -> ir.Model:
    return graph_from_text(
        f"""g (float[N, 2, 4] x) => (float[N, 2, {width // 2}] y) {{
            a = MatMul(x, w)  s = Add(a, b)  l, r = Split <axis = 2, num_outputs = 2> (s)  e = Gelu(r)  y = Mul(l, e)
        }}""",
        {"w": _normal(4, width), "b": _normal(width)},
    )


def test_gated_gelu_of_stable_diffusion() -> None:
    width = min(SPLIT_GELU_WIDTHS)
    model = _gated(width)
    x = _normal(1, 2, 4)
    expected = run(model.clone(), x=x)[0]
    counts = fuse_for_ort_cuda(model)
    assert (counts.bias_split_gelu, counts.bias_gelu) == (1, 0)
    assert operators(model) == ["MatMul", "BiasSplitGelu"]
    weight, bias = (value.const_value.numpy() for value in model.graph.initializers.values())  # type: ignore[union-attr]
    product = x.astype(np.float64) @ weight.astype(np.float64) + bias
    by_hand = product[..., : width // 2] * _gelu(product[..., width // 2 :])
    found = run(written_out(model), x=x)[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found, by_hand, atol=2e-5)


def test_gated_gelu_of_a_width_without_kernel_is_left() -> None:
    model = _gated(24)
    assert fuse_for_ort_cuda(model).bias_split_gelu == 0


def test_counts_are_told() -> None:
    text = str(fuse_for_ort_cuda(graph_from_text(*_group_norm_graph(silu=True))))
    assert "1 group norms (1 with SiLU)" in text
