"""The documentation builds without a warning, and the reference shows what the package offers."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import odise_rt

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"Requires: the package {package} (extra 'docs')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("WARNING")], done.stderr
    page = (tmp_path / "site/reference/segmenter.html").read_text()
    for name in ("find_masks", "name_masks", "unknown", "explain", "overlap_threshold"):
        assert name in page
    assert ":meth:" not in page
    assert (tmp_path / "site/using.html").is_file()
    assert not (tmp_path / "site/extensions").exists()


def test_every_reference_names_something_that_exists() -> None:
    """A quick form of the test above, without the packages."""
    for page in (ROOT / "docs/reference").glob("*.md"):
        for line in page.read_text().splitlines():
            if not line.startswith("::: "):
                continue
            module, _, name = line.removeprefix("::: ").rpartition(".")
            found = importlib.util.find_spec(f"{module}.{name}") if name.islower() and name != "pipeline" else None
            assert found or hasattr(importlib.import_module(module), name), line


def test_every_public_name_has_a_place_in_the_reference() -> None:
    pages = (ROOT / "docs/reference").glob("*.md")
    shown = {line.removeprefix("::: ") for page in pages for line in page.read_text().splitlines()}
    for name in set(odise_rt.__all__) - {"__version__"}:
        home = getattr(odise_rt, name).__module__
        assert {home, f"{home}.{name}"} & shown, name
