"""Grid sampling as gathers: the same samples, wherever the grid points."""

from __future__ import annotations

import numpy as np
import pytest

from export.gather_sampling import replace_grid_sample
from export.precision import to_mixed_precision
from odise_rt.errors import ExportError
from tests.export.conftest import graph_from_text, operators, run

GRAPH = """g (float[N, 5, H, W] image, float[N, M, P, 2] grid) => (float[N, 5, M, P] y) {
    y = GridSample <align_corners = 0, mode = "linear", padding_mode = "zeros"> (image, grid)
}"""


def _grids(height: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    edge = np.array([-1.0, 1.0])
    pixel = np.array([1.0 / width, 1.0 / height])
    corners = np.stack(np.meshgrid(edge, edge), axis=-1).reshape(-1, 2)
    return {
        "inside": random.uniform(-1, 1, (2, 7, 4, 2)),
        "across the border": random.uniform(-1.3, 1.3, (2, 7, 4, 2)),
        "far outside": random.uniform(-50, 50, (2, 7, 4, 2)),
        "corners, half a pixel around, centres": np.concatenate([corners, corners - pixel, corners + pixel])[
            None, :, None
        ].repeat(2, axis=0),
    }


@pytest.mark.parametrize(("height", "width"), [(6, 9), (1, 1), (33, 4)])
def test_agrees_with_grid_sample(height: int, width: int) -> None:
    model = graph_from_text(GRAPH)
    image = np.random.default_rng(0).standard_normal((2, 5, height, width), dtype=np.float32)
    grids = {name: grid.astype(np.float32) for name, grid in _grids(height, width).items()}
    expected = {name: run(model, image=image, grid=grid)[0] for name, grid in grids.items()}
    assert replace_grid_sample(model) == 1
    assert "GridSample" not in operators(model)
    for name, grid in grids.items():
        np.testing.assert_allclose(run(model, image=image, grid=grid)[0], expected[name], atol=2e-5, err_msg=name)
    assert np.abs(expected["far outside"]).max() < np.abs(expected["inside"]).max()


def test_agrees_after_mixed_precision_within_the_rounding_of_the_image() -> None:
    model = graph_from_text(
        """g (float[1, 16, H, W] image, float[1, M, P, 2] grid) => (float[1, 16, M, P] y) {
            f = Conv(image, w)
            y = GridSample <align_corners = 0, mode = "linear", padding_mode = "zeros"> (f, grid)
        }""",
        {"w": np.random.default_rng(0).standard_normal((16, 16, 1, 1)).astype(np.float32) / 4},
    )
    inputs = {
        "image": np.random.default_rng(0).standard_normal((1, 16, 12, 10), dtype=np.float32),
        "grid": np.random.default_rng(0).uniform(-1.2, 1.2, (1, 8, 4, 2)).astype(np.float32),
    }
    to_mixed_precision(model)
    expected = run(model, **inputs)[0]
    replace_grid_sample(model)
    np.testing.assert_allclose(run(model, **inputs)[0], expected, atol=2e-5)


def test_leaves_graphs_without_sampling() -> None:
    model = graph_from_text("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    assert replace_grid_sample(model) == 0
    assert operators(model) == ["Relu"]


def test_refuses_another_way_of_sampling() -> None:
    model = graph_from_text(GRAPH.replace('"zeros"', '"border"'))
    with pytest.raises(ExportError, match="border"):
        replace_grid_sample(model)
