"""Ctrl-C ends a command with one line and exit code 130, in the middle of its imports, too."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odise_rt import __main__ as entry
from odise_rt import cli

# As compiled modules do: whatever a signal's handler raises becomes a failure of the import.
COMPILED = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("badly installed") from None
"""


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at_work() -> int:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("not reached")


def interrupted_in_an_import() -> int:
    importlib.import_module("compiled")
    for _ in range(1000):
        time.sleep(0.01)  # in one long sleep Windows' way would end it, but not where it is simulated
    raise AssertionError("not reached")


@pytest.mark.parametrize("system", ["here", "Windows"])
@pytest.mark.parametrize("command", [interrupted_at_work, interrupted_in_an_import])
def test_one_line_and_exit_code(
    command: Callable[[], int],
    system: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if system == "Windows":
        monkeypatch.delattr(signal, "pthread_kill", raising=False)
    (tmp_path / "compiled.py").write_text(COMPILED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "compiled", raising=False)
    monkeypatch.setattr(cli, "main", command)
    with pytest.raises(SystemExit) as stopped:
        entry.run()
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "a second one leaves no traceback"
    assert capsys.readouterr().err == "odise-rt: stopped; the same command goes on where it was\n"


def test_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells start background jobs so, and nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(cli, "main", lambda: 0)
    with pytest.raises(SystemExit):
        entry.run()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_entry_point_needs_no_long_import() -> None:
    """Until it runs, Ctrl-C is Python's own, with a traceback."""
    code = "import odise_rt.__main__, sys; print(sorted({'numpy', 'argparse', 'typing'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
