"""Writes one engine beside its place in the bundle, and puts it there when it is complete and was compared, or not at
all: the same promise that :mod:`export.bundle_writer` keeps for bundles.
"""

from __future__ import annotations

import contextlib
import errno
import time
from types import TracebackType

from odise_rt.bundle import Bundle
from odise_rt.engine_check import Bounds
from odise_rt.engines import FOLDER, Engine, open_engine
from odise_rt.errors import BundleError, ExportError
from odise_rt.files import flush_folder, replace_folder
from odise_rt.partial_folder import partial_folder

_TRIES = 50
"""How often to try to make a folder in ``engines/``, which another build may just remove because it is empty."""
_PAUSE_SECONDS = 0.01


class EngineFolder:
    """One engine in the making. Use it as a context manager; without :meth:`publish` it leaves nothing."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        """Prepare a place.

        Args:
            bundle: gets the engine.
            name: of the stage and engine, for the partial folder.
        """
        self._root = bundle.root / FOLDER
        self._name = name

    def __enter__(self) -> EngineFolder:
        tries = _TRIES
        while True:
            try:
                self._make()
            except OSError as exc:
                tries -= 1
                if tries and isinstance(exc, FileNotFoundError | FileExistsError):
                    time.sleep(_PAUSE_SECONDS)
                    continue
                raise ExportError(
                    f"cannot write into {self._root} ({exc.strerror}): free space, make the bundle writable, or copy it"
                ) from exc
            return self

    def _make(self) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_empty_root)
            self._root.mkdir(exist_ok=True)
            self.path = undo.enter_context(partial_folder(self._root / self._name))
            self._undo = undo.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _remove_empty_root(self) -> None:
        with contextlib.suppress(OSError):  # engines are in it, or another build's partial folder
            self._root.rmdir()

    def publish(self, key: str) -> Engine:
        """Put the folder in place under its key; an engine of the same facts that is there goes.

        Args:
            key: :attr:`odise_rt.engines.EngineFacts.key`.

        Raises:
            ExportError: the file system refused.
        """
        place = self._root / key
        try:
            flush_folder(self.path)
            # Not the name of what comes back where a build was killed: it would come to another place than its key.
            replace_folder(self.path, place, aside=f".{self._name}.", old_name=key)
        except OSError as exc:
            # Another build of the same facts may have been first: its engine is as good.
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise ExportError(f"cannot put the engine at {place} ({exc}): free space and build it again") from exc
        return open_engine(place)


def existing_engine(bundle: Bundle, key: str, bounds: Bounds) -> Engine | None:
    """A sound engine of these facts that is there already, held to these bounds. Any other counts as none, and is
    replaced."""
    try:
        engine = open_engine(bundle.root / FOLDER / key)
        engine.verify_files()
    except BundleError:
        return None
    return engine if engine.bounds == bounds else None
