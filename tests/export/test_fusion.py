"""Attention as one operator of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from export.fusion import fuse_attention, fuse_for_ort_cpu
from tests.export.conftest import graph_from_text, operators, run

TOKENS, HEADS = 20, 4


def _attention(width: int, masked: bool = False, query_perm: str = "0, 2, 1, 3", merge_perm: str = "0, 2, 1, 3") -> str:
    mask, inputs = ("m = Add(s, bias)", f", float[{TOKENS}, {TOKENS}] bias") if masked else ("", "")
    dim = HEADS * width
    return f"""g (float[N, {TOKENS}, {dim}] q, float[N, {TOKENS}, {dim}] k, float[N, {TOKENS}, {dim}] v{inputs})
            => (float[N, {TOKENS}, {dim}] y) {{
        split = Constant <value = int64[4] {{0, {TOKENS}, {HEADS}, {width}}}> ()
        merge = Constant <value = int64[3] {{0, {TOKENS}, {dim}}}> ()
        q0 = Reshape(q, split)   q1 = Transpose <perm = [{query_perm}]> (q0)   q2 = Mul(q1, scale)
        k0 = Reshape(k, split)   k1 = Transpose <perm = [0, 2, 1, 3]> (k0)   k2 = Transpose <perm = [0, 1, 3, 2]> (k1)
        v0 = Reshape(v, split)   v1 = Transpose <perm = [0, 2, 1, 3]> (v0)
        s = MatMul(q2, k2)
        {mask}
        p = Softmax <axis = -1> ({"m" if masked else "s"})
        o = MatMul(p, v1)
        o1 = Transpose <perm = [{merge_perm}]> (o)
        y = Reshape(o1, merge)
    }}"""


def _inputs(width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal((2, TOKENS, HEADS * width), dtype=np.float32) for name in "qkv"}


def test_fuses_attention_and_keeps_its_result() -> None:
    model = graph_from_text(_attention(16), {"scale": np.float32(0.3)})
    expected = run(model, **_inputs(16))[0]
    counts = fuse_for_ort_cpu(model)
    assert (counts.attention, counts.winograd) == (1, 0)
    assert "1 attentions" in str(counts)
    assert operators(model) == ["MultiHeadAttention"]
    np.testing.assert_allclose(run(model, **_inputs(16))[0], expected, atol=1e-5)


def test_leaves_masked_attention() -> None:
    model = graph_from_text(_attention(16, masked=True), {"scale": np.float32(0.3)})
    assert fuse_attention(model) == 0


def test_leaves_wide_heads() -> None:
    model = graph_from_text(_attention(128), {"scale": np.float32(0.3)})
    assert fuse_attention(model) == 0


@pytest.mark.parametrize(
    "perms", [{"merge_perm": "0, 1, 2, 3"}, {"query_perm": "0, 2, 1, 3", "merge_perm": "0, 1, 3, 2"}]
)
def test_leaves_what_only_looks_like_attention(perms: dict[str, str]) -> None:
    model = graph_from_text(_attention(16, **perms), {"scale": np.float32(0.3)})
    assert fuse_attention(model) == 0
