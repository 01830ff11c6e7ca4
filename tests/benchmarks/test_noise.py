"""The noise bound: what stays inside it, what leaves it, and what the exit code of a comparison says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import Summary
from benchmarks.noise import AA_PAIR, FLOOR, compare, exceeds, floor_of, incomparable, noise_bound, relative_error
from benchmarks.results import Result, Run
from tests.benchmarks.small_run import make_run


def _verdicts(base: Run, run: Run) -> dict[str, str]:
    return {d.key: d.verdict for d in compare(base, run)}


def test_the_bound_is_never_below_the_floor() -> None:
    steady = Summary.of([1.0] * 20)
    assert noise_bound(steady, steady, floor=FLOOR) == pytest.approx(math.exp(FLOOR) - 1)


def test_noisy_and_few_samples_widen_the_bound() -> None:
    steady, noisy = Summary.of([1.0, 1.01] * 10), Summary.of([1.0, 1.6] * 10)
    assert relative_error(noisy) > 10 * relative_error(steady)
    assert relative_error(Summary.of([1.0, 1.6] * 2)) > relative_error(noisy)
    assert relative_error(Summary.of([1.0])) > 0.05
    assert (
        noise_bound(noisy, noisy, floor=FLOOR)
        > noise_bound(steady, noisy, floor=FLOOR)
        > noise_bound(steady, steady, floor=FLOOR)
    )


def test_the_standard_error_is_that_of_a_median_of_normal_samples() -> None:
    import numpy as np

    draws = 1.0 + 0.05 * np.random.default_rng(0).standard_normal((2000, 40))
    true_error = float(np.median(draws, axis=1).std())
    estimates = [relative_error(Summary.of(row)) for row in draws[:300]]
    assert 0.9 * true_error < float(np.median(estimates)) < 1.3 * true_error


def test_slower_and_faster_are_treated_alike() -> None:
    assert exceeds(0.11, 0.10)
    assert not exceeds(0.09, 0.10)
    assert exceeds(1 / 1.11 - 1, 0.10)
    assert not exceeds(1 / 1.09 - 1, 0.10)


def test_the_same_thing_measured_twice_is_the_same() -> None:
    base, run = make_run(seed=1), make_run(seed=2)
    assert set(_verdicts(base, run).values()) <= {"same", "still missing"}


def test_false_alarms_are_rare() -> None:
    alarms = 0
    for seed in range(40):
        base, run = make_run(seed=2 * seed, spread=0.05), make_run(seed=2 * seed + 1, spread=0.05)
        alarms += sum(d.verdict in ("slower", "faster") for d in compare(base, run))
    assert alarms <= 2  # of 40 runs with 15 results each


def test_a_slower_runtime_is_found_by_its_ratio_although_the_machine_was_faster() -> None:
    everything = dict.fromkeys(("official", "pruned", "ort-portable"), 0.5)
    run = make_run(seed=3, scale=everything | {"runtime": 0.6, "runtime-again": 0.6})
    verdicts = _verdicts(make_run(seed=1), run)
    assert verdicts["peers/256x256/runtime"] == "slower"
    assert verdicts["peers/256x256/official"] == "same"


def test_an_absolute_time_gets_the_drift_of_the_machine_as_slack() -> None:
    base, run = make_run(seed=1), make_run(seed=2, scale={"sizes": 1.25})
    assert _verdicts(base, run)["sizes/1024"] == "slower"
    slow = dataclasses.replace(run)
    slow.rates = [dataclasses.replace(r, matmul_gflops={"torch": r.matmul_gflops["torch"] * 0.75}) for r in run.rates]
    assert _verdicts(base, slow)["sizes/1024"] == "same"


def test_two_identical_variants_that_differ_raise_the_floor() -> None:
    assert floor_of(make_run()) == FLOOR
    uneasy = make_run(scale={"runtime-again": 1.3})
    assert floor_of(uneasy) == pytest.approx(math.log(1.3 * 1.01), rel=0.05)
    slower = make_run(seed=2, scale=dict.fromkeys(AA_PAIR, 1.15))
    assert _verdicts(make_run(seed=1), slower)["peers/256x256/runtime"] == "slower"
    assert _verdicts(uneasy, slower)["peers/256x256/runtime"] == "same"


def test_what_broke_or_is_gone_is_no_silence() -> None:
    base, run = make_run(seed=1), make_run(seed=2)
    run.results = [r for r in run.results if r.key != "sizes/512"]
    index = next(i for i, r in enumerate(run.results) if r.variant == "runtime" and r.group == "peers")
    run.results[index] = Result.missing(run.results[index].key, "odise_rt", "oom", "out of memory")
    verdicts = _verdicts(base, run)
    assert verdicts["sizes/512"] == "gone"
    assert verdicts["peers/256x256/runtime"] == "broken"
    assert _verdicts(run, base)["peers/256x256/runtime"] == "fixed"
    assert _verdicts(run, base)["sizes/512"] == "new"


# ---- exit codes ------------------------------------------------------------------------------------------------------


def _compare(tmp_path: Path, base: Run, run: Run, *more: str) -> int:
    base.save(tmp_path / "base.json")
    run.save(tmp_path / "run.json")
    return report.main(["--compare", str(tmp_path / "base.json"), str(tmp_path / "run.json"), *more])


def test_compare_exits_with_0_without_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(tmp_path, make_run(seed=1), make_run(seed=2)) == 0
    assert "0 regressions" in capsys.readouterr().out
    assert _compare(tmp_path, make_run(seed=1), make_run(seed=2, scale=dict.fromkeys(AA_PAIR, 0.7))) == 0


def test_compare_exits_with_1_beyond_the_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(tmp_path, make_run(seed=1), make_run(seed=2, scale=dict.fromkeys(AA_PAIR, 1.2))) == 1
    assert "REGRESSION: peers/256x256/runtime slower by" in capsys.readouterr().out


def test_a_quick_run_may_leave_results_out_but_not_a_full_one(tmp_path: Path) -> None:
    base, run = make_run(seed=1), make_run(seed=2)
    run.results = [r for r in run.results if r.group != "words"]
    assert _compare(tmp_path, base, run) == 1
    run.quick = True
    assert _compare(tmp_path, base, run) == 0


def test_runs_of_different_machines_or_models_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = make_run(seed=1), make_run(seed=2)
    run.environment = run.environment | {"cpu": "Other CPU", "threads": 4}
    run.model = run.model | {"config": "odise-sd1"}
    assert len(incomparable(base, run)) == 3
    assert _compare(tmp_path, base, run) == 2
    assert "cpu differs" in capsys.readouterr().err
    assert _compare(tmp_path, base, run, "--force") == 0


def test_runs_without_a_common_result_are_not_compared(tmp_path: Path) -> None:
    base, run = make_run(seed=1), make_run(seed=2)
    run.results = [dataclasses.replace(r, key="other/" + r.key) for r in run.results]
    assert _compare(tmp_path, base, run) == 2


def test_a_broken_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    make_run().save(tmp_path / "base.json")
    assert report.main(["--compare", str(tmp_path / "base.json"), str(tmp_path / "run.json")]) == 2
    assert "not valid JSON" in capsys.readouterr().err
