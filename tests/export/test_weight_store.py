"""Weight files: equal bytes are stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.weight_store import WeightStore, save_graph
from tests.export.conftest import graph_from_text

WEIGHT = np.random.default_rng(0).standard_normal((32, 32), dtype=np.float32)


def test_equal_tensors_share_a_place(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store:
        first = store.add(ir.tensor(WEIGHT, name="a"))
        other = store.add(ir.tensor(WEIGHT + 1, name="b"))
        again = store.add(ir.tensor(WEIGHT.reshape(-1, 4), name="c"))
        store.flush()
        assert (again.offset, again.length) == (first.offset, first.length)
        assert tuple(again.shape.numpy()) == (256, 4)
        assert other.offset != first.offset
        np.testing.assert_array_equal(other.numpy(), WEIGHT + 1)
        np.testing.assert_array_equal(again.numpy(), WEIGHT.reshape(-1, 4))
    assert store.path.stat().st_size == 2 * WEIGHT.nbytes


def test_large_tensors_start_on_a_page(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w.data") as store:
        store.add(ir.tensor(np.ones(300, np.float32)))
        assert store.add(ir.tensor(np.zeros(1 << 18, np.float32))).offset == 4096
        assert store.add(ir.tensor(np.ones(301, np.float32))).offset % 64 == 0


def test_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        WeightStore(tmp_path / "w.data")


def test_saved_graphs_run_and_refer_to_one_file(tmp_path: Path) -> None:
    text = "g (float[N, 32] x) => (float[N, 32] y) { a = MatMul(x, w)  y = Add(a, b) }"
    x = np.ones((2, 32), np.float32)
    with WeightStore(tmp_path / "w.data") as store:
        for number in range(2):
            bias = np.full(32, number, np.float32)
            path = tmp_path / f"{number}.onnx"
            save_graph(graph_from_text(text, {"w": WEIGHT, "b": bias}), path, store)
            onnx.checker.check_model(str(path))
            session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ WEIGHT + bias, rtol=1e-4, atol=1e-5)
            # The bias is small enough to lie in the graph itself.
            proto = onnx.load(path, load_external_data=False)
            assert {t.name: bool(t.external_data) for t in proto.graph.initializer} == {"w": True, "b": False}
    assert (tmp_path / "w.data").stat().st_size == WEIGHT.nbytes


def test_equal_bytes_of_two_types_lie_apart(tmp_path: Path) -> None:
    """512 zeros of float16 are 256 of float32, and TensorRT refuses one place with two counts of values."""
    with WeightStore(tmp_path / "w.data") as store:
        wide = store.add(ir.tensor(np.zeros(256, np.float32), name="wide"))
        half = store.add(ir.tensor(np.zeros(512, np.float16), name="half"))
        again = store.add(ir.tensor(np.zeros((16, 16), np.float32), name="again"))
    assert wide.offset == again.offset != half.offset
