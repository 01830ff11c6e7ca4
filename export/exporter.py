"""One export from model to bundle: every stage written and compared with PyTorch, then the whole.

Stages are worked on one after the other, and what one needed is released before the next, so the peak of memory is the
model, its largest graph in ONNX Runtime, and that graph's activations.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from rich.console import Console

from export.bundle_writer import BundleWriter, StageFiles
from export.cpu_check import CpuCheck
from export.engine_graphs import blocks_to_keep
from export.engine_reference import CHECK_WORDS
from export.flops import StageFlops, count_flops
from export.fusion import VARIANT, fuse_for_ort_cpu
from export.graph_editing import remove_unread
from export.group_norm import apply_precise_group_norm
from export.onnx_from_stage import onnx_from_stage
from export.precision import Precision, node_blocks, to_mixed_precision
from export.progress import ExportProgress
from export.report import ExportReport, StageRow
from export.sources import Source
from export.stages import StageGraph, stage_graphs
from export.tolerances import stage_bounds
from export.verify import (
    Comparison,
    Example,
    ResultComparison,
    check_written,
    compare_results,
    compare_stage,
    example_pictures,
    run_example,
)
from export.weight_store import save_graph
from export.winograd import apply_winograd
from odise_rt.bundle import Bundle
from odise_rt.errors import ExportError
from odise_rt.specs import STAGES
from odise_rt.version import __version__
from training.torch_stages import model_constants, model_facts


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how to check it."""

    precision: Precision = "fp32"
    """Precision inside the graphs; inputs and outputs are float32 in any case."""
    stages: tuple[str, ...] = STAGES
    """The stages to export; fewer than all are only checked, and no bundle is put in place."""
    force: bool = False
    """Replace a bundle that is there already."""
    keep_going: bool = False
    """Whether the other stages are still checked after one that does not agree."""
    photo: np.ndarray | None = None
    """uint8 (h, w, 3), a picture to check on instead of the drawn one."""
    threads: int | None = None
    """Threads inside an operator of ONNX Runtime; ``None``: all usable cores."""


