"""Windows of several callers in one run of a graph.

A server segments several images at a time. Each needs a few windows of the same size through the same two graphs, and
a GPU runs eight windows in little more than the time of one. :class:`BatchingBackend` wraps an engine so that threads
that run ``clip_image`` or ``unet_tap`` at the same time share runs::

    thread A: 1 window ──┐
    thread B: 4 windows ─┼─ stacked ─ one run ─ split ─ to A, B and C
    thread C: 1 window ──┘

No thread of its own is needed: whoever finds the stage free leads one run for all that wait, and hands on. A caller
that is alone waits for nobody unless ``max_wait`` says so. Results agree with runs of one's own to rounding (a matrix
product may be cut up differently).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from odise_rt.backends.base import Backend, Device, Stage, StageFacts
from odise_rt.bundle import Bundle
from odise_rt.errors import BackendError, OptionsError
from odise_rt.options import is_whole
from odise_rt.specs import StageSpec

BATCHED_STAGES = ("clip_image", "unet_tap")
"""Stages whose inputs and outputs are lists of windows."""
_WINDOWS = "N"

Observer = Callable[[str, int, int], None]
"""Told of each run: stage, windows, callers."""


@dataclass(frozen=True)
class WindowBatching:
    """How windows of several callers are put together.

    Raises:
        OptionsError: a value is outside its range.
    """

    max_windows: int | None = None
    """Windows in one run; a single caller with more still runs them together. ``None``: as many as the engine runs best
    (:meth:`odise_rt.backends.base.Backend.windows_per_batch`)."""
    max_wait: float = 0.0
    """Seconds that a run may wait to fill up. 0: take who is there; while one run lasts the next one gathers."""

    def __post_init__(self) -> None:
        windows, wait = self.max_windows, self.max_wait
        if windows is not None and (not is_whole(windows) or windows < 1):
            raise OptionsError(
                f"max_windows is {windows!r:.60}: expected a whole number from 1 on, or None for the engine's choice"
            )
        if not isinstance(wait, int | float) or not 0 <= wait <= 10:
            raise OptionsError(f"max_wait is {wait!r:.60}: expected 0 to 10 seconds")


class BatchingBackend:
    """An engine whose window stages are shared between threads."""

    def __init__(self, backend: Backend, batching: WindowBatching, observer: Observer | None = None) -> None:
        """Wrap ``backend``; ``observer`` is told of each run, from the thread that leads it."""
        self._backend = backend
        self._batching = batching
        self._observer = observer

    @property
    def device(self) -> Device:
        """Where stages run."""
        return self._backend.device

    @property
    def description(self) -> str:
        """The engine's line, with the fact that windows of several callers run together."""
        return f"{self._backend.description}, windows batched across calls"

    def windows_per_batch(self, side: int) -> int:
        """As the engine says."""
        return self._backend.windows_per_batch(side)

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """As the engine says."""
        return self._backend.keeps_loaded(bundle, stage)

    def load(self, bundle: Bundle, stage: str) -> Stage:
        """Load a stage; those of :data:`BATCHED_STAGES` are shared."""
        loaded = self._backend.load(bundle, stage)
        if stage not in BATCHED_STAGES:
            return loaded
        return BatchedStage(loaded, bundle.stages[stage].spec, self._limit, self._batching.max_wait, self._observer)

    def _limit(self, side: int) -> int:
        return self._batching.max_windows or self._backend.windows_per_batch(side)


