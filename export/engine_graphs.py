"""The graph that an engine is built from: the bundle's portable one, in the precision and the form that it needs.

=================  ==========================================================================================
``tensorrt``       standard operators only; grid sampling as gathers (:mod:`export.gather_sampling`)
``tensorrt-rtx``   the same
``ort-cuda``       attention, norms and activations as operators of ONNX Runtime's CUDA provider
                   (:mod:`export.cuda_fusion`)
=================  ==========================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.cpu_check import CpuCheck
from export.cuda_fusion import fuse_for_ort_cuda
from export.gather_sampling import replace_grid_sample
from export.group_norm import restore_group_norm
from export.precision import EnginePrecision, check_bundle_precision, node_blocks, to_mixed_precision
from export.precision_search import search_precision
from export.rounding import to_single_precision
from export.weight_store import WeightStore, save_graph
from odise_rt.bundle import StageFile, file_sha256
from odise_rt.engine_facts import EngineKind
from odise_rt.errors import ExportError

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class PreparedGraph:
    """A graph file for an engine, with its weights beside it."""

    path: Path
    weights: Path
    digest: str
    """SHA-256 over both files."""
    precision: EnginePrecision
    notes: Mapping[str, Any]
    """What the passes did, by name."""


def precision_advice(from_precision: str) -> str:
    """What to do where engines do not bear half precision.

    Args:
        from_precision: of the bundle; one in fp16 has no float32 engines.
    """
    if from_precision == "fp32":
        return "build these engines with --engine-precision fp32"
    return "export the bundle with --precision fp32, and build its engines with --engine-precision fp32"


def prepare_graph(
    file: StageFile,
    kind: EngineKind,
    check: CpuCheck,
    *,
    from_precision: str,
    precision: EnginePrecision,
    keep: Collection[str] = (),
) -> PreparedGraph:
    """Make the graph for an engine, and compare it with the expected outputs in ONNX Runtime on CPU.

    Where a graph in fp16 or bf16 leaves the bounds, its blocks are bisected, and the bad ones stay in float32.

    Args:
        file: the bundle's portable graph.
        kind: the engine.
        check: what the graph must compute; it is written to the folder of this check.
        from_precision: of the bundle.
        precision: inside the new graph.
        keep: blocks that stay in float32 in any case.

    Raises:
        ExportError: the bundle's precision is too low, an operator is not standard, or the graph does not agree.
    """
    check_bundle_precision(from_precision, precision)
    stage = check.spec.name
    notes: dict[str, Any] = {}

    def make(kept: Collection[str]) -> ir.Model:
        model = load_single_precision(file.path)
        notes.update(_transform(model, kind, precision, {*keep, *kept}))
        return model

    if precision != "fp32":
        found_bad = blocks_to_keep(make, graph_blocks(file.path), check, precision_advice(from_precision))
        model = make(found_bad)
        keep = (*keep, *found_bad)
    else:
        model = make(())
        wrong = check.problems(model)
        if wrong:
            raise ExportError(f"stage {stage} for {kind}: the graph does not agree: {'; '.join(wrong)}")
    if keep:
        notes["blocks_kept_fp32"] = list(keep)
    return _write(model, stage, check.folder, precision, notes)


def blocks_to_keep(
    make: Callable[[Collection[str]], ir.Model], blocks: Sequence[str], check: CpuCheck, advice: str
) -> tuple[str, ...]:
    """The blocks that must stay in float32 for a mixed graph to agree on the CPU; none if all of it does.

    Args:
        make: gives the graph in half precision but for the given blocks; called anew for every trial.
        blocks: of the graph, in topological order.
        check: what the graph must compute.
        advice: what to do when too many blocks are bad, for messages.

    Raises:
        ExportError: the graph does not agree in float32 either, or too many blocks are bad.
    """
    found = check.problems(make(()))
    if not found:
        return ()
    return search_precision(blocks, lambda keep: not check.problems(make(keep)), check.spec.name, advice, found[0]).kept


def graph_blocks(path: Path) -> list[str]:
    """The blocks of a graph file in topological order, for :func:`export.precision_search.search_precision`."""
    return list(dict.fromkeys(node_blocks(load_single_precision(path).graph).values()))


def load_single_precision(path: Path) -> ir.Model:
    """The portable graph with everything in float32 and GroupNorms as engines know them; weights that are fp16 in the
    file keep their rounded values."""
    model = ir.load(path)
    to_single_precision(model)
    restore_group_norm(model)
    return model


def _transform(model: ir.Model, kind: EngineKind, precision: EnginePrecision, keep: Collection[str]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    if kind == "ort-cuda":
        counts = fuse_for_ort_cuda(model)
        notes["fusion"] = dataclasses.asdict(counts)
    if precision != "fp32":
        notes["precision"] = to_mixed_precision(model, keep, precision).to_dict()
    if kind != "ort-cuda":
        notes["grid_samples_as_gathers"] = replace_grid_sample(model)
        unusual = sorted({f"{n.domain}::{n.op_type}" for n in model.graph if n.domain not in STANDARD_DOMAINS})
        if unusual:
            # TensorRT-RTX ends the process when it parses one.
            raise ExportError(f"the graph has operators that {kind} does not know: {', '.join(unusual)}")
    return notes


def _write(
    model: ir.Model, stage: str, folder: Path, precision: EnginePrecision, notes: dict[str, Any]
) -> PreparedGraph:
    path, weights = folder / f"{stage}.onnx", folder / f"{stage}.data"
    for old in (path, weights):
        old.unlink(missing_ok=True)
    with WeightStore(weights) as store:
        save_graph(model, path, store)
    digest = hashlib.sha256(f"{file_sha256(path)}\n{file_sha256(weights)}".encode()).hexdigest()
    return PreparedGraph(path, weights, digest, precision, notes)
