"""``python -m odise_rt``, and the console script: the command line of :mod:`odise_rt.cli`, which obeys Ctrl-C."""

from __future__ import annotations

import signal
import sys

from odise_rt.interruption import INTERRUPTED, after_imports


def run() -> None:
    """Entry point of the console script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as nohup and "&" want it
        signal.signal(signal.SIGINT, after_imports(signal.default_int_handler))
    try:
        from odise_rt.cli import main

        code = main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on another one ends us at once, without a traceback
        print("odise-rt: stopped; the same command goes on where it was", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    run()
