"""ONNX Runtime on CPU or CUDA.

The package comes as ``onnxruntime`` (CPU) or ``onnxruntime-gpu``, which install the same folder; neither is a hard
dependency. ONNX Runtime answers a request for CUDA that it cannot serve with a logged warning and runs on CPU, so the
providers of every session are compared with what was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.backends.base import LARGE_BUNDLE_BYTES, Device, StageFacts, windows_that_fill
from odise_rt.backends.device import CudaSession
from odise_rt.backends.driver import nvidia_driver, why_too_old
from odise_rt.backends.ort_binding import BoundRuns, BoundSession, translate
from odise_rt.bundle import Bundle
from odise_rt.cores import usable_cores
from odise_rt.errors import BackendError, MissingPackageError, first_line
from odise_rt.specs import StageSpec

logger = logging.getLogger(__name__)

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
VARIANTS: dict[Device, str | None] = {"cpu": "ort-cpu", "cuda": None}
"""Graphs of a bundle that are preferred over the portable ones, by device. Those for CUDA are among the bundle's
engines (:mod:`odise_rt.engines`)."""

CUDA_OPTIONS: dict[str, str] = {
    "device_id": "0",
    # Portable graphs have channels first, which is slow in fp16. The price: sizes of a graph that is not for one size
    # alone are computed on the GPU, and copied back.
    "prefer_nhwc": "1",
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    "use_tf32": "0",
    # Of powers of two, half of the memory would be taken for nothing.
    "arena_extend_strategy": "kSameAsRequested",
}
"""Options of the CUDA provider. TF32 is off: a graph that keeps a part in float32 means it."""

_ARRAYS_ON_GPU = "cuda"
"""Where arrays lie, in ONNX Runtime's words."""

_MAPPED_STAGES = frozenset({"clip_image", "clip_mask"})
"""Stages whose weights are nearly all matrices: mapped from the file, they load in a tenth of a second, so those of a
large bundle are released after each run and their memory serves the next stage. Convolutions are always copied."""

# An ONNX model of one Identity, float32 (1,) -> (1,), opset 13: enough to learn whether a provider really works.
_PROBE_MODEL = bytes.fromhex(
    "08083a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)


def import_onnxruntime(device: Device = "cpu") -> Any:
    """The package, or a :class:`MissingPackageError` with the command that installs it.

    Args:
        device: on ``"cuda"``, CUDA's libraries are loaded, too, from wherever pip has put them: the package does not
            look there by itself.
    """
    # Its official builds report their use to Microsoft from the first import on, unless told not to by then.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingPackageError(
            "running a bundle needs ONNX Runtime, which is not installed: "
            "pip install 'odise_rt[cpu]' (or 'odise_rt[gpu]' for NVIDIA GPUs)"
        ) from exc
    if device == "cuda":
        _load_cuda(onnxruntime)
    return onnxruntime


@functools.cache
def _load_cuda(ort: Any) -> None:
    """Load CUDA's libraries once, if the package is made for CUDA. It prints what it does not find."""
    if not hasattr(ort, "preload_dlls"):  # before 1.21
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for folder in _cuda_folders(Path(ort.__file__).parents[1]):
            ort.preload_dlls(directory=folder)
    logger.debug("onnxruntime's search for CUDA's libraries: %s", said.getvalue().strip() or "all found")


def _cuda_folders(packages: Path) -> list[str | None]:
    """Where pip has put CUDA's libraries: ``None`` for beside onnxruntime, the only place where that looks.

    They lie elsewhere where onnxruntime came by ``pip install --target``, or by the ``PYTHONPATH``. CUDA 13 has one
    folder and cuDNN another, in this order: what a folder lacks is looked for where the system looks.

    Args:
        packages: the folder that onnxruntime is installed in.
    """
    if (packages / "nvidia").is_dir():
        return [None]
    found = importlib.util.find_spec("nvidia")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    folders = sorted(str(folder) for place in places for folder in place.glob("*/lib") if folder.is_dir())
    return [*folders, None]


def _why_no_cuda(ort: Any) -> str | None:
    """What of CUDA is missing that the package is made for; ``None`` for a package that is not made for CUDA."""
    made_for = getattr(ort, "cuda_version", "")
    if not made_for:
        return None
    if nvidia_driver() is None:
        return "there is no NVIDIA driver here"
    return why_too_old(f"onnxruntime-gpu {ort.__version__}", int(made_for.split(".")[0]))


def _why_not_loaded(ort: Any) -> str:
    """What the system says of the CUDA provider's library, which ONNX Runtime only logs."""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as exc:
        return f" ({first_line(exc)}): pip install 'odise_rt[gpu]' brings CUDA's libraries"
    return ""


