"""A bundle on a GPU: for each stage the best engine that fits this machine, else its graph in ONNX Runtime on CUDA.

What fits is decided before anything is loaded, and what was chosen is in every result; a stage for which nothing fits
is an error that says why, engine by engine.
"""

from __future__ import annotations

import logging
import threading

from odise_rt.backends.base import Device, Stage, windows_that_fill
from odise_rt.backends.device import CudaSession
from odise_rt.backends.engine_stage import open_engine_stage, verify_engine
from odise_rt.backends.machine import this_machine
from odise_rt.backends.ort import OrtBackend, working_provider
from odise_rt.bundle import Bundle
from odise_rt.engine_facts import ENGINE_KINDS, TITLES, Machine
from odise_rt.engines import Engine, Engines, find_engines
from odise_rt.errors import BackendError, MissingPackageError
from odise_rt.kernels.native import why_no_kernels
from odise_rt.specs import STAGES

logger = logging.getLogger(__name__)


class CudaBackend:
    """Chooses and loads engines of one bundle."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Choose an engine for every stage.

        Args:
            bundle: opened.
            threads: for the CPU side of ONNX Runtime; ``None``: the cores that this process may use.

        Raises:
            BackendError: a stage cannot run on a GPU here; the message has the reasons.
        """
        self.threads = threads
        self._machine = this_machine()
        self._engines = find_engines(bundle)
        self._no_ort = _why_no_ort_cuda()
        self._session: CudaSession | None = None
        self._opening = threading.Lock()
        self._hashed: set[str] = set()
        self._chosen: dict[str, Engine | None] = {stage: self._choose(bundle, stage) for stage in STAGES}
        text = self._chosen["clip_text"]
        self.text_precision = bundle.precision if text is None else text.facts.precision
        """Inside the text encoder; embeddings on disk depend on it."""

    @property
    def device(self) -> Device:
        """Where stages run."""
        return "cuda"

    @property
    def description(self) -> str:
        """The engines by stage, in one line."""
        names: dict[str, list[str]] = {}
        for stage, engine in self._chosen.items():
            title = TITLES[engine.facts.engine] if engine is not None else f"{TITLES['ort-cuda']}, portable graph"
            names.setdefault(title, []).append(stage)
        parts = [f"{title}: {', '.join(stages)}" if len(names) > 1 else title for title, stages in names.items()]
        return f"{'; '.join(parts)} on {self._machine.gpu or 'CUDA'}"

    def windows_per_batch(self, side: int) -> int:
        """As many as the engines were built for."""
        counts = []
        for stage in ("clip_image", "unet_tap"):
            engine = self._chosen[stage]
            if engine is not None and engine.facts.profiles:
                ranges = [profile["windows"] for profile in engine.facts.profiles]
                counts.append(max((r.max[0] for r in ranges if r.min[3] <= side <= r.max[3]), default=1))
        return min(counts) if counts else windows_that_fill(self.device, side)

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """Always: loading an engine takes longer than running it."""
        return True

    def load(self, bundle: Bundle, stage: str) -> Stage:
        """Load the chosen engine; one that was never compared on this GPU is compared first."""
        engine = self._chosen[stage]
        spec = bundle.stages[stage].spec
        if engine is None:
            return self._load_portable(bundle, stage)
        if bundle.verified and stage not in self._hashed:
            engine.verify_files()
            self._hashed.add(stage)
        session = self._open_session(engine)
        try:
            loaded = open_engine_stage(engine, spec, session, self.threads)
        finally:
            if session is not None:
                session.release()  # the stage holds it by now, or nobody needs it
        if not engine.is_verified_on(self._machine):
            try:
                self._chosen[stage] = verify_engine(engine, loaded, spec, self._machine)
            except BaseException:
                loaded.close()
                raise
        logger.info("stage %s: %s", stage, loaded.facts.provider)
        return loaded

    def _load_portable(self, bundle: Bundle, stage: str) -> Stage:
        """The bundle's own graph in ONNX Runtime."""
        session = self._open_session(None)
        try:
            return OrtBackend("cuda", self.threads, gpu_session=session).load(bundle, stage)
        finally:
            if session is not None:
                session.release()

    def _open_session(self, engine: Engine | None) -> CudaSession | None:
        """The session of all stages, retained for the caller: the end of the last stage does not close it.

        ONNX Runtime can do without, on a stream of its own.
        """
        needed = engine is not None and engine.facts.engine != "ort-cuda"
        if not needed and why_no_kernels() is not None:
            return None
        with self._opening:
            if self._session is None or not self._session.retain():
                self._session = CudaSession()
                self._session.retain()
            return self._session

    def _choose(self, bundle: Bundle, stage: str) -> Engine | None:
        """The best engine; ``None``: the bundle's graph in ONNX Runtime on CUDA."""
        for kind in ENGINE_KINDS:
            if kind == "ort-cuda" and self._no_ort is not None:
                continue
            engine = self._engines.fitting(bundle, self._machine, stage, kind)
            if engine is not None:
                return engine
            if self._engines.knows(stage, kind):
                logger.warning("engine not used: %s", self._engines.why_not(bundle, self._machine, stage, kind))
        if self._no_ort is None:
            return None
        raise BackendError(why_no_cuda(bundle, self._machine, self._engines, self._no_ort, stage))


def why_no_cuda(bundle: Bundle, machine: Machine, engines: Engines, no_ort: str, stage: str) -> str:
    """Everything that keeps a stage from running on a GPU here."""
    reasons = [machine.no_gpu] if machine.no_gpu else []
    present = [kind for kind in ENGINE_KINDS if engines.knows(stage, kind)]
    reasons += [engines.why_not(bundle, machine, stage, kind) for kind in present if kind != "ort-cuda"]
    if not present:
        reasons.append(
            f"the bundle has no engine of {stage} (python -m export.build_engines --bundle {bundle.root} ...)"
        )
    reasons.append(no_ort)
    return f"device 'cuda' cannot be used: {'; '.join(reasons)}; run `odise-rt doctor`, or use device='cpu'"


def _why_no_ort_cuda() -> str | None:
    try:
        return working_provider("cuda")
    except MissingPackageError as exc:
        return str(exc)
