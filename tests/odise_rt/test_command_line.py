"""What all commands refuse alike, and how they end."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from odise_rt import cli
from odise_rt.command_line import command
from odise_rt.errors import DatasetError


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["segment", "a.jpg", "--vocab", "dog", "--ray-address", ""], "--ray-address"),
        (["segment", "a.jpg", "--vocab", "dog", "--out="], "--out"),
        (["segment", "a.jpg", "--vocab", ""], "--vocab"),
        (["segment", "a.jpg", "", "--vocab", "dog"], "INPUT"),
        (["inspect", ""], "BUNDLE"),
        (["serve", "bundle", "--host", ""], "--host"),
        (["export-triton", "bundle", "--out", ""], "--out"),
    ],
)
def test_an_empty_value_is_no_value(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"odise-rt: error: argument {named}: its value is empty: give one, or leave it out"


def fails(error: BaseException) -> Callable[[], int]:
    @command("all is whole")
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DatasetError("two lines\nof it"), 1, "error: two lines of it"),
        (KeyboardInterrupt(), 130, "stopped: all is whole"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "error: the system refused /a/b (Permission denied)"),
        (OSError("odd"), 1, "error: the system refused (odd)"),
        (
            RuntimeError("CUDA out of memory. Tried\nmore"),
            1,
            "error: memory ran out (CUDA out of memory. Tried)",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: memory ran out"),
    ],
)
def test_what_goes_wrong_is_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(error)() == status
    assert capsys.readouterr().err.startswith(message)


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        fails(RuntimeError("a mistake"))()


def test_errors_have_the_status_that_the_command_gives_them() -> None:
    @command("all is whole", failed=2)
    def main() -> int:
        raise DatasetError("broken")

    assert main() == 2


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By commands that lock folders, and before they do anything."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert fails(AssertionError("not reached"))() == 1
    message = capsys.readouterr().err
    assert message.startswith("error: export, training and benchmarks run on Linux and macOS")
    assert message.count("\n") == 1


@pytest.mark.parametrize("package", ["odise_rt", "training", "export", "benchmarks"])
def test_no_module_of_unix_is_missed_before_that(package: str) -> None:
    for path in (Path(__file__).parents[2] / package).rglob("*.py"):
        missing = re.findall(
            r"^(?:import|from) (fcntl|resource|pwd|grp|termios)\b", path.read_text("utf-8"), re.MULTILINE
        )
        assert not missing, f"{path} imports {missing} when it is imported"
