"""OpenVINO on CPU: the portable graphs of a bundle, compiled for the shapes that come, in float32 or bfloat16.

Processors with bfloat16 products (AVX512_BF16 or AMX) run the two networks of a picture in a good half of the time.
The mask decoder and the text encoder stay in float32 all the same: the decoder's attention masks are cut at a logit of
zero, where rounding to eight bits moves whole queries, and it is a small part of the work; words are encoded once.

OpenVINO compiles a graph for a device, and compilers err: the first time that a bundle is used on a processor, every
stage is compared with the same graph in ONNX Runtime (:mod:`odise_rt.backends.first_use`).
"""

from __future__ import annotations

import collections
import functools
import logging
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from odise_rt.backends.base import LARGE_BUNDLE_BYTES, Device, StageFacts, windows_that_fill
from odise_rt.backends.first_use import FirstUse
from odise_rt.backends.ort_binding import translate
from odise_rt.bundle import Bundle
from odise_rt.cores import usable_cores
from odise_rt.engine_check import FP32_BOUNDS, Bounds
from odise_rt.errors import BackendError, MissingPackageError, first_line
from odise_rt.specs import IMAGE_STAGES, StageSpec

logger = logging.getLogger(__name__)

OpenVinoPrecision = Literal["fp32", "bf16"]

KEPT_IN_FP32 = frozenset({"mask_decoder", "clip_text"})
"""Stages that bfloat16 does not reach; see above."""

MAX_SHAPES = 16
"""Shapes for which a stage keeps a compiled model."""
MAX_SHAPES_OF_LARGE = 2
"""The same for large bundles, since each of these models has weights of its own."""

BF16_BOUNDS: dict[str, Bounds] = {
    "clip_image": Bounds(5e-2, 1e-2),
    "unet_tap": Bounds(1e-1, 1e-2),
    "clip_mask": Bounds(5e-2, 1e-2),
}
"""Stages that bfloat16 reaches to how far their outputs may be from ONNX Runtime's. It has eight bits, and eight times
the rounding of fp16."""

_HINTS: dict[OpenVinoPrecision, str] = {"fp32": "f32", "bf16": "bf16"}


def import_openvino() -> Any:
    """The package, or a :class:`MissingPackageError` with the command that installs it."""
    # Importing it reports that to Google Analytics, through a package without which it uses a silent stand-in.
    reporting = "openvino_telemetry"
    silenced = reporting not in sys.modules
    if silenced:
        sys.modules[reporting] = None  # type: ignore[assignment]  # "not there", for the import system
    try:
        import openvino
    except ImportError as exc:
        raise MissingPackageError(
            "this CPU engine needs OpenVINO, which is not installed: pip install 'odise_rt[openvino]'"
        ) from exc
    finally:
        if silenced:
            del sys.modules[reporting]
    return openvino


def said(exc: BaseException) -> str:
    """What OpenVINO says went wrong: its messages begin with places in its own code."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from ", "Check '", "While validating"))]
    return telling[0][:300] if telling else first_line(exc)


@functools.cache
def shared_core() -> Any:
    """OpenVINO's runtime, one for the process and until its end.

    With one for each backend, which took its plugin and threads along when it went, a later signal and fork ended the
    process with a segmentation fault (2026.4).
    """
    return import_openvino().Core()


@functools.cache
def working_openvino() -> dict[OpenVinoPrecision, str | None]:
    """Why a precision cannot be used here, or ``None`` if it can.

    Raises:
        MissingPackageError: OpenVINO is not installed.
    """
    import_openvino()
    try:
        core = shared_core()
        abilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception as exc:  # the bindings raise RuntimeError for everything
        problem = f"OpenVINO has no CPU plugin that works: {first_line(exc)}"
        return {"fp32": problem, "bf16": problem}
    slow = None if "BF16" in abilities else "this processor has no bfloat16 products (AVX512_BF16 or AMX)"
    return {"fp32": None, "bf16": slow}


class OpenVinoBackend:
    """Loads stages into OpenVINO's CPU plugin."""

    def __init__(
        self, precision: OpenVinoPrecision = "fp32", threads: int | None = None, first_use: FirstUse | None = None
    ) -> None:
        """Start the engine.

        Args:
            precision: of the products of the networks; sums and everything between the graphs are float32.
            threads: ``None``: the cores that this process may use.
            first_use: compares stages before they are used for the first time; ``None``: nothing is compared.

        Raises:
            MissingPackageError: OpenVINO is not installed.
            BackendError: the processor lacks what the precision needs.
        """
        openvino = import_openvino()
        problem = working_openvino()[precision]
        if problem is not None:
            raise BackendError(
                f"OpenVINO cannot run in {precision} here: {problem}; use cpu_engine='openvino' or 'onnxruntime'"
            )
        self.precision: OpenVinoPrecision = precision
        self.threads = threads or usable_cores()
        self.version = str(openvino.__version__).split("-")[0]
        self._openvino = openvino
        self._core = shared_core()
        self.processor = str(self._core.get_property("CPU", "FULL_DEVICE_NAME"))
        self._first_use = first_use

    @property
    def device(self) -> Device:
        """Where stages run."""
        return "cpu"

    @property
    def description(self) -> str:
        """Engine, precision and threads in one line."""
        return f"openvino {self.version} on CPU, {self.precision}, {self.threads} threads"

    def windows_per_batch(self, side: int) -> int:
        """As many windows as fill the device."""
        return windows_that_fill("cpu", side)

    def keeps_loaded(self, _bundle: Bundle, _stage: str) -> bool:
        """Always: compiling takes longer than running."""
        return True

    def load(self, bundle: Bundle, stage: str) -> OpenVinoStage:
        """Load the portable graph of a stage, and compare it where that was never done.

        Raises:
            BackendError: OpenVINO refuses the graph, or computes something else than ONNX Runtime.
            MissingPackageError: ONNX Runtime is needed for the comparison and not installed.
        """
        precision: OpenVinoPrecision = "fp32" if stage in KEPT_IN_FP32 else self.precision
        bounds = (FP32_BOUNDS if precision == "fp32" else BF16_BOUNDS)[stage]
        comparison = None
        if self._first_use is not None:
            # Before the stage is loaded: both engines need memory.
            identity = f"openvino {self.version}, {precision}, {self.processor}"
            comparison = self._first_use.comparison(bundle, stage, identity, bounds, self.threads)
        loaded = self._open(bundle, stage, precision)
        if comparison is not None:
            try:
                comparison.check(loaded.run)
            except BaseException:
                loaded.close()
                raise
        return loaded

    def _open(self, bundle: Bundle, stage: str, precision: OpenVinoPrecision) -> OpenVinoStage:
        spec, path = bundle.stages[stage].spec, bundle.stage_file(stage).path
        started = time.perf_counter()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            # A container may have given this process two threads of one core, and other processes use it, too.
            "ENABLE_HYPER_THREADING": True,
            "ENABLE_CPU_PINNING": False,
        }
        # With the sizes as constants much of a graph is computed ahead, in float32: faster, and in bfloat16 the only
        # way, since it rounds whole numbers above 256, as positions in a window are. Prompts come in any number.
        fixed = stage in IMAGE_STAGES
        try:
            model = self._core.read_model(str(path))
            _without_abs(self._openvino, model)
        except Exception as exc:
            raise translate(exc, f"OpenVINO {self.version} cannot load stage {stage} from {path}", said(exc)) from exc
        facts = StageFacts(
            stage=stage,
            engine=f"openvino {self.version}",
            provider=f"CPU ({self.processor})",
            device="cpu",
            file=path.relative_to(bundle.root).as_posix(),
            load_seconds=time.perf_counter() - started,
            precision=precision,
        )
        logger.info("stage %s: %s, %s, loaded in %.2f s", stage, facts.engine, precision, facts.load_seconds)

        def compile_for(shapes: Mapping[str, tuple[int, ...]]) -> Any:
            copy = model.clone()
            if fixed:
                copy.reshape({name: list(shape) for name, shape in shapes.items()})
            return self._core.compile_model(copy, "CPU", settings)

        large = bundle.graph_bytes() >= LARGE_BUNDLE_BYTES
        return OpenVinoStage(spec, facts, compile_for, fixed, MAX_SHAPES_OF_LARGE if large else MAX_SHAPES)


