"""Signals that end a command, held back while a module is imported.

A handler that raises inside an import may be misunderstood: compiled modules take the exception for a failure of their
own, and NumPy then says that it is badly installed, ONNX Runtime that it is missing.
"""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C stopped."""
_WAIT_SECONDS = 0.02


def after_imports(handler: Handler) -> Handler:
    """A handler that does what ``handler`` does, once no import is under way in the main thread."""

    def waiting(number: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            handler(number, frame)
            return
        again = threading.Timer(_WAIT_SECONDS, _send_again, (number, threading.main_thread().ident))
        again.daemon = True
        again.start()

    return waiting


def _send_again(number: int, main_thread: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, number)  # a signal to another thread would not wake the main one
    else:  # Windows
        _thread.interrupt_main(signal.Signals(number))


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
