"""Calls that users write pass their type checker; and those that cannot work do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="needs the extra 'dev'")

ROOT = Path(__file__).parents[2]
CALLS = """
from pathlib import Path
import numpy as np
import numpy.typing as npt
from PIL import Image
from odise_rt import PanopticResult, Segmenter

def lists(
    s: Segmenter, paths: list[Path], names: list[str], arrays: list[npt.NDArray[np.uint8]],
    pictures: list[Image.Image], pair: tuple[Path, str], mixed: list[Path | str],
) -> list[list[PanopticResult]]:
    return [
        s.segment(paths, "dog"), s.segment(names, "dog"), s.segment(arrays, "dog"), s.segment(pictures, "dog"),
        s.segment(pair, "dog"), s.segment(mixed, "dog"), s.segment(["a.jpg", Path("b.jpg")], "dog"),
    ]

def one(s: Segmenter, path: Path) -> PanopticResult:
    return s.segment(path, "dog")
"""
WRONG = """
def wrong(s: Segmenter, numbers: list[int]) -> None:
    s.segment(numbers, "dog")
"""


def checked(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "calls.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / "calls.py")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_lists_of_one_kind_of_image_are_taken(tmp_path: Path) -> None:
    right = checked(tmp_path, CALLS)
    assert right.returncode == 0, right.stdout
    wrong = checked(tmp_path, CALLS + WRONG)
    assert wrong.stdout.count("error:") == 1, wrong.stdout
