"""``odise-rt demo`` as a command: what it refuses before anything is loaded, and that it starts and stops."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import odise_rt
from odise_rt.cli import main
from odise_rt.demo import command


def test_without_a_bundle_it_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ODISE_RT_BUNDLE", raising=False)
    assert main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "--bundle" in message
    assert "python -m export.build_engines" in message


def test_without_gradio_it_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, label_bundle: Path
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--bundle", str(label_bundle)]) == 1
    assert "pip install 'odise_rt[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "/no/such/folder"], "not a folder"),
        (["--max-pixels", "0"], "--max-pixels is 0"),
        (["--memory", "-1"], "--memory is -1"),
        (["--port", "99999"], "port is 99999"),
    ],
)
def test_wrong_options(
    capsys: pytest.CaptureFixture[str], label_bundle: Path, arguments: list[str], message: str
) -> None:
    pytest.importorskip("gradio", reason="Requires: the extra demo")
    assert main(["demo", "--bundle", str(label_bundle), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_missing_bundle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="Requires: the extra demo")
    assert main(["demo", "--bundle", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "no bundle at" in capsys.readouterr().err


@pytest.mark.slow
def test_starts_on_loopback_says_where_and_leaves_nothing(label_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="Requires: the extra demo")
    folder = tmp_path / "temporary"
    folder.mkdir()
    root = Path(odise_rt.__file__).parent.parent
    arguments = ["-m", "odise_rt", "demo", "--bundle", str(label_bundle), "--port", "0", "--json", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(folder), "HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 120)[0], "the page did not start in two minutes"
            said = json.loads(process.stdout.readline())
            assert said["url"].startswith("http://127.0.0.1:")
            assert said["bundle"] == "fake-label"
            with urllib.request.urlopen(said["url"], timeout=30) as answer:
                assert b"odise_rt" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert rest == b""
    assert b"Traceback" not in errors, errors.decode()
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "home").exists(), "not even a cache folder"
