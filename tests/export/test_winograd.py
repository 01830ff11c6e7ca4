"""Winograd products equal the convolutions they replace."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export import winograd
from export.weight_store import WeightStore, save_graph
from export.winograd import apply_winograd, band_rows, winograd_matrices
from tests.export.conftest import graph_from_text, operators, run


def _convolution(channels: int, out: int, height: int, width: int, attributes: str = "pads = [1, 1, 1, 1]") -> ir.Model:
    random = np.random.default_rng(0)
    weight = (random.standard_normal((out, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)
    bias = random.standard_normal(out).astype(np.float32)
    text = f"""g (float[N, {channels}, {height}, {width}] x) => (float[N, {out}, a, b] y) {{
        y = Conv <{attributes}> (x, w, b)
    }}"""
    return graph_from_text(text, {"w": weight, "b": bias})


@pytest.mark.parametrize(("tile", "points"), [(2, (0, 1, -1)), (4, (0, 1, -1, 2, -2))])
def test_matrices_make_correlations(tile: int, points: tuple[int, ...]) -> None:
    a, g, b = winograd_matrices([Fraction(p) for p in points], tile=tile, kernel=3)
    random = np.random.default_rng(1)
    data, taps = random.standard_normal(tile + 2), random.standard_normal(3)
    np.testing.assert_allclose(a @ ((g @ taps) * (b @ data)), np.correlate(data, taps, "valid"), atol=1e-12)


def test_matrices_refuse_wrong_points() -> None:
    with pytest.raises(ValueError, match="needs 5 distinct"):
        winograd_matrices([Fraction(0), Fraction(1)], tile=4, kernel=3)


@pytest.mark.parametrize("images", [1, 3])
def test_equals_the_convolution(images: int) -> None:
    x = np.random.default_rng(2).standard_normal((images, 96, 24, 32), dtype=np.float32)
    model = _convolution(96, 112, 24, 32)
    expected = run(model, x=x)[0]
    assert apply_winograd(model) == 1
    assert "FusedMatMul" in operators(model)
    found = run(model, x=x)[0]
    assert found.shape == expected.shape
    # Ten times the rounding of a direct sum of 864 products, at a scale of about 5.
    np.testing.assert_allclose(found, expected, atol=3e-5)


@pytest.mark.parametrize("bands", [2, 3, 6])
def test_bands_equal_the_convolution(bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(2).standard_normal((2, 96, 24, 32), dtype=np.float32)
    model = _convolution(96, 112, 24, 32)
    expected = run(model, x=x)[0]
    row = 36 * 8 * 112 * 4
    monkeypatch.setattr(winograd, "MAX_BAND_BYTES", row * 6 // bands)
    assert apply_winograd(model) == 1
    assert operators(model).count("FusedMatMul") == bands
    np.testing.assert_allclose(run(model, x=x)[0], expected, atol=3e-5)


@pytest.mark.parametrize(("rows", "row_bytes"), [(1, 1 << 40), (7, 40 << 20), (128, 3), (128, 2 << 20)])
def test_bands_cover_all_rows_within_the_limit(rows: int, row_bytes: int) -> None:
    found = band_rows(rows, row_bytes)
    assert sum(found) == rows
    assert min(found) >= 1
    assert max(found) * row_bytes <= winograd.MAX_BAND_BYTES + row_bytes or max(found) == 1


@pytest.mark.parametrize(
    ("channels", "out", "height", "width", "attributes"),
    [
        (16, 96, 32, 32, "pads = [1, 1, 1, 1]"),  # too few channels
        (96, 96, 30, 32, "pads = [1, 1, 1, 1]"),  # not whole tiles
        (96, 96, 8, 8, "pads = [1, 1, 1, 1]"),  # too few tiles
        (96, 96, 32, 32, "pads = [1, 1, 1, 1], strides = [2, 2]"),
        (96, 96, 32, 32, "pads = [0, 0, 0, 0]"),
        (96, 96, 32, 32, "pads = [2, 2, 2, 2], dilations = [2, 2]"),
    ],
)
def test_leaves_other_convolutions(channels: int, out: int, height: int, width: int, attributes: str) -> None:
    model = _convolution(channels, out, height, width, attributes)
    assert apply_winograd(model) == 0
    assert operators(model) == ["Conv"]


def test_shares_the_bytes_of_the_weights(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "weights.data") as store:
        model = _convolution(96, 96, 32, 32)
        save_graph(model, tmp_path / "portable.onnx", store)
        before = store.path.stat().st_size
        apply_winograd(model)
        save_graph(model, tmp_path / "winograd.onnx", store)
        assert before >= 96 * 96 * 9 * 4
        # Added: the three transforms, of 16 x 36, 36 x 9 and 36 x 36 numbers.
        assert store.path.stat().st_size - before < 10_000
