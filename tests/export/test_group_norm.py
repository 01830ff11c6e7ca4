"""GroupNorm whose sums round well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.cuda_fusion import fuse_for_ort_cuda
from export.graph_editing import remove_unread
from export.group_norm import MIN_GROUP_VALUES, apply_precise_group_norm, restore_group_norm
from tests.export.conftest import graph_from_text, operators, run

GROUPS, CHANNELS = 2, 8


def _group_norm(side: int) -> ir.Model:
    """As the exporter writes it: InstanceNormalization over groups, then a factor and a bias for each channel."""
    random = np.random.default_rng(0)
    weights = {
        "one": np.ones(GROUPS, np.float32),
        "zero": np.zeros(GROUPS, np.float32),
        "weight": random.uniform(0.5, 2.0, (CHANNELS, 1, 1)).astype(np.float32),
        "bias": random.standard_normal((CHANNELS, 1, 1)).astype(np.float32),
        "grouped": np.array([0, GROUPS, -1], np.int64),
        "whole": np.array([0, CHANNELS, side, side], np.int64),
    }
    tensor = f"float[N, {CHANNELS}, {side}, {side}]"
    text = f"""g ({tensor} x) => ({tensor} y) {{
        groups = Reshape(x, grouped)
        normed = InstanceNormalization <epsilon = 1e-6> (groups, one, zero)
        restored = Reshape(normed, whole)
        scaled = Mul(restored, weight)
        y = Add(scaled, bias)
    }}"""
    return graph_from_text(text, weights)


def _exact(x: np.ndarray, model: ir.Model) -> np.ndarray:
    weight, bias = (model.graph.initializers[name].const_value.numpy() for name in ("weight", "bias"))  # type: ignore[union-attr]
    values = x.astype(np.float64).reshape(len(x), GROUPS, -1)
    normed = (values - values.mean(2, keepdims=True)) / np.sqrt(values.var(2, keepdims=True) + 1e-6)
    result: np.ndarray = normed.reshape(x.shape) * weight + bias
    return result


@pytest.mark.parametrize("images", [1, 2])
def test_rounds_better_than_the_operator_it_replaces(images: int) -> None:
    side = 256
    x = np.random.default_rng(1).standard_normal((images, CHANNELS, side, side), dtype=np.float32) * 3 + 5
    model = _group_norm(side)
    exact = _exact(x, model)
    plain = np.abs(run(model, x=x)[0] - exact).max()
    assert apply_precise_group_norm(model) == 1
    remove_unread(model.graph)
    assert "InstanceNormalization" not in operators(model)
    precise = np.abs(run(model, x=x)[0] - exact).max()
    assert precise < 1e-5
    # One accumulator for 262,144 values is what this is about.
    assert plain > 2 * precise


def test_equals_the_operator_for_constant_channels() -> None:
    """A group without variance gives the bias, not a division by zero."""
    side = 256
    model = _group_norm(side)
    apply_precise_group_norm(model)
    found = run(model, x=np.full((1, CHANNELS, side, side), 7.25, np.float32))[0]
    bias = model.graph.initializers["bias"].const_value
    assert bias is not None
    np.testing.assert_allclose(found, np.broadcast_to(bias.numpy(), found.shape), atol=1e-4)


def test_leaves_small_groups() -> None:
    model = _group_norm(16)
    assert CHANNELS // GROUPS * 16 * 16 < MIN_GROUP_VALUES
    assert apply_precise_group_norm(model) == 0


def test_leaves_a_norm_whose_parts_are_read_elsewhere() -> None:
    model = _group_norm(256)
    normed = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    reader = ir.node("Neg", [normed.outputs[0]], name="reader")
    model.graph.append(reader)
    assert apply_precise_group_norm(model) == 0
    assert "InstanceNormalization" in operators(model)


def test_precise_steps_can_be_undone_after_a_round_trip_through_a_file(tmp_path: Path) -> None:
    """Engines with a GroupNorm of their own look for the operator."""
    side = 256
    x = np.random.default_rng(1).standard_normal((2, CHANNELS, side, side), dtype=np.float32) * 3 + 5
    model = _group_norm(side)
    before, expected = operators(model), run(model.clone(), x=x)[0]
    for node in model.graph:
        node.name = f"net/{node.op_type}"
    assert apply_precise_group_norm(model) == 1
    ir.save(model, tmp_path / "precise.onnx")
    restored = ir.load(tmp_path / "precise.onnx")
    assert restore_group_norm(restored) == 1
    assert operators(restored) == [*before[:2], "Shape", *before[2:]]
    np.testing.assert_allclose(run(restored, x=x)[0], expected, atol=1e-6)
    assert fuse_for_ort_cuda(restored).group_norm == 1
    assert restore_group_norm(restored) == 0
