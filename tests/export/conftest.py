"""A model small enough to export in a test, bundles of it, and helpers to write graphs as text and run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.bundle_writer import BundleWriter, StageFiles
from odise_rt import segmenter
from odise_rt.specs import StageSpec
from training.checkpoints import LoadedCheckpoint, LoadReport
from training.checkpoints.own_format import uninitialised_model
from training.config import ODISE_TINY, OdiseConfig, caption_variant
from training.initialization import initialise, tokenizer_for
from training.torch_stages import TorchBackend


def small_config(variant: str = "label") -> OdiseConfig:
    head = dataclasses.replace(ODISE_TINY.head, queries=6, pixel_decoder_layers=1, mask_decoder_layers=2)
    clip = dataclasses.replace(ODISE_TINY.clip, layers=2, text_layers=1, context_length=40)
    config = dataclasses.replace(ODISE_TINY, name="small", head=head, clip=clip, window=64, test_short_edge=64)
    return caption_variant(config) if variant == "caption" else config


def small_checkpoint(variant: str = "label") -> LoadedCheckpoint:
    config = small_config(variant)
    model = uninitialised_model(config)
    initialise(model, seed=3)
    return LoadedCheckpoint(model.eval(), config, ("sky", "tree"), tokenizer_for(config), LoadReport(()))


@pytest.fixture(scope="session")
def small() -> LoadedCheckpoint:
    return small_checkpoint()


def run_in_pytorch(loaded: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every bundle's stages be computed by a model in PyTorch: to trace them takes a minute."""
    monkeypatch.setattr(segmenter, "open_backend", lambda *arguments: TorchBackend(loaded.model))


def write_empty_stage(writer: BundleWriter, spec: StageSpec) -> Path:
    """Give a bundle a stage whose graph holds nothing."""
    files = StageFiles(spec, writer.weights(spec.name), parameters=0, flops={})
    writer.stages[spec.name] = files
    path = writer.graphs / files.graph()
    path.touch()
    return path


def graph_from_text(text: str, weights: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """A graph in ONNX's text form, with weights as initializers and every dtype and shape inferred."""
    source = f'<ir_version: 10, opset_import: ["" : 20]> {text}'
    model = onnx.parser.parse_model(source)
    for name, array in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    """Check a graph and run it on one thread."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


def operators(model: ir.Model) -> list[str]:
    """Operator types in order."""
    return [node.op_type for node in model.graph]
