"""Adds engines to a bundle: for each kind and stage a graph in the right form, the engine, and a comparison with what
the stage must compute, before the engine is put in place.

An engine whose facts are those of one that is there already is not built again. Each is put in place by itself, so an
interrupted run keeps what it finished.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from export.cpu_check import CpuCheck
from export.engine_folder import EngineFolder, existing_engine
from export.engine_from_onnx import BuildJob, build_flags
from export.engine_graphs import PreparedGraph, graph_blocks, precision_advice, prepare_graph
from export.engine_options import RTX_TARGETS, EngineOptions, check_engine_options, why_not_compared
from export.engine_process import build_in_process
from export.engine_profiles import EngineShapes, engine_shapes, stage_profiles
from export.engine_reference import References, references_from_bundle
from export.precision import EnginePrecision, Precision
from export.precision_search import search_precision
from export.progress import ExportProgress
from export.tolerances import stage_bounds
from odise_rt.backends.engine_stage import open_engine_stage
from odise_rt.backends.machine import this_machine
from odise_rt.bundle import Bundle, file_sha256
from odise_rt.embedding_cache import default_cache_dir
from odise_rt.engine_check import Case, OutputCheck, check_stage
from odise_rt.engine_facts import TITLES, EngineFacts, EngineKind, Machine, Profile
from odise_rt.engines import REFERENCE_FILE, Engine, find_engines, write_engine_file, write_reference
from odise_rt.errors import ExportError

_WORKSPACE_SHARE = 0.8
"""Share of the GPU's free memory that a build may use; the rest is for the engine's weights and for other processes."""


@dataclass
class EngineReport:
    """The engines of a run."""

    built: list[Engine] = field(default_factory=list)
    kept: list[Engine] = field(default_factory=list)
    """Engines that were there already."""


def add_engines(
    bundle: Bundle,
    options: EngineOptions,
    console: Console,
    references: References | None = None,
    machine: Machine | None = None,
    report: EngineReport | None = None,
) -> EngineReport:
    """Build engines and put them into a bundle.

    Args:
        bundle: opened.
        options: which engines.
        console: shows progress.
        references: of PyTorch, during an export; ``None``: the bundle's own graphs on the CPU are the reference.
        machine: ``None``: this one.
        report: filled as engines are finished, for a caller who wants it after an error as well; ``None``: a new one.

    Raises:
        MissingPackageError: the package of an engine is not installed.
        OptionsError: a size or a count of windows is out of range.
        ExportError: an engine cannot be built here or does not agree. Those that were finished before stay.
    """
    machine = this_machine() if machine is None else machine
    check_engine_options(options, machine, bundle.precision)
    shapes = engine_shapes(bundle.facts, options.sizes, options.windows)
    precision = options.precision or _precision_of(bundle)
    report = EngineReport() if report is None else report
    steps = len(options.kinds) * len(options.stages) + (references is None)
    with ExportProgress(steps, console) as progress:
        if references is None:
            with progress.step("run the CPU graphs on two pictures"):
                references = references_from_bundle(bundle, max(options.windows), options.threads)
        for kind in options.kinds:
            for stage in options.stages:
                with progress.step(f"{stage}: {TITLES[kind]}, {precision}"):
                    build = _StageBuild(bundle, stage, kind, precision, options, shapes, machine, references, progress)
                    engine, is_new = build.run()
                (report.built if is_new else report.kept).append(engine)
    return report


def _precision_of(bundle: Bundle) -> Precision:
    return "fp16" if bundle.precision == "fp16" else "fp32"


@dataclass(frozen=True)
class _StageBuild:
    """One engine of one stage."""

    bundle: Bundle
    stage: str
    kind: EngineKind
    precision: EnginePrecision
    options: EngineOptions
    shapes: EngineShapes
    machine: Machine
    references: References
    progress: ExportProgress

    def run(self) -> tuple[Engine, bool]:
        """The engine, and whether it is new."""
        with EngineFolder(self.bundle, f"{self.stage}.{self.kind}") as folder:
            graph = self._graph(folder.path)
            known = None if self.options.rebuild else self._existing(graph)
            if known is not None:
                self.progress.note(f"{known.folder.name} is up to date")
                return known, False
            write_reference(folder.path / REFERENCE_FILE, self._cases)
            engine = self._build(graph, folder.path)
            problem = why_not_compared(self.kind, self.options, self.machine)
            if problem is not None:
                self.progress.note(f"not compared: {problem}; the runtime does it at its first load")
                return folder.publish(engine.facts.key), True
            checks = self._compare(engine)
            if self.precision != "fp32" and not all(check.passed for check in checks):
                engine, checks = self._search(graph, engine, checks, folder.path)
            self._judge(engine, checks)
            return folder.publish(engine.facts.key), True

    def _existing(self, graph: PreparedGraph) -> Engine | None:
        """An engine of these facts, or of a graph that a search on the GPU made of this one."""
        facts, bounds = self._facts(graph), stage_bounds(self.stage, self.precision)
        known = existing_engine(self.bundle, facts.key, bounds)
        if known is not None:
            return known
        for engine in find_engines(self.bundle).of(self.stage, self.kind):
            same = replace(engine.facts, built_graph=graph.digest) == facts
            if same and engine.build.get("searched_from") == graph.digest:
                return existing_engine(self.bundle, engine.facts.key, bounds)
        return None

    def _search(
        self, graph: PreparedGraph, engine: Engine, checks: list[OutputCheck], folder: Path
    ) -> tuple[Engine, list[OutputCheck]]:
        """Find the blocks that do not bear the precision on this GPU, although they do on the CPU, and keep them in
        float32."""
        problem = next(check.describe(engine.bounds) for check in checks if not check.passed)
        self.progress.note(f"{self.precision} is not good enough on the GPU ({problem}): looking for the block")
        last = (engine, checks)

        def agrees(keep: Collection[str]) -> bool:
            nonlocal last
            tried = self._build(self._graph(folder, keep, quiet=True), folder, searched_from=graph.digest)
            last = (tried, self._compare(tried))
            return all(check.passed for check in last[1])

        file = self.bundle.stages[self.stage].file
        # The last graph that is tried is the one that agrees.
        advice = precision_advice(self.bundle.precision)
        search = search_precision(graph_blocks(file.path), agrees, self.stage, advice, problem)
        self.progress.note(f"in float32, as they do not bear {self.precision} here: " + ", ".join(search.kept))
        return last

    @property
    def _cases(self) -> Sequence[Case]:
        return self.references.cases[self.stage]

    def _graph(self, folder: Path, keep: Collection[str] = (), quiet: bool = False) -> PreparedGraph:
        entry = self.bundle.stages[self.stage]
        bounds = stage_bounds(self.stage, self.precision)
        graph = prepare_graph(
            entry.file,
            self.kind,
            CpuCheck(entry.spec, self._cases, bounds, folder, self.options.threads),
            from_precision=self.bundle.precision,
            precision=self.precision,
            keep=keep,
        )
        for line in () if quiet else graph_notes(graph.notes):
            self.progress.note(line)
        return graph

    def _profiles(self) -> tuple[Profile, ...]:
        if self.kind == "ort-cuda":
            return ()
        spec = self.bundle.stages[self.stage].spec
        return stage_profiles(spec, self.bundle.facts, self.shapes, few=self.kind == "tensorrt-rtx")

    def _targets(self) -> tuple[str, ...]:
        if self.kind != "tensorrt-rtx":
            return ()
        here = self.machine.compute_capability
        return self.options.targets or ((here,) if here is not None else RTX_TARGETS)

    def _facts(self, graph: PreparedGraph) -> EngineFacts:
        bound = self.kind == "tensorrt"  # to the device that it is built on
        any_version = self.kind == "ort-cuda"
        return EngineFacts(
            stage=self.stage,
            engine=self.kind,
            engine_version="any" if any_version else self.machine.versions[self.kind],
            cuda=None if any_version else self.machine.cuda.get(self.kind),
            platform="any" if any_version else self.machine.platform,
            gpu=self.machine.gpu if bound else None,
            compute_capability=self.machine.compute_capability if bound else None,
            targets=self._targets(),
            graph=self.bundle.stages[self.stage].file.digest,
            built_graph=graph.digest,
            precision=self.precision,
            profiles=self._profiles(),
            flags=build_flags(self.kind, self.options.optimization_level),
        )

    def _build(self, graph: PreparedGraph, folder: Path, searched_from: str | None = None) -> Engine:
        """The engine, with its description, in the partial folder."""
        facts = self._facts(graph)
        notes: dict[str, Any] = {"passes": dict(graph.notes), "searched_from": searched_from}
        files = [graph.path, graph.weights]
        if self.kind != "ort-cuda":
            files = [self._compile(graph, facts, folder, notes)]
        engine = Engine(
            folder=folder,
            facts=facts,
            files={path.name: file_sha256(path) for path in sorted([*files, folder / REFERENCE_FILE])},
            bounds=stage_bounds(self.stage, self.precision),
            reference_by=self.references.by,
            verified=(),
            build=notes,
        )
        write_engine_file(engine)
        return engine

    def _compile(self, graph: PreparedGraph, facts: EngineFacts, folder: Path, notes: dict[str, Any]) -> Path:
        """Build the plan of a graph, in a process of its own."""
        job = BuildJob(
            stage=self.stage,
            engine=self.kind,
            graph=graph.path,
            plan=folder / f"{self.stage}.plan",
            profiles=facts.profiles,
            targets=facts.targets,
            workspace_bytes=_workspace(self.machine),
            timing_cache=self._timing_cache(),
            optimization_level=self.options.optimization_level,
        )
        job.plan.unlink(missing_ok=True)
        result = build_in_process(job, folder, self.progress.note)
        graph.path.unlink()
        graph.weights.unlink()
        self.progress.note(f"{result.layers} layers, {result.plan_bytes / 1e6:.1f} MB, built in {result.seconds:.1f} s")
        notes |= {"seconds": result.seconds, "workspace_bytes": job.workspace_bytes}
        return job.plan

    def _timing_cache(self) -> Path | None:
        """The file of timings for this engine version and GPU; those of another say nothing."""
        folder = default_cache_dir()
        if folder is None or not self.options.timing_cache or self.kind != "tensorrt":
            return None
        gpu = "".join(c if c.isalnum() else "-" for c in self.machine.gpu or "none")
        return folder / "timing" / f"{self.kind}-{self.machine.versions[self.kind]}-{gpu}.cache"

    def _compare(self, engine: Engine) -> list[OutputCheck]:
        """Run the engine on the GPU beside its reference."""
        spec = self.bundle.stages[self.stage].spec
        stage = open_engine_stage(engine, spec, threads=self.options.threads)
        try:
            return check_stage(stage.run, spec, self._cases, engine.bounds)
        finally:
            stage.close()

    def _judge(self, engine: Engine, checks: list[OutputCheck]) -> None:
        """Write down that an engine agrees, or refuse it."""
        wrong = [check.describe(engine.bounds) for check in checks if not check.passed]
        if wrong:
            raise ExportError(
                f"stage {self.stage}: the {TITLES[self.kind]} engine does not agree with {engine.reference_by} on "
                f"{self.machine.gpu}, although its graph does on the CPU: {'; '.join(wrong)}; use another engine"
            )
        worst = max(check.relative_max for check in checks)
        self.progress.note(f"agrees with {engine.reference_by} on {self.machine.gpu}: off by at most {worst:.1e}")
        engine.record_verification(self.machine, checks)


def graph_notes(notes: Mapping[str, Any]) -> list[str]:
    """Lines that tell a person what the passes over a graph did."""
    lines = []
    fusion = notes.get("fusion")
    if fusion:
        lines.append("fused: " + ", ".join(f"{count} {name}" for name, count in fusion.items() if count))
    if notes.get("grid_samples_as_gathers"):
        lines.append(f"{notes['grid_samples_as_gathers']} grid samplings written as gathers")
    if notes.get("blocks_kept_fp32"):
        lines.append("in float32, as they do not bear less: " + ", ".join(notes["blocks_kept_fp32"]))
    return lines


def _workspace(machine: Machine) -> int | None:
    """Scratch memory that tactics may use, in bytes."""
    if machine.gpu is None:
        return None
    from odise_rt.backends.cuda_core import free_memory

    return int(free_memory() * _WORKSPACE_SHARE)
