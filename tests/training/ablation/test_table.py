"""The table from evaluations on disk: means, every seed, the paper's claims, and reasons for what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from odise_rt.errors import CheckpointError
from training.ablation.measure import Places, read_evaluation
from training.ablation.table import collect, markdown, write_table

SETUP = {"experiment": {"name": "mini", "model": {"name": "odise-mini"}}, "iterations": 7, "scenes": 3}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path, "train", "val", tmp_path, tmp_path / "out", tmp_path, "cpu", 0)


def note(places: Places, run: str, seed: int, pq: float, unseen: float | None = 1.0) -> None:
    scores = {"pq": pq, "categories": 4}
    groups = {"all": scores, "seen": scores, "unseen": {"pq": unseen, "categories": 0 if unseen is None else 2}}
    metrics = {"pq": groups, "miou": {"all": {"miou": pq + 10}}, "ap": {"all": {"ap": pq / 2}}}
    path = places.evaluation(run, seed, "published")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python -m training.ablation",
        "training_seconds": 90.0,
        "evaluation_seconds": 4.0,
        "trained_parameters": 1_350_000,
        "environment": {"torch": "2"},
        "metrics": metrics,
    }
    path.write_text(json.dumps(content))


def test_means_claims_and_gaps(places: Places) -> None:
    for seed, pq in ((42, 10.0), (43, 12.0)):
        note(places, "base", seed, pq)
        note(places, "empty_caption", seed, pq - 2)
    for seed, pq in ((42, 10.0), (43, 12.5)):
        note(places, "t300", seed, pq)
        note(places, "random_unet", seed, pq + 1)
    note(places, "t100", 42, 9.0, unseen=None)
    note(places, "t100", 43, 13.0)
    failed = places.folder("true_caption", 42)
    failed.mkdir(parents=True)
    (failed / "failure.json").write_text('{"error": "no text encoder"}')
    table = collect(places, SETUP, (42, 43), {"features/clip"})
    rows = {row["id"]: row for row in table["rows"]}
    implicit = rows["conditioning/implicit"]
    assert implicit["mean"] == pytest.approx({"pq": 11, "pq_seen": 11, "pq_unseen": 1, "miou": 21, "ap": 5.5})
    assert [result["seed"] for result in implicit["results"]] == [42, 43]
    assert implicit["results"][0]["environment"] == {"torch": "2"}
    assert rows["conditioning/caption"]["not_run"] == [
        {"seed": 42, "reason": "no text encoder"},
        {"seed": 43, "reason": "not asked for"},
    ]
    assert rows["features/clip"]["not_run"][0]["reason"].startswith("not yet")
    claims = {(claim["better"], claim["worse"]): claim for claim in table["claims"]}
    empty = claims["conditioning/implicit", "conditioning/empty"]
    assert (empty["seeds_that_agree"], empty["seeds"], empty["mean_difference"]) == (2, 2, 2.0)
    assert claims["timestep/0", "timestep/100"]["seeds_that_agree"] == 1
    assert ("features/diffusion", "features/clip") not in claims, "nothing is said of what was not measured"

    text = markdown(table)
    assert "| implicit captioner | 11.0 (10.0, 12.0) | 11.0 (10.0, 12.0) | 1.0 (1.0, 1.0) |" in text
    assert "| 1.35 M | 1.5 min |" in text
    assert "| the true caption | not run | | | | | | |" in text
    assert "- the true caption, seed 42: no text encoder" in text
    assert "above in 2 and below in 0 of 2 seeds: agrees." in text
    assert "Measured: -0.2, above in 0 and below in 1 of 2 seeds: undecided." in text, "a tie says nothing"
    assert "Measured: -1.2, above in 0 and below in 2 of 2 seeds: does not agree." in text
    assert "above in 1 and below in 1 of 2 seeds: undecided." in text
    assert "| t = 100 | 11.0 (9.0, 13.0) | 11.0 (9.0, 13.0) | 1.0 (–, 1.0) |" in text

    write_table(places.out, table)
    assert json.loads((places.out / "ablation.json").read_text()) == json.loads(json.dumps(table))
    assert (places.out / "ablation.md").read_text() == text


def test_every_line_of_a_group_has_the_columns_of_its_header(places: Places) -> None:
    note(places, "base", 42, 1.0)
    lines = [x for x in markdown(collect(places, SETUP, (42,), ())).splitlines() if x.startswith("|")]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_a_broken_evaluation_is_not_taken_for_a_result(places: Places) -> None:
    path = places.evaluation("base", 42, "clip")
    assert read_evaluation(path) is None
    path.parent.mkdir(parents=True)
    for broken in ("{", "[]", '{"metrics": {"pq": 3}}'):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match="delete it"):
            read_evaluation(path)
