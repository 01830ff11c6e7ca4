"""Stages as ONNX: names, dimensions, results and bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from export.onnx_from_stage import ExportedGraph, onnx_from_stage
from export.stages import StageGraph, stage_graphs
from export.weight_store import WeightStore, save_graph
from odise_rt.bundle import Bundle
from odise_rt.errors import ExportError
from odise_rt.specs import STAGES, StageSpec, TensorSpec
from tests.export.conftest import small_checkpoint
from training.checkpoints import LoadedCheckpoint
from training.torch_stages import TorchBackend, model_facts

FAST = ("clip_text", "mask_decoder")
"""Stages that export in seconds; the whole bundle is the slow test's."""


@pytest.fixture(scope="module")
def exported(small: LoadedCheckpoint) -> dict[str, ExportedGraph]:
    graphs = stage_graphs(small.model, model_facts(small.model))
    return {name: onnx_from_stage(graphs[name]) for name in FAST}


def _save(graph: ExportedGraph, folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    with WeightStore(folder / f"{name}.data") as store:
        save_graph(graph.model, folder / f"{name}.onnx", store)
    return folder / f"{name}.onnx"


def _torch_stage(loaded: LoadedCheckpoint, bundle: Bundle | None, name: str):  # type: ignore[no-untyped-def]
    return TorchBackend(loaded.model).load(bundle, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAST)
def test_graphs_agree_with_pytorch_at_two_shapes(
    exported: dict[str, ExportedGraph], small: LoadedCheckpoint, name: str, tmp_path: Path
) -> None:
    path = _save(exported[name], tmp_path, name)
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    spec = stage_graphs(small.model, model_facts(small.model))[name].spec
    random = np.random.default_rng(0)
    for dims in ({"L": 1, "H": 64, "W": 64}, {"L": 5, "H": 64, "W": 160}):
        inputs = {
            tensor.name: random.integers(1, 4000, tensor.resolve(dims))
            if tensor.dtype == "int64"
            else random.standard_normal(tensor.resolve(dims), dtype=np.float32)
            for tensor in spec.inputs
        }
        expected = _torch_stage(small, None, name).run(inputs)
        found = dict(zip(expected, session.run(list(expected), inputs), strict=True))
        for key, array in expected.items():
            assert found[key].shape == array.shape
            # Random features: a mask logit within rounding of zero is not to be expected in so small a picture.
            np.testing.assert_allclose(found[key], array, atol=2e-5 * float(np.abs(array).max()), err_msg=key)


@pytest.mark.parametrize("name", FAST)
def test_graphs_carry_the_names_of_the_spec(
    exported: dict[str, ExportedGraph], small: LoadedCheckpoint, name: str, tmp_path: Path
) -> None:
    proto = onnx.load(_save(exported[name], tmp_path, name), load_external_data=False)
    spec = stage_graphs(small.model, model_facts(small.model))[name].spec
    for values, tensors in ((proto.graph.input, spec.inputs), (proto.graph.output, spec.outputs)):
        described = [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]
        assert described == [(tensor.name, list(tensor.shape)) for tensor in tensors]
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 20)}
    assert not proto.functions


def test_equal_models_give_equal_bytes_without_traces(exported: dict[str, ExportedGraph], tmp_path: Path) -> None:
    loaded = small_checkpoint()
    again = onnx_from_stage(stage_graphs(loaded.model, model_facts(loaded.model))["clip_text"])
    hashes = []
    for number, graph in enumerate((exported["clip_text"], again)):
        path = _save(graph, tmp_path / str(number), "clip_text")
        hashes.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.parent.iterdir())])
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path.cwd()).encode() not in content
        assert b"pkg.torch" not in content
    assert hashes[0] == hashes[1]


def test_counts_the_parameters_that_are_read(exported: dict[str, ExportedGraph], small: LoadedCheckpoint) -> None:
    clip, classifier = small.model.clip, small.model.mask_classifier
    parts: list[nn.Module] = [clip.token_embedding, clip.transformer, clip.ln_final, classifier.text_projection]
    numbers = sum(p.numel() for part in parts for p in part.parameters())
    assert (
        exported["clip_text"].parameters == numbers + clip.positional_embedding.numel() + clip.text_projection.numel()
    )


def test_every_stage_has_trace_inputs_that_fit_its_spec(small: LoadedCheckpoint) -> None:
    graphs = stage_graphs(small.model, model_facts(small.model))
    assert tuple(graphs) == STAGES
    for stage in graphs.values():
        names = [tensor.name for tensor in stage.spec.inputs]
        arrays = dict(zip(names, (tensor.numpy() for tensor in stage.trace_inputs()), strict=True))
        dims = stage.spec.check(arrays)
        assert 1 not in dims.values()
        assert len(set(dims.values())) == len(dims), "equal sizes would be traced as one"
        with torch.no_grad():
            outputs = stage.module(*stage.trace_inputs())
        assert len(outputs) == len(stage.spec.outputs)


class _FixedSize(nn.Module):
    """Reads a symbolic size as a number, as a careless model would."""

    def forward(self, windows: Tensor) -> tuple[Tensor]:
        return (windows.flatten(1) * float(windows.shape[0]),) if windows.shape[0] == 2 else (windows,)


class _Untraceable(nn.Module):
    def forward(self, windows: Tensor) -> tuple[Tensor]:
        return (windows.flatten(1) * windows.sum().item(),) if windows.sum().item() > 0 else (windows,)


@pytest.mark.parametrize("module", [_FixedSize(), _Untraceable()])
def test_a_module_that_cannot_be_exported_is_a_typed_error(module: nn.Module) -> None:
    spec = StageSpec(
        "careless", (TensorSpec("windows", "float32", ("N", 4)),), (TensorSpec("out", "float32", ("N", 4)),)
    )
    with pytest.raises(ExportError, match="careless"):
        onnx_from_stage(StageGraph(spec, module, window=64))


def test_a_graph_that_does_not_fit_its_spec_is_a_typed_error() -> None:
    spec = StageSpec("short", (TensorSpec("x", "float32", ("N", 4)),), (TensorSpec("y", "float32", ("N", 5)),))
    with pytest.raises(ExportError, match="became 4 in the graph, expected 5"):
        onnx_from_stage(StageGraph(spec, nn.ReLU(), window=64))
