"""Whether a graph file computes what it should: it is run in ONNX Runtime on the CPU beside expected outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from odise_rt.backends.ort import import_onnxruntime
from odise_rt.cores import usable_cores
from odise_rt.engine_check import Arrays, Bounds, Case, OutputCheck, check_stage
from odise_rt.errors import ExportError, OdiseError, first_line
from odise_rt.specs import StageSpec


def check_graph_file(
    path: Path, spec: StageSpec, cases: Sequence[Case], bounds: Bounds, title: str, threads: int | None = None
) -> list[OutputCheck]:
    """Run a graph on every case and compare every output.

    Args:
        path: of the graph, its weights beside it.
        spec: of its stage.
        cases: what it must compute.
        bounds: for every output.
        title: of the graph, for messages.
        threads: inside an operator; ``None``: all usable cores.

    Raises:
        ExportError: ONNX Runtime refuses the graph or fails to run it, or an output has another shape.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    names = [tensor.name for tensor in spec.outputs]
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(inputs: Arrays) -> Arrays:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

        return check_stage(run, spec, cases, bounds)
    except OdiseError as exc:
        raise ExportError(f"{title}: {exc}") from exc
    except Exception as exc:  # the bindings raise many unrelated types
        reason = first_line(exc)
        raise ExportError(f"{title}: ONNX Runtime {ort.__version__} does not run {path.name}: {reason}") from exc