@functools.cache
def working_provider(device: Device) -> str | None:
    """Why a device cannot be used, or ``None`` if it works: a session is really made and run on it."""
    ort = import_onnxruntime()
    provider = PROVIDERS[device]
    available = ort.get_available_providers()
    if provider not in available:
        return f"onnxruntime {ort.__version__} has no {provider} (it has {', '.join(available)})"
    if device == "cuda":
        problem = _why_no_cuda(ort)
        if problem is not None:
            return f"{provider} cannot start: {problem}"
        _load_cuda(ort)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(_PROBE_MODEL, options, providers=[provider])
        session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as exc:  # the bindings raise many unrelated types
        return f"{provider} failed: {first_line(exc)}"
    if session.get_providers()[0] != provider:
        return f"{provider} did not start{_why_not_loaded(ort)}"
    return None


class OrtBackend:
    """Loads stages into ONNX Runtime sessions."""

    def __init__(
        self,
        device: Device,
        threads: int | None = None,
        cuda_graph: bool = False,
        gpu_session: CudaSession | None = None,
    ) -> None:
        """Choose a device.

        Args:
            device: ``"cpu"`` or ``"cuda"``.
            threads: threads inside an operator. ``None``: the cores that this process may use.
            cuda_graph: on CUDA, capture a graph for each of the first few shapes, and anew for each thread that runs a
                stage. ONNX Runtime refuses that for the portable graphs of a bundle, in which sizes are copied between
                CPU and GPU; graphs of ``ort-cuda`` engines have no such copies.
            gpu_session: on CUDA, stages run on its stream, can be bound to arrays on the GPU, and hold it until they
                are closed; ``None``: on a stream of ONNX Runtime's own.

        Raises:
            MissingPackageError: onnxruntime is not installed.
            BackendError: the device does not work here.
        """
        ort = import_onnxruntime()
        problem = working_provider(device)
        if problem:
            raise BackendError(
                f"device {device!r} cannot be used: {problem}; run `odise-rt doctor`, or use device='cpu'"
            )
        self.device: Device = device
        self.threads = threads or usable_cores()
        self.cuda_graph = cuda_graph and device == "cuda"
        self._gpu_session = gpu_session if device == "cuda" else None
        self._ort = ort

    @property
    def description(self) -> str:
        """Engine, provider and threads in one line."""
        return f"onnxruntime {self._ort.__version__} on {PROVIDERS[self.device]}, {self.threads} threads"

    def windows_per_batch(self, side: int) -> int:
        """As many windows as fill the device."""
        return windows_that_fill(self.device, side)

    def load(self, bundle: Bundle, stage: str) -> OrtStage:
        """Load the graph of a stage, the device's variant if the bundle has one."""
        file = bundle.stage_file(stage, VARIANTS[self.device])
        relative = file.path.relative_to(bundle.root).as_posix()
        large = self._is_large(bundle)
        return self.open_graph(file.path, bundle.stages[stage].spec, relative, bundle.precision, large)

    def open_graph(
        self,
        path: Path,
        spec: StageSpec,
        file: str,
        precision: str = "",
        large: bool = False,
        channels_last: bool = False,
    ) -> OrtStage:
        """Load a graph file.

        Args:
            path: the file, its weights beside it.
            spec: what it must take and give.
            file: its name relative to the bundle, for results.
            precision: inside the graph, for results.
            large: read matrices where they lie in the file, and give working memory back after each run; see
                :data:`~odise_rt.backends.base.LARGE_BUNDLE_BYTES`.
            channels_last: the graph's convolutions have them, so that ONNX Runtime need not turn anything.

        Raises:
            BackendError: ONNX Runtime refuses the graph, runs it elsewhere, or it has other inputs or outputs.
        """
        started = time.perf_counter()
        wanted = PROVIDERS[self.device]
        try:
            providers = self._providers(channels_last)
            session = self._ort.InferenceSession(str(path), self._session_options(large), providers=providers)
        except Exception as exc:
            raise translate(exc, f"ONNX Runtime cannot load stage {spec.name} from {path}") from exc
        provider = session.get_providers()[0]
        if provider != wanted:
            raise BackendError(
                f"stage {spec.name} was to run on {wanted} but ONNX Runtime chose {provider}: run `odise-rt doctor`, "
                "or use device='cpu'"
            )
        facts = StageFacts(
            stage=spec.name,
            engine=f"onnxruntime {self._ort.__version__}",
            provider=provider,
            device=self.device,
            file=file,
            load_seconds=time.perf_counter() - started,
            precision=precision,
        )
        logger.info("stage %s: %s on %s, loaded in %.2f s", spec.name, facts.engine, provider, facts.load_seconds)
        run_options = None
        if large:
            run_options = self._ort.RunOptions()
            run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        on_gpu = self.device == "cuda"
        bound = BoundRuns(self._ort, session, spec, _ARRAYS_ON_GPU, self.cuda_graph) if on_gpu else None
        return OrtStage(session, spec, facts, run_options, bound, self._gpu_session)

    def _providers(self, channels_last: bool) -> list[Any]:
        if self.device == "cpu":
            return [PROVIDERS["cpu"]]
        # The CPU is there for the arithmetic of sizes; whether CUDA itself started is checked on the session.
        options = dict(CUDA_OPTIONS, enable_cuda_graph=str(int(self.cuda_graph)))
        if channels_last:
            options["prefer_nhwc"] = "0"
        if self._gpu_session is not None:
            options["user_compute_stream"] = str(self._gpu_session.handle)
        return [(PROVIDERS["cuda"], options), PROVIDERS["cpu"]]

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """All stages, but those of a large bundle that load in no time."""
        return stage not in _MAPPED_STAGES or not self._is_large(bundle)

    def _is_large(self, bundle: Bundle) -> bool:
        """Whether to be careful with memory; see :data:`~odise_rt.backends.base.LARGE_BUNDLE_BYTES`."""
        if self.device != "cpu":
            return False
        return bundle.graph_bytes(VARIANTS["cpu"]) >= LARGE_BUNDLE_BYTES

    def _session_options(self, large: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # what matters below errors is checked and logged here
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Every session has threads of its own: those of a stage that is done must not spin while the next one runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if large:
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options


class OrtStage:
    """One ONNX Runtime session. Safe to share between threads."""

    def __init__(
        self,
        session: Any,
        spec: StageSpec,
        facts: StageFacts,
        run_options: Any = None,
        bound: BoundRuns | None = None,
        gpu_session: CudaSession | None = None,
    ) -> None:
        """Wrap a session.

        Args:
            session: ONNX Runtime's.
            spec: of the stage.
            facts: for results.
            run_options: ONNX Runtime's, for every run.
            bound: runs the session on buffers of the device; ``None``: on arrays of the host.
            gpu_session: whose stream the session was made for.

        Raises:
            BackendError: the graph has other inputs or outputs than the spec, or the GPU session is closed.
        """
        found = {v.name for v in session.get_inputs()}, {v.name for v in session.get_outputs()}
        wanted = {t.name for t in spec.inputs}, {t.name for t in spec.outputs}
        if found != wanted:
            raise BackendError(
                f"the graph of stage {spec.name} has inputs {sorted(found[0])} and outputs {sorted(found[1])}, "
                f"expected {sorted(wanted[0])} and {sorted(wanted[1])}: export the bundle again"
            )
        self._session = session
        self._spec = spec
        self._run_options = run_options
        self._bound = bound
        self._outputs = [t.name for t in spec.outputs]
        self.facts = facts
        if gpu_session is not None and not gpu_session.retain():
            raise BackendError(f"the GPU was released before stage {spec.name} was loaded: load the segmenter again")
        self.session = gpu_session
        """The GPU session whose stream it runs on, if it was made for one."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see :class:`odise_rt.backends.base.Stage`."""
        dims = self._spec.check(inputs)
        with self._alone():
            session = self._session
            if session is None:
                raise BackendError(f"stage {self._spec.name} is closed: load the segmenter again")
            try:
                if self._bound is not None:
                    return self._bound.run(inputs, dims)
                outputs = session.run(self._outputs, dict(inputs), self._run_options)
            except Exception as exc:
                shapes = ", ".join(f"{k} {v.shape}" for k, v in inputs.items())
                raise translate(exc, f"stage {self._spec.name} failed on {shapes}") from exc
            return dict(zip(self._outputs, outputs, strict=True))

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """The GPU's stream for this thread, if there is one: what another thread captures on it would break, and so it
        would on any stream of the device, for whose end ONNX Runtime waits."""
        return contextlib.nullcontext() if self.session is None else self.session.use(f"stage {self._spec.name}")

    def bind(self, inputs: Mapping[str, Any]) -> BoundSession:
        """The session set up for arrays on the GPU like these, for a caller who holds the GPU session's lock.

        Raises:
            BackendError: the stage is closed, or the inputs do not fit it.
        """
        if self._session is None:
            raise BackendError(f"stage {self._spec.name} is closed: load the segmenter again")
        return BoundSession(import_onnxruntime(), self._session, self._spec, inputs, _ARRAYS_ON_GPU)

    def close(self) -> None:
        """Release the session. Safe to call twice."""
        with self._alone():
            is_open = self._session is not None
            self._session = self._bound = None  # before the stream that it works on
        if is_open and self.session is not None:
            self.session.release()