class Exporter:
    """One export: the model, the writer and what was found so far."""

    def __init__(self, source: Source, writer: BundleWriter, options: ExportOptions, progress: ExportProgress) -> None:
        self.source = source
        self.writer = writer
        self.options = options
        self.progress = progress
        self.model = source.loaded.model
        self.facts = model_facts(self.model)
        self.failures: list[str] = []

    def run(self) -> ExportReport:
        """Write and verify everything; publishing is left to the caller.

        Raises:
            ExportError: something cannot be exported or does not agree with PyTorch.
        """
        started = time.perf_counter()
        # Only its embedding of "" is needed from here on, and that is a constant.
        self.model.drop_sd_text()
        self.model.requires_grad_(False)
        with self.progress.step("count operations"):
            side = self.facts.window
            flops = count_flops(self.model, self.facts, side, side)
        with self.progress.step("run PyTorch on two pictures"):
            pictures = example_pictures(self.facts, self.options.photo)
            loaded = self.source.loaded
            examples = [run_example(loaded, p, words) for p, words in zip(pictures, CHECK_WORDS, strict=True)]
        graphs = stage_graphs(self.model, self.facts)
        rows = [self._stage(graphs[name], flops[name], examples) for name in STAGES if name in self.options.stages]
        results: tuple[ResultComparison, ...] = ()
        if self.options.stages == STAGES and not self.failures:
            results = self._whole(examples)
        if self.failures:
            raise ExportError("not exported, the graphs do not agree with PyTorch:\n  " + "\n  ".join(self.failures))
        return ExportReport(
            name=loaded.config.name,
            precision=self.options.precision,
            image=(side, side),
            rows=tuple(rows),
            results=results,
            seconds=time.perf_counter() - started,
            peak_bytes=peak_memory(),
            bundle_bytes=self.writer.size(),
        )

    def _stage(self, stage: StageGraph, flops: StageFlops, examples: list[Example]) -> StageRow:
        """Export one stage in all its forms and compare each with PyTorch."""
        started = time.perf_counter()
        name, precision = stage.name, self.options.precision
        notes: dict[str, Any] = {}
        with self.progress.step(f"{name}: trace and translate"):
            exported = onnx_from_stage(stage)
            model = exported.model
        if precision == "fp32":
            notes["precise_group_norms"] = apply_precise_group_norm(model)
            remove_unread(model.graph)
        else:
            with self.progress.step(f"{name}: mixed precision"):
                kept_blocks = self._blocks_to_keep(model, stage, examples)
                report = to_mixed_precision(model, kept_blocks)
                notes["precision"] = report.to_dict() | {"blocks_kept_fp32": list(kept_blocks)}
            if kept_blocks:
                self.progress.note(f"in float32, as they do not bear fp16: {', '.join(kept_blocks)}")
            kept = ", ".join(f"{count} for {rule}" for rule, count in report.kept.items())
            self.progress.note(f"{sum(report.half.values())} nodes in fp16; in float32 {kept}")
        store = self.writer.weights(stage.weight_file)
        files = StageFiles(stage.spec, store, exported.parameters, {"official": flops.official, "pruned": flops.pruned})
        nodes = {"portable": len(model.graph)}
        with self.progress.step(f"{name}: write"):
            path = self.writer.graphs / files.graph()
            save_graph(model, path, store)
            check_graph(path, name)
        with self.progress.step(f"{name}: compare"):
            comparisons = self._compare(stage, "portable", path, examples)
        if precision == "fp32":
            with self.progress.step(f"{name}: make and compare {VARIANT}"):
                comparisons += self._cpu_variant(stage, model, files, nodes, notes, examples)
        del model, exported
        gc.collect()
        self.writer.stages[name] = files
        self._judge(comparisons)
        on_disk = [self.writer.graphs / files.graph(None if form == "portable" else form) for form in nodes]
        return StageRow(
            stage=name,
            parameters=files.parameters,
            nodes=nodes,
            flops=flops,
            seconds=time.perf_counter() - started,
            file_bytes=sum(p.stat().st_size for p in (*on_disk, store.path)),
            notes=notes,
            comparisons=tuple(comparisons),
        )

    def _blocks_to_keep(self, model: ir.Model, stage: StageGraph, examples: list[Example]) -> tuple[str, ...]:
        """The blocks that do not bear fp16, found by running the graph with every value really rounded."""

        def make(keep: Collection[str]) -> ir.Model:
            trial = model.clone()
            to_mixed_precision(trial, keep)
            return trial

        cases = [example.cases[stage.name] for example in examples]
        bounds = stage_bounds(stage.name, self.options.precision)
        check = CpuCheck(stage.spec, cases, bounds, self.writer.graphs, self.options.threads)
        blocks = list(dict.fromkeys(node_blocks(model.graph).values()))
        return blocks_to_keep(make, blocks, check, "build this bundle with --precision fp32")

    def _compare(self, stage: StageGraph, form: str, path: Path, examples: list[Example]) -> list[Comparison]:
        """Run one graph on all examples."""
        comparisons = compare_stage(path, stage.spec, form, self.options.precision, examples, self.options.threads)
        gc.collect()
        return comparisons

    def _cpu_variant(
        self,
        stage: StageGraph,
        model: ir.Model,
        files: StageFiles,
        nodes: dict[str, int],
        notes: dict[str, Any],
        examples: list[Example],
    ) -> list[Comparison]:
        """Write and compare the form for ONNX Runtime on CPU, if any rewrite applies.

        Winograd products round more than direct sums, and how much more depends on the weights: where they leave the
        bounds, the variant goes without them.

        Args:
            model: the portable graph; rewritten in place.
        """
        counts = fuse_for_ort_cpu(model)
        path = self.writer.graphs / files.graph(VARIANT)
        if counts:
            save_graph(model, path, files.weights)
            nodes[VARIANT] = len(model.graph)
        products = apply_winograd(model)
        remove_unread(model.graph)
        comparisons: list[Comparison] = []
        if products:
            candidate = path.with_name(f"candidate-{path.name}")
            save_graph(model, candidate, files.weights)
            comparisons = self._compare(stage, VARIANT, candidate, examples)
            if all(comparison.check.passed for comparison in comparisons):
                candidate.replace(path)
                nodes[VARIANT] = len(model.graph)
            else:
                worst = max(comparison.check.relative_max for comparison in comparisons)
                self.progress.note(f"{products} Winograd products left out: off by up to {worst:.1e} of the scale")
                candidate.unlink()
                products, comparisons = 0, []
        if VARIANT not in nodes:
            return []
        check_graph(path, stage.name)
        files.variants.append(VARIANT)
        counts = dataclasses.replace(counts, winograd=products)
        notes["fusion"] = dataclasses.asdict(counts)
        self.progress.note(f"for ONNX Runtime on CPU: {counts}")
        return comparisons or self._compare(stage, VARIANT, path, examples)

    def _judge(self, comparisons: Sequence[Comparison]) -> None:
        failed = [
            f"{c.stage} ({c.form}): {c.check.describe(stage_bounds(c.stage, self.options.precision))}, for {c.shapes}"
            for c in comparisons
            if not c.check.passed
        ]
        self.failures += failed
        if failed and not self.options.keep_going:
            raise ExportError(
                "not exported, a graph does not agree with PyTorch (bounds: export/tolerances.py):\n  "
                + "\n  ".join(failed)
            )

    def _whole(self, examples: Sequence[Example]) -> tuple[ResultComparison, ...]:
        """Complete the bundle, read it back, and compare the runtime on it with the runtime on PyTorch."""
        loaded, writer = self.source.loaded, self.writer
        with self.progress.step("write manifest"):
            writer.write_constants(model_constants(self.model))
            writer.write_tokenizer(loaded.tokenizer_json)
            writer.write_manifest(
                self.facts,
                {
                    "name": loaded.config.name,
                    "producer": {
                        "odise_rt": __version__,
                        "torch": torch.__version__,
                        "onnx": onnx.__version__,
                        "onnxscript": onnxscript.__version__,
                    },
                    "precision": self.options.precision,
                    "created_from": self.source.created_from,
                    "training_vocabulary": list(loaded.training_vocabulary),
                    "config": loaded.config.to_dict(),
                },
            )
            bundle = Bundle.open(writer.folder)
            check_written(bundle, loaded)
        with self.progress.step("segment two pictures with the bundle"):
            precision, threads = self.options.precision, self.options.threads
            results = tuple(compare_results(bundle, precision, example, threads) for example in examples)
        for example, found in zip(examples, results, strict=True):
            if not found.passed:
                height, width = example.pixels.shape[:2]
                self.failures.append(
                    f"end to end ({height} x {width}): {found.panoptic:.4%} of pixels in the same segment and "
                    f"{found.semantic:.4%} in the same class as in PyTorch (bounds: RESULT_AGREEMENT in "
                    "export/tolerances.py)"
                )
        return results


