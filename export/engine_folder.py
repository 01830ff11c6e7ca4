"""Writes one engine beside its place in the bundle, and puts it there when it is complete and was compared, or not at
all: the same promise that :mod:`export.bundle_writer` keeps for bundles.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from export.bundle_writer import remove_abandoned
from odise_rt.bundle import Bundle
from odise_rt.engine_check import Bounds
from odise_rt.engines import FOLDER, Engine, open_engine
from odise_rt.errors import BundleError, ExportError
from odise_rt.files import PARTIAL_SUFFIX, flush_folder, replace_folder


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
        try:
            self._root.mkdir(exist_ok=True)
            remove_abandoned(self._root / self._name)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self._name}.", suffix=PARTIAL_SUFFIX, dir=self._root))
            self.path.chmod(0o755)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as exc:
            raise ExportError(
                f"cannot write into {self._root} ({exc.strerror}): make the bundle writable, or copy it"
            ) from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        shutil.rmtree(self.path, ignore_errors=True)
        if self._root.is_dir() and not any(self._root.iterdir()):
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
            # Not the name of what remove_abandoned brings back: it would bring it to another place than its key.
            replace_folder(self.path, place, aside=f".{self._name}.", old_name=key)
        except OSError as exc:
            # Another build of the same facts may have been first: its engine is as good.
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise ExportError(f"cannot put the engine at {place} ({exc}): free space and build it again") from exc
        return open_engine(place)


def existing_engine(bundle: Bundle, key: str, bounds: Bounds) -> Engine | None:
    """A sound engine of these facts that is there already, held to these bounds. Any other counts as none, and is
    replaced."""
    place = bundle.root / FOLDER / key
    if not place.exists():
        return None
    try:
        engine = open_engine(place)
        engine.verify_files()
    except BundleError:
        return None
    return engine if engine.bounds == bounds else None
