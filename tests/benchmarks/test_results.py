"""The results file: it survives a round trip, refuses what contradicts itself, and names no place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.results import Result, ResultsError, Run, add_ratios, without_places
from tests.benchmarks.small_run import make_run


def test_a_run_survives_a_round_trip(tmp_path: Path) -> None:
    run = make_run()
    run.save(tmp_path / "run.json")
    again = Run.load(tmp_path / "run.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "run.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert [r.key for r in again.results] == [r.key for r in run.results]
    failed = again.find("peers/256x256/compile")
    assert failed is not None
    assert (failed.status, failed.reason) == ("failed", "InductorError: no compiler")


def test_the_roofline_is_the_best_rate_of_the_run() -> None:
    rates = make_run().best_rates
    assert rates.peak_gflops == 150.0
    assert rates.copy_gbps == 21.0
    assert rates.floor_seconds(300e9, 1.0) == pytest.approx(2.0)
    assert rates.floor_seconds(1.0, 42e9) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no benchmark run"),
        ("[1]", "no benchmark run"),
        ("nonsense", "not valid JSON"),
        ('{"kind": "odise_rt-benchmark", "schema": 99}', "schema 99"),
        ('{"kind": "odise_rt-benchmark", "schema": 1}', "malformed"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=message):
        Run.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"nothing\.json"):
        Run.load(tmp_path / "nothing.json")


def test_two_results_of_one_key_are_refused() -> None:
    data = make_run().to_dict()
    data["results"].append(data["results"][0])
    with pytest.raises(ResultsError, match="more than once"):
        Run.from_dict(json.loads(json.dumps(data)))


def test_a_result_without_samples_needs_a_reason() -> None:
    with pytest.raises(ResultsError, match="reason"):
        Result.missing("peers/256x256/compile", "torch.compile", "failed", "")
    with pytest.raises(ResultsError, match="summary"):
        Result("a/b", "a", "b", "label", status="ok")


def test_reasons_hold_no_path_and_no_address() -> None:
    text = "OSError: cannot read /home/someone/odise/out/x.onnx from https://host.example/a/b (C:\\Users\\me\\y.dll)"
    assert without_places(text) == "OSError: cannot read x.onnx from <address> (y.dll)"
    assert without_places("12/24 GiB and/or 3/4") == "12/24 GiB and/or 3/4"


def test_ratios_are_left_out_where_rounds_do_not_match() -> None:
    a = Result.measured("peers/x/a", "a", [1.0, 2.0])
    b = Result.measured("peers/x/b", "b", [2.0, 4.0])
    c = Result.measured("peers/x/c", "c", [2.0])
    ratios = [r.ratio for r in add_ratios([a, b, c], "peers/x/a")]
    assert ratios[1] is not None
    assert ratios[1].summary.median == 2.0
    assert ratios[2] is None
