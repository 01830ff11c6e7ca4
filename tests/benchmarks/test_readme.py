"""Tables of README: generated from committed results, and a changed number is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.harness import REPOSITORY
from tests.benchmarks.small_run import make_run

OPENING = "<!-- benchmark: peers-short results/run.json -->"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    make_run(spread=0.0).save(tmp_path / "results" / "run.json")
    text = f"# Title\n\nbefore\n\n{OPENING}\n<!-- /benchmark -->\n\nafter\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    docs = "<!-- benchmark: steps results/run.json -->\n<!-- /benchmark -->\n"
    (tmp_path / "docs" / "benchmarks.md").write_text(docs * 2, encoding="utf-8")
    return tmp_path


def _run(root: Path, *more: str) -> int:
    return readme.main(["--root", str(root), *more])


def test_regions_are_filled_and_the_rest_is_left_alone(root: Path) -> None:
    assert _run(root, "--check") == 1
    assert "| implementation" not in (root / "README.md").read_text(encoding="utf-8")
    assert _run(root) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nbefore\n")
    assert text.endswith("<!-- /benchmark -->\n\nafter\n")
    assert "| odise_rt (fused graphs, ONNX Runtime) | 100 ms | 0.50 × | 41.2 |" in text
    assert "(results/run.json)" in text
    assert "(../results/run.json)" in (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert _run(root, "--check") == 0
    assert _run(root) == 0
    assert (root / "README.md").read_text(encoding="utf-8") == text


def test_a_changed_number_in_the_text_fails(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(root)
    path = root / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("100 ms", "90 ms"), encoding="utf-8")
    assert _run(root, "--check") == 1
    assert "README.md differ" in capsys.readouterr().out


def test_a_changed_number_in_the_results_fails(root: Path) -> None:
    _run(root)
    path = root / "results" / "run.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    result = next(r for r in data["results"] if r["key"] == "peers/256x256/runtime")
    result["summary"]["median"] *= 0.9
    path.write_text(json.dumps(data), encoding="utf-8")
    assert _run(root, "--check") == 1


@pytest.mark.parametrize("change", [{"dirty": True}, {"commit": None}])
def test_figures_of_code_that_nobody_can_find_are_refused(
    root: Path, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "results" / "run.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["environment"] |= change
    path.write_text(json.dumps(data), encoding="utf-8")
    assert _run(root) == 2
    assert "uncommitted or unknown changes" in capsys.readouterr().err
    assert "| implementation" not in (root / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{OPENING}\n", "has no end"),
        (f"{OPENING}\n{OPENING}\n<!-- /benchmark -->\n", "inside another"),
        ("<!-- benchmark: nonsense results/run.json -->\n<!-- /benchmark -->\n", "expected one of"),
        ("<!-- benchmark: peers ../secret.json -->\n<!-- /benchmark -->\n", "outside"),
        ("<!-- benchmark: peers results/none.json -->\n<!-- /benchmark -->\n", "cannot read"),
        ("<!-- benchmark: peers -->\n<!-- /benchmark -->\n", "malformed"),
        ("<!-- /benchmark -->\n", "malformed"),
    ],
)
def test_markers_that_mean_nothing_are_errors(
    root: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "README.md").write_text(text, encoding="utf-8")
    assert _run(root, "--check") == 2
    assert message in capsys.readouterr().err
    assert (root / "README.md").read_text(encoding="utf-8") == text


def test_the_tables_of_this_repository_agree_with_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().out
    assert (REPOSITORY / "README.md").is_file()
