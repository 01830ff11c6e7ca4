"""Completion as the shells do it, and JSON from every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from odise_rt import MissingPackageError, cli
from odise_rt.completion import SHELLS, completion_script

ROOT = Path(__file__).parents[2]

# What bash does when TAB is pressed: it calls the function that is registered for the command.
PRESS_TAB = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
complete -p odise-rt >/dev/null || exit 3
function_name=$(complete -p odise-rt | sed 's/.*-F \([^ ]*\).*/\1/')
"$function_name" odise-rt "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab", reason="Requires: the package shtab (extra 'completion')")
    path = tmp_path_factory.mktemp("completion") / "odise-rt.bash"
    path.write_text(completion_script(cli.make_parser(), "bash"))
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["odise-rt", "seg"], {"segment"}),
        (["odise-rt", ""], {"segment", "inspect", "doctor", "labels", "completion"}),
        (["odise-rt", "segment", "photo.jpg", "--unk"], {"--unknown"}),
        (["odise-rt", "segment", "--lex"], {"--lexicon"}),
        (["odise-rt", "completion", ""], set(SHELLS)),
        (["odise-rt", "inspect", "pyproj"], {"pyproject.toml"}),
        (["odise-rt", "segment", "READ"], {"README.md"}),
        (["odise-rt", "segment", "a.jpg", "--lexicon", "READ"], {"README.md"}),
    ],
)
def test_bash_completes(bash_script: Path, typed: list[str], offered: set[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("Requires: bash")
    done = subprocess.run(
        [bash, "--norc", "-c", PRESS_TAB, "bash", str(bash_script), *typed],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    replies = set(done.stdout.split())
    assert offered <= replies if typed[-1] == "" else offered == replies


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="Requires: the package shtab (extra 'completion')")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "odise-rt" in script
    assert "--polygon-tolerance" in script or "polygon-tolerance" in script
    assert cli.main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shell"] == shell
    program = shutil.which(shell)
    if program and shell != "bash":
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(MissingPackageError, match="odise_rt\\[completion\\]"):
        completion_script(cli.make_parser(), "bash")


# ---- JSON from every command ----------------------------------------------------------------------------------------


def test_every_command_takes_json(label_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="Requires: the package shtab (extra 'completion')")
    for arguments in (
        ["inspect", str(label_bundle)],
        ["doctor"],
        ["labels"],
        ["labels", "auto"],
        ["completion", "fish"],
    ):
        assert cli.main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["inspect", "nowhere"], "BundleError"),
        (["labels", "nothing.txt"], "VocabularyError"),
        (["segment", "a.png", "--bundle", "nowhere", "--vocab", "red"], "BundleError"),
        (["segment", "a.png", "--bundle", "nowhere"], "OptionsError"),
    ],
)
def test_errors_are_json_too(arguments: list[str], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["type"] == kind
    assert error["message"] in captured.err
    assert cli.main(arguments) == 1
    assert capsys.readouterr().out == ""


def test_wrong_usage_is_json_too() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "odise_rt", "segment", "--json", "--every", "often", "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "UsageError"
    assert "usage: odise-rt segment" in done.stderr
    assert "often" in done.stderr
