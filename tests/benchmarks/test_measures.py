"""What is computed from measurements: fits, agreement, roofline shares, targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import machine, run
from benchmarks.machine import Rates
from benchmarks.measure_peers import agreement, picture_accuracy, reference_of
from benchmarks.measure_scaling import linear_fit
from benchmarks.noise import FLOOR
from benchmarks.plan import GROUPS, Bench, Plan
from benchmarks.results import Result, Run, Status
from benchmarks.run import parse, plan_of
from benchmarks.stage_costs import outside_share, with_roofline
from benchmarks.targets import targets_of
from tests.benchmarks.small_run import make_run


def test_a_line_is_found_and_a_parabola_is_not_called_one() -> None:
    x = [1, 4, 16, 64, 256]
    line = linear_fit(x, [0.5 + 2 * v for v in x])
    assert line["slope"] == pytest.approx(2)
    assert line["intercept"] == pytest.approx(0.5)
    assert line["r2"] == pytest.approx(1)
    assert linear_fit(x, [0.5 + 0.1 * v**2 for v in x])["r2"] < 0.9
    with pytest.raises(ValueError, match="three points"):
        linear_fit([1, 2], [1.0, 2.0])


def test_the_roofline_is_the_slower_of_products_and_copies() -> None:
    rates = Rates({"numpy": 50.0, "torch": 100.0}, 10.0)
    work = {
        "busy": {"flops": 200e9, "least_bytes": 1e6, "moved_bytes": 2e6},
        "hungry": {"flops": 1.0, "least_bytes": 5e9, "moved_bytes": 6e9},
    }
    stages = with_roofline({"busy": 4.0, "hungry": 1.0, "other": 0.1}, work, rates)
    assert stages["busy"]["roofline_share"] == pytest.approx(0.5)
    assert stages["busy"]["gflops"] == pytest.approx(50.0)
    assert stages["hungry"]["roofline_share"] == pytest.approx(0.5)
    assert stages["other"] == {"seconds": 0.1}


def test_what_is_outside_of_the_graphs_counts_as_such() -> None:
    seconds = {
        "preprocess": 1.0,
        "clip_image": 2.0,
        "unet_tap": 4.0,
        "mask_decoder": 1.0,
        "clip_mask": 1.0,
        "panoptic": 1.0,
    }
    assert outside_share(seconds, 10.0) == pytest.approx(0.2)
    assert outside_share({"preprocess": 1.0, "network": 8.0, "panoptic": 1.0}, 10.0) == pytest.approx(0.2)


def test_agreement_forgives_other_numbers_and_no_other_class() -> None:
    segments = np.array([[1, 1, 2, 2]], np.int16)
    classes = np.array([[5, 5, 6, 6]], np.int16)
    reference = [np.stack([segments, classes])]
    renumbered = [np.stack([3 - segments, classes])]
    assert agreement(reference, renumbered) == {"class_agreement": 1.0, "panoptic_agreement": 1.0}
    other_class = [np.stack([segments, np.array([[5, 5, 6, 7]], np.int16)])]
    assert agreement(reference, other_class)["class_agreement"] == 0.75
    merged = [np.stack([np.array([[1, 1, 1, 1]], np.int16), np.array([[5, 5, 5, 5]], np.int16)])]
    assert agreement(reference, merged) == {"class_agreement": 0.5, "panoptic_agreement": 0.5}


def _outputs(logits: np.ndarray, embedding: np.ndarray, classes: list[int]) -> dict[str, np.ndarray]:
    labels = np.stack([np.array([classes]), np.array([classes])]).astype(np.int16)
    return {"mask_logits": logits, "mask_embedding": embedding, "labels": labels}


def test_on_the_timed_picture_all_are_held_to_pytorch_in_float32() -> None:
    logits = np.array([[[1.0, -1.0], [1.0, -1.0]]], np.float32)
    along, across = np.array([[2.0, 0.0]], np.float32), np.array([[0.0, 5.0]], np.float32)
    found = picture_accuracy(
        {
            "compile-bf16": _outputs(logits + 0.5, across, [0, 1, 1, 1]),
            "official": _outputs(logits, along, [0, 1, 1, -1]),
            "runtime": _outputs(logits, 3 * along, [0, 1, 1, -1]),
            "compile": {},
        }
    )
    assert found["runtime"]["picture"] == pytest.approx(
        {
            "compared_with": "official",
            "mask_logits_error": 0.0,
            "mask_embedding_cosine": 1.0,
            "class_agreement": 1.0,
        }
    )
    rounded = found["compile-bf16"]["picture"]
    assert rounded["mask_logits_error"] == pytest.approx(0.5)
    assert rounded["mask_embedding_cosine"] == pytest.approx(0.0)
    assert rounded["class_agreement"] == 0.75
    assert "compile" not in found


def test_where_no_pixel_has_a_class_none_agree() -> None:
    nothing = _outputs(np.zeros((1, 2, 2), np.float32), np.ones((1, 2), np.float32), [-1, -1])
    found = picture_accuracy({"pruned": nothing, "runtime": nothing})
    assert "class_agreement" not in found["runtime"]["picture"]


def test_nothing_is_held_to_anything_but_pytorch_in_float32() -> None:
    assert reference_of(["official", "runtime", "pruned"]) == "pruned"
    assert reference_of(["runtime", "official"]) == "official"
    assert reference_of(["runtime", "compile-bf16"]) is None
    assert picture_accuracy({"runtime": _outputs(np.zeros((1, 1, 1)), np.ones((1, 2)), [0])}) == {}


def test_targets_are_those_of_the_model_and_missing_ones_are_said() -> None:
    found = {target.what: target for target in targets_of(make_run(spread=0.0))}
    ours = found["odise_rt over our pruned PyTorch eager"]
    assert ours.value == pytest.approx(0.5)
    assert ours.verdict == "met"
    assert found["odise_rt over torch.compile"].verdict == "not measured"
    full = make_run(spread=0.0)
    full.model = full.model | {"config": "odise-sd1"}
    assert targets_of(full)[0].value == pytest.approx(0.25)
    assert targets_of(make_run(scale={"runtime": 1.5, "runtime-again": 1.5}))[0].verdict == "missed"


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.9, "met"), (1.16, "undecided"), (1.24, "undecided"), (1.4, "missed")]
)
def test_a_ratio_within_noise_of_its_target_is_undecided(factor: float, verdict: str) -> None:
    # Of 0.6; odise_rt takes half of the time of PyTorch in a run that is not scaled.
    target = targets_of(make_run(spread=0.0, scale={"runtime": factor, "runtime-again": factor}))[0]
    assert target.verdict == verdict
    assert target.noise == pytest.approx(np.expm1(FLOOR))


@pytest.mark.parametrize(("value", "verdict"), [(0.99, "met"), (0.989, "missed")])
def test_a_number_without_a_spread_is_judged_as_it_is(value: float, verdict: str) -> None:
    run = make_run()
    run.fits["sizes"]["r2"] = value
    assert targets_of(run)[-1].verdict == verdict


def test_a_quick_plan_measures_less_of_everything() -> None:
    full, quick = Plan(), Plan().quick()
    assert set(quick.variants) < set(full.variants)
    assert quick.repeats < full.repeats
    assert quick.scenes < full.scenes
    assert max(quick.sizes) < max(full.sizes)


def test_the_command_line_chooses_the_plan() -> None:
    options = parse(["--config", "odise-sd1", "--bundle", "B", "--size", "512", "--repeats", "3", "--one-at-a-time"])
    plan = plan_of(options, "cpu")
    assert (plan.size, plan.repeats, plan.one_at_a_time, plan.groups) == ((512, 512), 3, True, ("peers",))
    assert plan.variants == ("official", "pruned", "runtime")
    assert plan.scenes == 0


@pytest.mark.parametrize(
    "arguments", [["--size", "8"], ["--size", "1", "2", "3"], ["--repeats", "0"], ["--suite", "x"]]
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(arguments)
    assert raised.value.code == 2
    capsys.readouterr()


def _measure_without_work(monkeypatch: pytest.MonkeyPatch, stopped_in: str | None = None) -> None:
    rates = Rates({"numpy": 50.0, "torch": 100.0}, 10.0)
    monkeypatch.setattr(run, "measure_rates", lambda threads: rates)
    for module in (run, machine):
        monkeypatch.setattr(module, "code_state", lambda: {"commit": "a" * 40, "dirty": False})
    monkeypatch.setattr(run, "prepare_bundle", lambda prepared, precision, given: None)

    def group(name: str) -> Callable[[Bench], None]:
        def measure(bench: Bench) -> None:
            if name == stopped_in:
                raise KeyboardInterrupt
            bench.results.append(Result.measured(f"{name}/runtime", name, [1.0], facts={"device": "cpu"}))
            bench.notes.append(f"a note of {name}")

        return measure

    monkeypatch.setattr(run, "_GROUPS", {name: group(name) for name in GROUPS})


def _arguments(out: Path) -> list[str]:
    return ["--out", str(out), "--scenes", "0", "--variants", "runtime", "--groups", "words", "cold", "sizes"]


def test_a_run_that_is_stopped_keeps_the_groups_that_were_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _measure_without_work(monkeypatch, stopped_in="sizes")
    assert run.main(_arguments(tmp_path / "run.json")) == 130
    assert "up to the last group" in capsys.readouterr().err
    kept = Run.load(tmp_path / "run.json")
    assert [result.key for result in kept.results] == ["words/runtime", "cold/runtime"]
    assert kept.notes == ["a note of words", "a note of cold", run.UNFINISHED]


def test_a_run_that_ends_has_no_note_of_being_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measure_without_work(monkeypatch)
    assert run.main(_arguments(tmp_path / "run.json")) == 0
    assert Run.load(tmp_path / "run.json").notes == [f"a note of {name}" for name in ("words", "cold", "sizes")]


@pytest.mark.parametrize("end", [{"commit": "b" * 40, "dirty": False}, {"commit": "a" * 40, "dirty": True}])
def test_code_that_changed_in_the_run_is_said(
    end: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measure_without_work(monkeypatch)
    monkeypatch.setattr(run, "code_state", lambda: end)
    assert run.main(_arguments(tmp_path / "run.json")) == 0
    kept = Run.load(tmp_path / "run.json")
    assert kept.environment["dirty"]
    assert kept.environment["commit"] == "a" * 40
    assert kept.notes[-1].startswith(
        f"The code was changed while this was measured: at the end it was {end['commit'][:12]}"
    )


@pytest.mark.parametrize(
    ("answers", "dirty"),
    [
        ({"rev-parse": "a" * 40, "status": ""}, False),
        ({"rev-parse": "a" * 40, "status": "?? odise_rt/new.py"}, True),
        ({"rev-parse": None, "status": None}, True),
    ],
)
def test_code_is_clean_only_where_it_is_known_to_be(
    answers: dict[str, str | None], dirty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_git", lambda command, *arguments: answers[command])
    assert machine.code_state() == {"commit": answers["rev-parse"], "dirty": dirty}


def test_a_precision_whose_rate_was_not_measured_has_no_roofline() -> None:
    costs = {"unet_tap": {"flops": 1e9, "least_bytes": 1e6, "moved_bytes": 2e6}}
    measured = Run("gpu", "command", False, {"commit": "a"}, model={"costs": {"official": costs, "pruned": costs}})
    measured.rates, measured.gpu_rates = [Rates({"torch": 100.0}, 10.0)], Rates({"fp32": 1000.0}, 100.0)
    stages = {"unet_tap": {"seconds": 1.0}}
    for precision in ("fp32", "bf16"):
        facts = {"device": "cuda", "precision": precision}
        result = Result.measured("peers/64x64/pruned", "pruned", [1.0], facts=facts, stages=stages)
        changed = run._with_roofline(result, measured)
        assert (changed == result) is (precision == "bf16")


def test_a_place_that_takes_no_result_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "measure_rates", lambda threads: pytest.fail("it began to work"))
    assert run.main(["--out", str(tmp_path)]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "expected"), [("failed", 1), ("absent", 0), ("oom", 0)])
def test_a_measurement_that_failed_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, status: Status, expected: int
) -> None:
    rates = Rates({"numpy": 50.0, "torch": 100.0}, 10.0)
    monkeypatch.setattr(run, "measure_rates", lambda threads: rates)
    monkeypatch.setattr(run, "_kernels", lambda quick: [Result.missing("kernels/all", "all", status, "a reason")])
    assert run.main(["--suite", "kernels"]) == expected
