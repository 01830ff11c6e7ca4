"""Stages of one bundle, loaded when they are first needed and kept or released after use.

Weights are most of the memory at full size, so who keeps what is decided in one place: the text encoder is released
after a vocabulary is encoded, and with ``low_memory`` every stage is released after its run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator

from odise_rt.backends.base import Backend, Stage, StageFacts
from odise_rt.bundle import Bundle
from odise_rt.errors import BackendError

logger = logging.getLogger(__name__)


class StagePool:
    """Loads, shares and releases stages. Safe to use from several threads."""

    def __init__(self, backend: Backend, bundle: Bundle, keep: frozenset[str]) -> None:
        """Serve the stages of ``bundle``; those named in ``keep`` stay loaded until :meth:`close`."""
        self._backend = backend
        self._bundle = bundle
        self._keep = keep
        self._slots = {name: _Slot() for name in bundle.stages}
        self._closed = False

    def load(self, names: Iterable[str]) -> None:
        """Load stages that are kept ahead of their first use."""
        for name in names:
            if name in self._keep:
                with self.use(name):
                    pass

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Stage]:
        """A loaded stage for the time of a ``with`` block."""
        slot = self._slots[name]
        with slot.lock:
            if self._closed:
                raise BackendError("the segmenter is closed: load it again")
            if slot.stage is None:
                slot.stage = self._backend.load(self._bundle, name)
                slot.facts = slot.stage.facts
            stage = slot.stage
            slot.users += 1
        try:
            yield stage
        finally:
            with slot.lock:
                slot.users -= 1
                if slot.users == 0 and (self._closed or name not in self._keep):
                    slot.release()

    def facts(self) -> dict[str, StageFacts]:
        """What each stage that was loaded so far ran on."""
        return {name: slot.facts for name, slot in self._slots.items() if slot.facts is not None}

    def close(self) -> None:
        """Release every stage; one that is running is released when it is done."""
        self._closed = True
        for slot in self._slots.values():
            with slot.lock:
                if slot.users == 0:
                    slot.release()


class _Slot:
    """One stage: loaded or not, and by how many used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stage: Stage | None = None
        self.facts: StageFacts | None = None
        self.users = 0

    def release(self) -> None:
        if self.stage is not None:
            self.stage.close()
            self.stage = None
