"""The audit finds what is not pinned, pins that are none, and advisories."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_projects_constraints_are_exact_and_unique(audit: ModuleType) -> None:
    pins, problems = audit.read_pins((ROOT / "constraints.txt").read_text().splitlines())
    assert problems == []
    assert pins["numpy"]


def test_lines_that_are_no_pins(audit: ModuleType) -> None:
    lines = ["a==1", "# a comment", "", "b>=2", "c", "A==2", "d==1.0  # why", "e @ https://example.org/e.whl", "f==1.*"]
    pins, problems = audit.read_pins(lines)
    assert pins == {"a": "1", "d": "1.0"}
    assert [p.partition(":")[0] for p in problems] == ["line 4", "line 5", "line 6", "line 8", "line 9"]


def test_what_is_installed_must_be_pinned(audit: ModuleType) -> None:
    installed = {"a": "1", "b": "2", "c": "3", "torch": "2.13.0+cpu", "pip": "99", "odise-rt": "0"}
    problems = audit.unpinned(installed, {"a": "1", "b": "1", "torch": "2.13.0"})
    assert len(problems) == 2
    assert "b 2 is installed, 1 is pinned" in problems[0]
    assert "c 3 is installed but not pinned" in problems[1]


def test_names_are_compared_as_indexes_do(audit: ModuleType) -> None:
    assert audit.canonical("Foo_Bar.baz") == audit.canonical("foo-bar-baz") == "foo-bar-baz"
    assert "numpy" in audit.installed_packages()


def test_advisories(audit: ModuleType) -> None:
    vulnerability = {"id": "CVE-1", "fix_versions": ["1.1"]}
    packages: list[dict[str, Any]] = [
        {"name": "a", "version": "1", "vulns": [vulnerability]},
        {"name": "b", "version": "1", "vulns": []},
    ]
    found, asked = audit.read_advisories(json.dumps({"dependencies": packages}))
    assert found == ["a 1 has CVE-1: fixed in 1.1"]
    assert "2 packages" in asked
    assert audit.read_advisories("")[0] == []
    assert "did not reach" in audit.read_advisories("<html>")[1]


def test_exit_codes(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("a==1\n")
    monkeypatch.setattr(audit, "advisories", lambda path: ([], "nothing was asked"))
    monkeypatch.setattr(audit, "installed_packages", lambda: {"a": "1"})
    assert audit.main(["--constraints", str(constraints)]) == 0
    monkeypatch.setattr(audit, "installed_packages", lambda: {"a": "1", "b": "1"})
    assert audit.main(["--constraints", str(constraints)]) == 1
    assert "b 1 is installed but not pinned" in capsys.readouterr().err
    assert audit.main(["--constraints", str(tmp_path / "none")]) == 1
