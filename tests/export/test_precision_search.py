"""Blocks that do not bear half precision are found by running real fp16 graphs, and kept in float32."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export import precision_search
from export.cpu_check import CpuCheck
from export.engine_graphs import PreparedGraph, graph_blocks, prepare_graph
from export.precision import EnginePrecision, node_blocks, to_mixed_precision
from export.precision_search import MAX_KEPT, search_precision
from export.rounding import to_single_precision
from export.tolerances import stage_bounds
from export.weight_store import WeightStore, save_graph
from odise_rt.bundle import StageFile, file_sha256
from odise_rt.engine_check import Case
from odise_rt.errors import ExportError
from odise_rt.specs import StageSpec, TensorSpec
from tests.export.conftest import graph_from_text, run

WIDTH = 32
SPEC = StageSpec("clip_text", (TensorSpec("x", "float32", ("L", WIDTH)),), (TensorSpec("y", "float32", ("L", WIDTH)),))


def chain(scales: list[float]) -> ir.Model:
    """Layers ``net.blocks.K.fc``, each a product with a rotation times a scale, and a bias."""
    random = np.random.default_rng(0)
    lines, weights, last = [], {}, "x"
    for k, scale in enumerate(scales):
        rotation, _ = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))
        weights[f"net.blocks.{k}.fc.weight"] = (rotation * scale).astype(np.float32)
        weights[f"net.blocks.{k}.fc.bias"] = np.zeros(WIDTH, np.float32)
        made = "y" if k == len(scales) - 1 else f"h{k}"
        lines.append(f'p{k} = MatMul({last}, "net.blocks.{k}.fc.weight")  {made} = Add(p{k}, "net.blocks.{k}.fc.bias")')
        last = made
    text = f"g (float[L, {WIDTH}] x) => (float[L, {WIDTH}] y) {{ {' '.join(lines)} }}"
    plain = {name: f"w{number}" for number, name in enumerate(weights)}
    for name, short in plain.items():
        text = text.replace(f'"{name}"', short)
    model = graph_from_text(text, {plain[name]: array for name, array in weights.items()})
    for name, short in plain.items():  # the text form has no dots in names
        value = model.graph.initializers.pop(short)
        value.name = name
        model.graph.register_initializer(value)
    return model


def stored(model: ir.Model, folder: Path) -> StageFile:
    path = folder / "portable.onnx"
    with WeightStore(folder / "portable.data") as store:
        save_graph(model, path, store)
    return StageFile(path, file_sha256(path), {})


def cases(model: ir.Model) -> list[Case]:
    x = np.random.default_rng(1).standard_normal((3, WIDTH), dtype=np.float32)
    return [Case({"x": x}, {"y": run(model.clone(), x=x)[0]})]


def prepared(
    file: StageFile,
    expected: list[Case],
    folder: Path,
    bundle: str = "fp32",
    precision: EnginePrecision = "fp16",
    keep: Collection[str] = (),
) -> PreparedGraph:
    check = CpuCheck(SPEC, expected, stage_bounds("clip_text", precision), folder, threads=1)
    return prepare_graph(file, "tensorrt", check, from_precision=bundle, precision=precision, keep=keep)


# Values grow to 20,000 times a rotation's and come back: block 3 gives more than fp16 holds, block 4 reads it.
OVERFLOW = [1.0, 20.0, 30.0, 400.0, 1e-2, 1e-1, 1.0, 1.0]


def test_blocks_are_those_of_the_weights() -> None:
    model = chain([1.0, 1.0, 1.0])
    blocks = node_blocks(model.graph)
    assert [blocks[id(node)] for node in model.graph] == [f"net.blocks.{k}" for k in (0, 0, 1, 1, 2, 2)]


def test_overflow_is_found_named_and_kept_in_float32(tmp_path: Path) -> None:
    model = chain(OVERFLOW)
    expected = cases(model)
    file = stored(model, tmp_path)
    compare = CpuCheck(SPEC, expected, stage_bounds("clip_text", "fp16"), tmp_path, threads=1)

    plain = ir.load(file.path)
    to_mixed_precision(plain)
    (check,) = compare.model(plain)
    assert check.not_finite, "the graph of this test must overflow in fp16"

    graph = prepared(file, expected, tmp_path)
    assert graph.notes["blocks_kept_fp32"] == ["net.blocks.3", "net.blocks.4"]
    kept = ir.load(graph.path)
    (check,) = compare.model(kept)
    assert check.passed
    half = [node for node in kept.graph if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT16]
    assert len(half) == len(OVERFLOW) - 3, "two blocks and the product that makes the output are in float32, no more"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "clip_text.data",
        "clip_text.onnx",
        "portable.data",
        "portable.onnx",
    ]


@pytest.mark.parametrize(
    ("bundle", "advice"),
    [("fp32", "build these engines with --engine-precision fp32"), ("fp16", "export the bundle with --precision fp32")],
)
def test_engines_that_bear_fp16_nowhere_get_an_advice_that_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str, advice: str
) -> None:
    monkeypatch.setattr(precision_search, "MAX_KEPT", 1)
    model = chain(OVERFLOW)
    expected = cases(model)
    with pytest.raises(ExportError, match=rf"stage clip_text: 1 blocks do not bear .*: {advice}"):
        prepared(stored(model, tmp_path), expected, tmp_path, bundle)


def test_a_graph_that_bears_fp16_is_left_alone(tmp_path: Path) -> None:
    model = chain([1.0] * 4)
    expected = cases(model)
    graph = prepared(stored(model, tmp_path), expected, tmp_path)
    assert "blocks_kept_fp32" not in graph.notes
    assert graph.precision == "fp16"


def test_blocks_that_are_given_stay_in_float32(tmp_path: Path) -> None:
    model = chain([1.0] * 4)
    expected = cases(model)
    file = stored(model, tmp_path)
    assert graph_blocks(file.path) == [f"net.blocks.{k}" for k in range(4)]
    plain = prepared(file, expected, tmp_path)
    graph = prepared(file, expected, tmp_path, keep=("net.blocks.1",))
    assert graph.notes["blocks_kept_fp32"] == ["net.blocks.1"]
    assert graph.digest != plain.digest


def test_a_graph_that_is_wrong_in_float32_is_no_matter_of_precision(tmp_path: Path) -> None:
    model = chain([1.0] * 3)
    wrong = [Case(case.inputs, {"y": case.outputs["y"] + 1}) for case in cases(model)]
    with pytest.raises(ExportError, match="does not agree in float32 either"):
        prepared(stored(model, tmp_path), wrong, tmp_path)
    with pytest.raises(ExportError, match="stage clip_text for tensorrt: the graph does not agree: y of case 0"):
        prepared(stored_again(model, tmp_path), wrong, tmp_path, precision="fp32")


def stored_again(model: ir.Model, folder: Path) -> StageFile:
    (folder / "again").mkdir()
    return stored(model, folder / "again")


def test_mixed_precision_can_be_undone_up_to_rounding(tmp_path: Path) -> None:
    model = chain([1.0] * 4)
    x = np.random.default_rng(1).standard_normal((3, WIDTH), dtype=np.float32)
    expected = run(model.clone(), x=x)[0]
    casts = to_mixed_precision(model).casts
    assert casts > 0
    assert to_single_precision(model) == casts
    assert all(node.op_type != "Cast" for node in model.graph)
    assert [value.name for value in model.graph.outputs] == ["y"]
    found = run(model, x=x)[0]
    assert 0 < np.abs(found - expected).max() < 5e-3
    again = model.clone()
    to_mixed_precision(again)
    assert to_single_precision(again) == casts
    np.testing.assert_array_equal(run(again, x=x)[0], found)


# ---- the search alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{0}, {12}, {5}, {3, 4}, {0, 6, 12}])
def test_exactly_the_bad_blocks_are_found(bad: set[int]) -> None:
    blocks = [f"b{k}" for k in range(13)]

    def agrees(keep: Collection[str]) -> bool:
        return {f"b{k}" for k in bad} <= set(keep)

    search = search_precision(blocks, agrees, "unet_tap", "do without")
    assert search.kept == tuple(f"b{k}" for k in sorted(bad))
    assert search.trials <= 2 + len(bad) * 6


def test_too_many_bad_blocks_are_an_error() -> None:
    blocks = [f"b{k}" for k in range(MAX_KEPT + 5)]
    with pytest.raises(ExportError, match=r"16 blocks do not bear half precision \(b0, b1.*: do without$"):
        search_precision(blocks, lambda keep: set(keep) >= set(blocks), "unet_tap", "do without", "y has NaN")


def test_comparisons_that_do_not_repeat_are_an_error() -> None:
    answers = iter([True, False, False, False, False])
    with pytest.raises(ExportError, match="comparisons do not repeat; do without"):
        search_precision(["b0", "b1"], lambda keep: next(answers, False), "unet_tap", "do without")
