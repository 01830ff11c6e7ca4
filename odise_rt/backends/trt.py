"""TensorRT and TensorRT-RTX engines on a GPU.

For every shape that a stage meets there are buffers on both sides, an execution context, and a CUDA graph of the
engine and the copies of its outputs; the least recently used ones go when there are more than :data:`MAX_SHAPES`. After
the first run of a shape a run copies its inputs, launches the graph, and allocates nothing on the GPU.

Written to the interface that TensorRT 10.16, 11 and TensorRT-RTX 1.7 document, and tested with a stand-in: this module
has not run on a GPU.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from odise_rt.backends.base import StageFacts
from odise_rt.backends.captured_work import CapturedWork
from odise_rt.backends.cuda_core import memory_error
from odise_rt.backends.device import CudaSession
from odise_rt.backends.device_arrays import DeviceArray, as_device_array, as_host_array
from odise_rt.backends.trt_package import import_package, make_logger
from odise_rt.engine_facts import EngineKind, Profile
from odise_rt.engines import Engine
from odise_rt.errors import BackendError, is_out_of_memory
from odise_rt.specs import StageSpec

logger = logging.getLogger(__name__)

MAX_SHAPES = 4
"""Shapes of a stage whose buffers and graph are kept. A folder of photographs has a few; each costs its inputs and
outputs, scratch memory is shared."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class TrtEngine:
    """A deserialized engine and the runtime that made it."""

    def __init__(self, engine: Engine, spec: StageSpec) -> None:
        """Load the plan.

        Args:
            engine: whose facts were found to fit this machine: TensorRT ends the process when it is started without a
                GPU.
            spec: of the stage.

        Raises:
            MissingPackageError: the engine's package is not installed.
            BackendError: TensorRT refuses the plan, or it has other inputs or outputs than the stage.
        """
        self.kind: EngineKind = engine.facts.engine
        self.profiles: tuple[Profile, ...] = engine.facts.profiles
        self.trt = import_package(self.kind)
        self.log = make_logger(self.trt)
        self._runtime = self.trt.Runtime(self.log)
        self.engine = self._runtime.deserialize_cuda_engine(engine.path.read_bytes())
        if self.engine is None:
            reason = self.log.last() or "it gives no reason"
            what = f"{engine.title} at {engine.path}"
            if is_out_of_memory(reason):
                raise memory_error(f"{what} cannot be loaded", reason)
            raise BackendError(
                f"{self.trt.__name__} {self.trt.__version__} refuses the {what}: {reason}; build it again on this "
                "machine"
            )
        self._check(engine, spec)

    def _check(self, engine: Engine, spec: StageSpec) -> None:
        mode = self.trt.TensorIOMode
        sides: dict[Any, dict[str, str]] = {mode.INPUT: {}, mode.OUTPUT: {}}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name))).name
            sides[self.engine.get_tensor_mode(name)][name] = dtype
        for found, tensors in ((sides[mode.INPUT], spec.inputs), (sides[mode.OUTPUT], spec.outputs)):
            wanted = {tensor.name: tensor.dtype for tensor in tensors}
            if found != wanted:
                raise BackendError(f"the {engine.title} has {found}, expected {wanted}: build it again")
        if self.engine.num_optimization_profiles != len(self.profiles):
            raise BackendError(
                f"the {engine.title} has {self.engine.num_optimization_profiles} profiles, engine.json lists "
                f"{len(self.profiles)}: build it again"
            )

    def profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The narrowest profile that holds the shapes; ``None`` if none does."""
        fitting = [
            (sum(float(np.prod(profile[name].max)) for name in shapes), index)
            for index, profile in enumerate(self.profiles)
            if all(profile[name].holds(shape) for name, shape in shapes.items())
        ]
        return min(fitting)[1] if fitting else None

    def new_context(self) -> Any:
        """An execution context in whose scratch memory somebody else has a say; ``None`` if TensorRT makes none.

        TensorRT-RTX compiles kernels for the shapes that it meets. By default it does so in the background and runs
        others meanwhile, which a captured graph would keep for good: so it is told to compile first.
        """
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialisation = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialisation is None:
            return self.engine.create_execution_context(user_managed)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        config.dynamic_shapes_kernel_specialization_strategy = specialisation.EAGER
        return self.engine.create_execution_context(config)

    def close(self) -> None:
        """Release the engine; order matters to TensorRT."""
        self.engine = None
        self._runtime = None


class BoundEngine:
    """An execution context for inputs of certain shapes; see :class:`odise_rt.backends.base.BoundStage`."""

    def __init__(
        self, engine: TrtEngine, session: CudaSession, spec: StageSpec, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Make the context.

        Args:
            engine: loaded; must outlive this.
            session: whose stream is used.
            spec: of the stage.
            shapes: of every input.

        Raises:
            BackendError: the engine was not built for these shapes, or TensorRT refuses them.
        """
        index = engine.profile_for(shapes)
        if index is None:
            raise BackendError(_outside(engine, spec, shapes))
        self._engine = engine
        self._session = session
        self._stage = spec.name
        engine.log.clear()
        self._context = engine.new_context()
        self._check(self._context is not None, "an execution context cannot be made")
        chosen = self._context.set_optimization_profile_async(index, session.handle)
        self._check(chosen, f"profile {index} was refused")
        for name, shape in shapes.items():
            self._check(self._context.set_input_shape(name, shape), f"shape {shape} of {name} was refused")
        missing = self._context.infer_shapes()
        self._check(not missing, f"shapes of {missing} are not known")
        self.outputs = {t.name: tuple(int(v) for v in self._context.get_tensor_shape(t.name)) for t in spec.outputs}
        """Shape of every output."""
        self.scratch_bytes = int(self._context.update_device_memory_size_for_shapes())
        logger.info("stage %s: set up for %s with profile %d", spec.name, dict(shapes), index)

    @property
    def capturable(self) -> bool:
        """See :class:`odise_rt.backends.base.BoundStage`. TensorRT-RTX may say so only after the first run."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._session.handle))

    def use_scratch(self, scratch: Any) -> None:
        """See :class:`odise_rt.backends.base.BoundStage`."""
        self._context.set_device_memory(int(scratch.handle), int(scratch.size))

    def place(self, name: str, address: int) -> None:
        """See :class:`odise_rt.backends.base.BoundStage`."""
        self._check(self._context.set_tensor_address(name, address), f"{name} has no address")

    def enqueue(self) -> None:
        """See :class:`odise_rt.backends.base.BoundStage`."""
        self._engine.log.clear()
        self._check(self._context.execute_async_v3(self._session.handle), "the engine failed")

    def close(self) -> None:
        """Let the context go; TensorRT wants that before the engine goes."""
        self._context = None

    def _check(self, good: Any, what: str) -> None:
        if good:
            return
        reason = self._engine.log.last() or "TensorRT gives no reason"
        if is_out_of_memory(reason):
            raise memory_error(f"stage {self._stage}", reason)
        raise BackendError(f"stage {self._stage}: {what}: {reason}; run `odise-rt doctor`")


def _outside(engine: TrtEngine, spec: StageSpec, shapes: Mapping[str, tuple[int, ...]]) -> str:
    name = next(iter(shapes))
    ranges = "; ".join(f"{p[name].min} to {p[name].max}" for p in engine.profiles)
    found = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
    return (
        f"stage {spec.name}: the engine was not built for {found} ({name} may be {ranges}): build it with "
        "`python -m export.build_engines --bundle BUNDLE --engine ... --size HEIGHTxWIDTH`, or choose another "
        "short_edge"
    )


@dataclass
class _ShapeState:
    """Everything that is set up for one shape of the inputs."""

    bound: BoundEngine
    work: CapturedWork
    generation: int = -1
    """Of the scratch memory that the context and the graph use."""
    device: dict[str, Any] = field(default_factory=dict)
    """Buffers of inputs and outputs on the GPU."""
    host: dict[str, tuple[Any, np.ndarray]] = field(default_factory=dict)
    """Pinned buffers and arrays on them."""


class TrtStage:
    """One engine. Safe to share between threads; they take turns."""

    def __init__(self, engine: TrtEngine, session: CudaSession, spec: StageSpec, facts: StageFacts) -> None:
        """Wrap a loaded engine.

        Args:
            engine: owned by the stage from here on.
            session: shared with other stages; the last of them that is closed closes it.
            spec: of the stage.
            facts: for results.

        Raises:
            BackendError: the session is closed.
        """
        if not session.retain():
            raise BackendError(f"the GPU was released before stage {spec.name} was loaded: load the segmenter again")
        self._engine: TrtEngine | None = engine
        self._session = session
        self._spec = spec
        self._states: OrderedDict[Shapes, _ShapeState] = OrderedDict()
        self.facts = facts

    @property
    def session(self) -> CudaSession:
        """The GPU that it runs on."""
        return self._session

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the engine; see :class:`odise_rt.backends.base.Stage`.

        Args:
            inputs: numpy arrays, or arrays on the GPU with ``__cuda_array_interface__`` or DLPack, which are not
                copied to the host.
        """
        session = self._session
        with session.use(f"stage {self._spec.name}"):
            engine = self._engine
            if engine is None:
                raise BackendError(f"stage {self._spec.name} is closed: load the segmenter again")
            arrays: dict[str, Any] = {
                name: as_device_array(value, session.handle) or as_host_array(value) for name, value in inputs.items()
            }
            self._spec.check(arrays)
            shapes = tuple(sorted((name, tuple(array.shape)) for name, array in arrays.items()))
            state = self._states.get(shapes) or self._prepare(engine, dict(shapes))
            self._states[shapes] = state
            self._states.move_to_end(shapes)
            while len(self._states) > MAX_SHAPES:
                self._release(self._states.popitem(last=False)[1])
            self._copy_in(state, arrays)
            self._execute(state)
            session.stream.sync()
            return {name: state.host[name][1].copy() for name in state.bound.outputs}

    def bind(self, inputs: Mapping[str, DeviceArray]) -> BoundEngine:
        """The engine set up for arrays on the GPU like these, for a caller who holds the session's lock.

        Raises:
            BackendError: the stage is closed, the inputs do not fit it, or the engine was not built for their shapes.
        """
        if self._engine is None:
            raise BackendError(f"stage {self._spec.name} is closed: load the segmenter again")
        self._spec.check(inputs)
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        return BoundEngine(self._engine, self._session, self._spec, shapes)

    def close(self) -> None:
        """Release buffers, graphs and the engine. Safe to call twice."""
        if self._engine is None:
            return
        with self._session.use(f"closing stage {self._spec.name}"):
            if self._engine is None:
                return
            self._session.stream.sync()
            for state in self._states.values():
                self._release(state)
            self._states.clear()
            self._engine.close()
            self._engine = None
        self._session.release()

    # ---- setting up a shape --------------------------------------------------------------------------------------

    def _prepare(self, engine: TrtEngine, shapes: dict[str, tuple[int, ...]]) -> _ShapeState:
        session = self._session
        bound = BoundEngine(engine, session, self._spec, shapes)
        state = _ShapeState(bound, CapturedWork(session, f"stage {self._spec.name}"))
        try:
            for tensor in (*self._spec.inputs, *self._spec.outputs):
                shape = bound.outputs.get(tensor.name) or shapes[tensor.name]
                size = int(np.prod(shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
                state.device[tensor.name] = session.allocate(size)
                state.host[tensor.name] = session.host_array(shape, tensor.dtype)
                bound.place(tensor.name, int(state.device[tensor.name].handle))
        except BaseException:
            self._release(state)
            raise
        return state

    def _release(self, state: _ShapeState) -> None:
        state.work.forget()
        state.bound.close()
        for buffer in state.device.values():
            buffer.close(self._session.stream)
        for pinned, _array in state.host.values():
            self._session.free_host(pinned)
        state.device.clear()
        state.host.clear()

    # ---- running -------------------------------------------------------------------------------------------------

    def _copy_in(self, state: _ShapeState, arrays: Mapping[str, Any]) -> None:
        """Put inputs on the stream's way to their buffers. The host side is free again: every run waits for its end."""
        stream = self._session.stream
        for tensor in self._spec.inputs:
            array = arrays[tensor.name]
            if isinstance(array, DeviceArray):
                self._session.view(array).copy_to(state.device[tensor.name], stream=stream)
            else:
                pinned, staging = state.host[tensor.name]
                np.copyto(staging, array)
                pinned.copy_to(state.device[tensor.name], stream=stream)

    def _execute(self, state: _ShapeState) -> None:
        session = self._session
        scratch = session.scratch(state.bound.scratch_bytes)
        if state.generation != session.generation:
            state.work.forget()
            state.bound.use_scratch(scratch)
            state.generation = session.generation
        state.work.run(lambda: self._enqueue(state), lambda: state.bound.capturable)

    def _enqueue(self, state: _ShapeState) -> None:
        """The engine, then its outputs on their way to the host."""
        state.bound.enqueue()
        for name in state.bound.outputs:
            state.device[name].copy_to(state.host[name][0], stream=self._session.stream)
