"""Every run is the base experiment with one change, at the same budget."""

from __future__ import annotations

import dataclasses
import json

import pytest

from odise_rt.errors import ConfigError, OptionsError
from training.ablation.rows import CLAIMS, GROUPS, METRICS, ROWS, RUNS, chosen_rows, variant, with_budget
from training.config import OdiseConfig, preset
from training.experiment import Experiment, experiment


@pytest.fixture
def base() -> Experiment:
    return experiment("sticker_tiny_label")


def changed(left: object, right: object, prefix: str = "") -> set[str]:
    """Dotted names of the fields in which two dataclasses differ."""
    names: set[str] = set()
    for item in dataclasses.fields(left):  # type: ignore[arg-type]
        first, second = getattr(left, item.name), getattr(right, item.name)
        if dataclasses.is_dataclass(first):
            names |= changed(first, second, f"{prefix}{item.name}.")
        elif first != second:
            names.add(prefix + item.name)
    return names


def test_a_run_changes_what_its_row_says_and_nothing_else(base: Experiment) -> None:
    expected = {
        "base": set(),
        "empty_caption": {"model.conditioning"},
        "true_caption": {"model.conditioning"},
        "clip_features": {"model.features", "model.conditioning"},
        "random_unet": {"random_unet_seed"},
        "caption_supervision": {"model.variant", "model.clip_weight_seen", "model.clip_weight_unseen"},
        "t100": {"model.timestep"},
        "t300": {"model.timestep"},
    }
    assert set(expected) == set(RUNS) == {row.run for row in ROWS}
    for run, fields in expected.items():
        assert changed(base, variant(base, run, base.seed)) == fields | {"name", "model.name"}, run
    assert variant(base, "base", 43).seed == 43


def test_the_table_names_what_exists() -> None:
    ids = {row.id for row in ROWS}
    assert len(ids) == len(ROWS)
    assert {row.group for row in ROWS} == set(GROUPS)
    for claim in CLAIMS:
        assert {f"{claim.group}/{claim.better}", f"{claim.group}/{claim.worse}"} <= ids
        assert claim.metric in METRICS


@pytest.mark.parametrize("iterations", [2, 3, 7, 600, 5200, 9000])
def test_a_budget_is_kept_to_the_iteration(base: Experiment, iterations: int) -> None:
    found = with_budget(base, iterations)
    assert found.iterations == iterations
    for phase, original in zip(found.phases, base.phases, strict=True):
        assert phase.iterations >= 1
        assert phase.iterations == pytest.approx(original.iterations * iterations / base.iterations, abs=1.01)
        assert phase.cached_views == min(original.cached_views, phase.iterations * original.batch)
        assert phase.batch == original.batch
    assert [phase.cached_view_seed for phase in found.phases] == [base.seed, base.seed + 1000]


def test_wrong_choices_name_the_right_ones(base: Experiment) -> None:
    assert chosen_rows(None) == ROWS
    assert [row.id for row in chosen_rows("features/clip, timestep")] == [
        "features/clip",
        "timestep/0",
        "timestep/100",
        "timestep/300",
    ]
    for wrong in ("captioner", "", "features,clip"):
        with pytest.raises(OptionsError, match="conditioning/implicit"):
            chosen_rows(wrong)
    with pytest.raises(OptionsError, match="at least 2"):
        with_budget(base, 1)


def test_descriptions_older_than_a_field_stay_valid(base: Experiment) -> None:
    stored = json.loads(json.dumps(base.to_dict()))
    assert base.is_described_by(stored)
    del stored["random_unet_seed"], stored["model"]["features"], stored["model"]["conditioning"]
    for phase in stored["phases"]:
        del phase["cached_view_seed"]
    assert base.is_described_by(stored)
    assert OdiseConfig.from_dict(stored["model"]) == base.model
    for run in set(RUNS) - {"base"}:
        other = variant(base, run, base.seed)
        renamed = dataclasses.replace(
            other, name=base.name, model=dataclasses.replace(other.model, name=base.model.name)
        )
        assert not renamed.is_described_by(stored), run
    assert not base.is_described_by(stored | {"speed": 1})
    assert not base.is_described_by(stored | {"phases": stored["phases"][:1]})
    del stored["model"]["vae"]
    assert not base.is_described_by(stored)


def test_configs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="'clip' with 'empty'"):
        dataclasses.replace(preset("odise-tiny"), features="clip")
    with pytest.raises(ConfigError, match="conditioning is 'blip'"):
        dataclasses.replace(preset("odise-tiny"), conditioning="blip")  # type: ignore[arg-type]
