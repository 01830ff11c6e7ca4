"""Options of the benchmarks that cannot be used, and errors that are one line."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

REQUIRED = {
    "run": [],
    "soak": ["BUNDLE"],
    "gpu_check": [],
    "bench_window_batching": ["BUNDLE"],
    "official_graphs": ["--config", "odise-tiny", "--out", "O", "--size", "64"],
    "weightless": ["fill", "A", "B"],
}


@pytest.mark.parametrize(
    ("module", "option", "value"),
    [
        ("run", "--repeats", "0"),
        ("run", "--warmup", "-1"),
        ("run", "--threads", "100000"),
        ("run", "--size", "8"),
        ("run", "--scenes", "-1"),
        ("run", "--seed", "-1"),
        ("soak", "--minutes", "nan"),
        ("soak", "--concurrency", "0"),
        ("soak", "--every", "-1"),
        ("soak", "--max-growth", "inf"),
        ("soak", "--short-edge", "small"),
        ("gpu_check", "--seconds", "nan"),
        ("bench_window_batching", "--callers", "0"),
        ("bench_window_batching", "--images", "0"),
        ("bench_window_batching", "--device", "tpu"),
        ("official_graphs", "--size", "0"),
        ("official_graphs", "--seed", str(2**64)),
        ("weightless", "--seed", "-1"),
    ],
)
def test_a_wrong_option_is_refused(module: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"benchmarks.{module}").main([*REQUIRED[module], f"{option}={value}"])
    assert caught.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("module", ["soak", "bench_window_batching"])
def test_a_missing_bundle_is_one_line(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if module == "soak":
        pytest.importorskip("ray", reason="needs ray (extra serve)")
    assert importlib.import_module(f"benchmarks.{module}").main([str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no bundle at" in error
    assert error.count("\n") == 1


def test_graphs_replace_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.official_graphs import main

    for arguments, words in ((["64"], "is there already"), (["64", "64", "64"], "one or two sides")):
        with pytest.raises(SystemExit):
            main(["--config", "odise-tiny", "--out", str(tmp_path), "--size", *arguments])
        assert words in capsys.readouterr().err