class OpenVinoStage:
    """One graph with its compiled models. Safe to share between threads."""

    def __init__(self, spec: StageSpec, facts: StageFacts, compile_for: Any, fixed: bool, max_shapes: int) -> None:
        """Wrap a graph.

        Args:
            spec: of the stage.
            facts: for results.
            compile_for: from input name to shape, gives OpenVINO's compiled model.
            fixed: whether such a model is for that shape only.
            max_shapes: for which models are kept.
        """
        self.spec = spec
        self.facts = facts
        self._fixed, self._max_shapes = fixed, max_shapes
        self._compile: Any = compile_for
        self._lock = threading.Lock()
        self._models: collections.OrderedDict[tuple[tuple[int, ...], ...], _CompiledModel] = collections.OrderedDict()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see :class:`odise_rt.backends.base.Stage`. The first run of a shape may compile it."""
        self.spec.check(inputs)
        try:
            return self._model_for(inputs).run(inputs, [tensor.name for tensor in self.spec.outputs])
        except BackendError:
            raise
        except Exception as exc:
            shapes = ", ".join(f"{k} {v.shape}" for k, v in inputs.items())
            raise translate(exc, f"stage {self.spec.name} failed on {shapes}", said(exc)) from exc

    def _model_for(self, inputs: Mapping[str, np.ndarray]) -> _CompiledModel:
        shapes = {tensor.name: inputs[tensor.name].shape for tensor in self.spec.inputs}
        key = tuple(shapes.values()) if self._fixed else ()
        with self._lock:
            if self._compile is None:
                raise BackendError(f"stage {self.spec.name} is closed: load the segmenter again")
            model = self._models.pop(key, None)
            if model is None:
                while len(self._models) >= self._max_shapes:  # before the new one needs the memory
                    self._models.popitem(last=False)
                model = _CompiledModel(self._compile(shapes))
            self._models[key] = model
            return model

    def close(self) -> None:
        """Release the graph. Safe to call twice."""
        with self._lock:
            self._models.clear()
            self._compile = None


class _CompiledModel:
    """A model of OpenVINO and its requests, one for each thread that runs it at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._idle: collections.deque[Any] = collections.deque()

    def run(self, inputs: Mapping[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._model.create_infer_request()
        request.infer(dict(inputs), share_inputs=True)
        # The request writes its outputs to the same place again.
        found = {name: np.array(request.get_tensor(name).data) for name in outputs}
        self._idle.append(request)
        return found


def _without_abs(openvino: Any, model: Any) -> None:
    """Write |x| as max(x, -x).

    Once sizes are constants, OpenVINO (2026.4) computes what follows from them ahead and loses an Abs on the way; in
    the graphs it is part of the bicubic weights.
    """
    operators = openvino.opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Abs":
            value = node.input_value(0)
            absolute = operators.maximum(value, operators.negative(value))
            absolute.set_friendly_name(node.get_friendly_name())
            openvino.utils.replace_node(node, absolute)