class BatchedStage:
    """One graph over windows, shared by threads. Runs one batch at a time, first come, first served."""

    def __init__(
        self,
        stage: Stage,
        spec: StageSpec,
        limit: Callable[[int], int],
        max_wait: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        """Share ``stage``.

        Args:
            stage: the graph.
            spec: its inputs and outputs; inputs whose first dimension is ``N`` are stacked, the others must be the
                same arrays for all callers of a run.
            limit: windows in one run, by their side in pixels.
            max_wait: seconds that a run may wait to fill up.
            observer: told of each run.
        """
        assert all(t.shape[0] == _WINDOWS for t in spec.outputs), "outputs are split by window"
        self._stage = stage
        self._spec = spec
        self._stacked = tuple(t.name for t in spec.inputs if t.shape[0] == _WINDOWS)
        self._shared = tuple(t.name for t in spec.inputs if t.shape[0] != _WINDOWS)
        self._limit = limit
        self._max_wait = max_wait
        self._observer = observer
        self._waiting: deque[_Ticket] = deque()
        self._leading = False
        self._changed = threading.Condition()

    @property
    def facts(self) -> StageFacts:
        """What it runs on."""
        return self._stage.facts

    def close(self) -> None:
        """Release the graph."""
        self._stage.close()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph, perhaps together with windows of other threads; see :class:`odise_rt.backends.base.Stage`."""
        self._spec.check(inputs)  # here, so that a mistake is only its caller's
        ticket = _Ticket(inputs, self._key(inputs), len(inputs[self._stacked[0]]))
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify_all()
        while not ticket.done:
            with self._changed:
                while self._leading and not ticket.done:
                    self._changed.wait()
                if ticket.done:
                    break
                self._leading = True
                try:
                    batch = self._gather()
                except BaseException:  # also an interrupt while it waited for more
                    self._leading = False
                    self._waiting.remove(ticket)  # nobody will take its result
                    self._changed.notify_all()  # the next one leads
                    raise
            try:
                self._run(batch)
            finally:
                with self._changed:
                    self._leading = False
                    for served in batch:
                        served.done = True
                    self._changed.notify_all()
        if ticket.error is not None:
            raise ticket.error
        if ticket.outputs is None:
            raise BackendError(f"stage {self._spec.name}: the run was interrupted; try again")
        return ticket.outputs

    def _key(self, inputs: Mapping[str, np.ndarray]) -> tuple[object, ...]:
        """Callers with the same key can share a run. The arrays are alive as long as their tickets, so ids are safe."""
        return (*(inputs[n].shape[1:] for n in self._stacked), *(id(inputs[n]) for n in self._shared))

    def _gather(self) -> list[_Ticket]:
        """Take the first ticket and those that fit to it. The lock is held."""
        first = self._waiting[0]
        most = max(1, self._limit(first.inputs[self._stacked[0]].shape[-1]))
        deadline = time.monotonic() + self._max_wait
        while True:
            batch, windows = [first], first.windows
            for ticket in list(self._waiting)[1:]:
                if ticket.key == first.key and windows + ticket.windows <= most:
                    batch.append(ticket)
                    windows += ticket.windows
            left = deadline - time.monotonic()
            if windows >= most or left <= 0:
                break
            self._changed.wait(left)
        taken = set(map(id, batch))
        self._waiting = deque(t for t in self._waiting if id(t) not in taken)
        return batch

    def _run(self, batch: Sequence[_Ticket]) -> None:
        """Run one batch and hand out its results or errors."""
        if len(batch) == 1:
            return self._run_alone(batch[0])
        try:
            inputs = {name: np.concatenate([t.inputs[name] for t in batch]) for name in self._stacked}
            inputs |= {name: batch[0].inputs[name] for name in self._shared}
            outputs = self._stage.run(inputs)
        except Exception:
            # Together they may need too much memory, or one of them is at fault: each gets its own run and error.
            for ticket in batch:
                self._run_alone(ticket)
            return
        self._tell(sum(t.windows for t in batch), len(batch))
        start = 0
        for ticket in batch:
            stop = start + ticket.windows
            ticket.outputs = {name: array[start:stop] for name, array in outputs.items()}
            start = stop

    def _run_alone(self, ticket: _Ticket) -> None:
        try:
            ticket.outputs = self._stage.run(ticket.inputs)
        except Exception as exc:  # whatever it is, it is this caller's
            ticket.error = exc
        else:
            self._tell(ticket.windows, 1)

    def _tell(self, windows: int, callers: int) -> None:
        if self._observer is not None:
            self._observer(self._spec.name, windows, callers)


class _Ticket:
    """One caller's windows, and what came of them."""

    def __init__(self, inputs: Mapping[str, np.ndarray], key: tuple[object, ...], windows: int) -> None:
        self.inputs = inputs
        self.key = key
        self.windows = windows
        self.outputs: dict[str, np.ndarray] | None = None
        self.error: Exception | None = None
        self.done = False
