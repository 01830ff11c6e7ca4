"""Whether a graph computes what it should: it is run in ONNX Runtime on the CPU beside expected outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.fused_operators import write_out_fusions
from export.group_norm import apply_precise_group_norm
from export.rounding import make_rounding_explicit
from export.weight_store import WeightStore, save_graph
from odise_rt.backends.ort import import_onnxruntime
from odise_rt.cores import usable_cores
from odise_rt.engine_check import Arrays, Bounds, Case, OutputCheck, check_stage
from odise_rt.errors import ExportError, OdiseError, first_line
from odise_rt.specs import StageSpec


@dataclass(frozen=True)
class CpuCheck:
    """What every graph of a stage is held to, and how it is run for that."""

    spec: StageSpec
    cases: Sequence[Case]
    """What the stage must compute."""
    bounds: Bounds
    """How far every output may be off."""
    folder: Path
    """Where the files of graphs are written."""
    threads: int | None = None
    """Threads inside an operator; ``None``: all usable cores."""

    def file(self, path: Path, title: str) -> list[OutputCheck]:
        """Run a graph file on every case and compare every output.

        Args:
            path: the file, its weights beside it.
            title: of the graph, for messages.

        Raises:
            ExportError: ONNX Runtime refuses the graph or fails to run it, or an output has another shape.
        """
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or usable_cores()
        names = [tensor.name for tensor in self.spec.outputs]
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

            def run(inputs: Arrays) -> Arrays:
                return dict(zip(names, session.run(names, dict(inputs)), strict=True))

            return check_stage(run, self.spec, self.cases, self.bounds)
        except OdiseError as exc:
            raise ExportError(f"{title}: {exc}") from exc
        except Exception as exc:  # the bindings raise many unrelated types
            reason = first_line(exc)
            raise ExportError(f"{title}: ONNX Runtime {ort.__version__} does not run {path.name}: {reason}") from exc

    def model(self, model: ir.Model) -> list[OutputCheck]:
        """Run a graph in memory on every case and compare every output; its files are removed again.

        Operators that only the CUDA provider has are written out in standard ones: what is compared is everything but
        those kernels. GroupNorms of float32 graphs are summed precisely (:mod:`export.group_norm`), and values in half
        precision are really rounded (:func:`export.rounding.make_rounding_explicit`).

        Raises:
            ExportError: as for :meth:`file`.
        """
        candidate = model.clone()
        write_out_fusions(candidate)
        if not make_rounding_explicit(candidate):
            apply_precise_group_norm(candidate)
        name = self.spec.name
        path, weights = self.folder / f".candidate-{name}.onnx", self.folder / f".candidate-{name}.data"
        try:
            with WeightStore(weights) as store:
                save_graph(candidate, path, store)
            return self.file(path, f"stage {name}")
        finally:
            path.unlink(missing_ok=True)
            weights.unlink(missing_ok=True)

    def problems(self, model: ir.Model) -> list[str]:
        """What is wrong with the outputs of a graph in memory, as sentences; none if it agrees.

        Raises:
            ExportError: as for :meth:`file`.
        """
        return [check.describe(self.bounds) for check in self.model(model) if not check.passed]
