"""From an engine of a bundle to a stage that runs, and the comparison that it must pass before it may."""

from __future__ import annotations

import logging
import time

from odise_rt.backends.base import Stage, StageFacts
from odise_rt.backends.device import CudaSession
from odise_rt.backends.trt import TrtEngine, TrtStage
from odise_rt.engine_check import check_stage
from odise_rt.engine_facts import CHANNELS_LAST, TITLES, Machine
from odise_rt.engines import Engine
from odise_rt.errors import BackendError
from odise_rt.specs import StageSpec

logger = logging.getLogger(__name__)


def open_engine_stage(
    engine: Engine, spec: StageSpec, session: CudaSession | None = None, threads: int | None = None
) -> Stage:
    """Load an engine that fits this machine.

    Args:
        engine: of any kind.
        spec: of its stage.
        session: of the backend; ``None``: one that is closed with the stage, and none for ONNX Runtime.
        threads: for the CPU side of ONNX Runtime; ``None``: the cores that this process may use.

    Raises:
        BackendError: the engine does not load, or is of another stage.
    """
    started = time.perf_counter()
    file = f"{engine.folder.parent.name}/{engine.folder.name}/{engine.path.name}"
    if engine.facts.engine == "ort-cuda":
        from odise_rt.backends.ort import OrtBackend

        backend = OrtBackend("cuda", threads, gpu_session=session)
        channels_last = CHANNELS_LAST in engine.facts.flags
        return backend.open_graph(engine.path, spec, file, engine.facts.precision, channels_last=channels_last)
    opened = CudaSession() if session is None else session
    try:
        with opened.use(f"loading stage {spec.name}"):  # it may wait for the whole device
            loaded = TrtEngine(engine, spec)
        facts = StageFacts(
            stage=spec.name,
            engine=f"{loaded.trt.__name__} {loaded.trt.__version__}",
            provider=f"{TITLES[engine.facts.engine]} on {opened.name}",
            device="cuda",
            file=file,
            load_seconds=time.perf_counter() - started,
            precision=engine.facts.precision,
        )
        return TrtStage(loaded, opened, spec, facts)
    except BaseException:
        if session is None:
            opened.close()
        raise


def verify_engine(engine: Engine, stage: Stage, spec: StageSpec, machine: Machine) -> Engine:
    """Compare an engine with its reference on this GPU, and write down that it agreed.

    Args:
        engine: that was not compared here.
        stage: the engine, loaded.
        spec: of the stage.
        machine: this one.

    Returns:
        The engine with the new entry; where the bundle cannot be written to, the next load compares again.

    Raises:
        BackendError: the engine is wrong here.
    """
    started, gpu = time.perf_counter(), machine.gpu or "this GPU"
    checks = check_stage(stage.run, spec, engine.reference(spec), engine.bounds)
    wrong = [check.describe(engine.bounds) for check in checks if not check.passed]
    if wrong:
        raise BackendError(
            f"the {engine.title} is wrong on {gpu}: {'; '.join(wrong)} compared with {engine.reference_by}; it is not "
            f"used: remove {engine.folder}, and build it here or use another engine"
        )
    logger.info(
        "%s agrees with %s on %s (%.1f s)", engine.title, engine.reference_by, gpu, time.perf_counter() - started
    )
    try:
        return engine.record_verification(machine, checks)
    except OSError as exc:
        logger.warning(
            "%s was compared, but that cannot be written down (%s): the next load compares again", engine.title, exc
        )
        return engine