def check_graph(path: Path, stage: str) -> None:
    """Run ONNX's own checks on a graph file.

    Raises:
        ExportError: the graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as exc:  # checker and shape inference raise types of their own
        raise ExportError(f"stage {stage}: {path.name} is not valid ONNX: {str(exc)[:400]}") from exc


def build_bundle(source: Source, out: Path, options: ExportOptions, console: Console) -> ExportReport:
    """Export a model and put the bundle in place.

    Args:
        source: the model. Its diffusion text encoder is dropped.
        out: the bundle's folder.
        options: precision, checks and so on.
        console: shows progress.

    Raises:
        ExportError: nothing was put in place, and why.
    """
    with BundleWriter(out, options.force) as writer, ExportProgress(_steps(options), console) as progress:
        report = Exporter(source, writer, options, progress).run()
        writer.write_report(report.to_dict(), report.markdown())
        writer.publish()
    return report


def check_stages(source: Source, options: ExportOptions, console: Console) -> ExportReport:
    """Export some of the stages and compare them, as :func:`build_bundle` does; nothing is kept.

    Raises:
        ExportError: a stage cannot be exported or does not agree with PyTorch.
    """
    with (
        tempfile.TemporaryDirectory(prefix="odise-export-") as folder,
        BundleWriter(Path(folder) / "checked") as writer,
        ExportProgress(_steps(options), console) as progress,
    ):
        return Exporter(source, writer, options, progress).run()


def _steps(options: ExportOptions) -> int:
    return 2 + 4 * len(options.stages) + (2 if options.stages == STAGES else 0)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
