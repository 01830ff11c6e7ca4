"""What an experiment refuses before it costs hours."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from odise_rt.errors import ConfigError
from tests.training.conftest import mini_experiment
from training.experiment import OptimizerOptions, changed, experiment
from training.losses import PointOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": 0}, "save_every is 0"),
        ({"picture_every": 0}, "picture_every is 0"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"seed": -1}, "seed is -1"),
        ({"phases": ()}, "at least one iteration"),
    ],
)
def test_experiments_are_whole(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"experiment 'mini': .*{message}"):
        dataclasses.replace(mini_experiment(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "at least one iteration"),
        ({"batch": 0}, "one view a batch"),
        ({"jitter": {"crop": 96}}, "no multiple of the model's size_divisor 64"),
    ],
)
def test_phases_are_whole(changes: dict[str, Any], message: str) -> None:
    experiment = mini_experiment()
    first, *others = experiment.phases
    if "jitter" in changes:
        changes = {"jitter": dataclasses.replace(first.jitter, **changes["jitter"])}
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(experiment, phases=(dataclasses.replace(first, **changes), *others))


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": math.nan},
        {"learning_rate": 0.0},
        {"matrix_rate": -1.0},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
        {"warmup": 1.0},
        {"warmup_factor": 2.0},
        {"decay": "cosine"},
    ],
)
def test_optimizer_options_have_ranges(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer: .*expected"):
        OptimizerOptions(**changes)


@pytest.mark.parametrize("changes", [{"points": 0}, {"oversample_ratio": 0.5}, {"importance_ratio": 1.5}])
def test_point_options_have_ranges(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected points and oversample_ratio"):
        PointOptions(**changes)


def test_a_file_of_ones_own_is_an_experiment(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from training.configs import finetune_label\ndef experiment():\n    return finetune_label.experiment()\n"
    )
    assert experiment(str(path)) == experiment("finetune_label")
    path.write_text("def experiment():\n    return 3\n")
    for wrong in (path, tmp_path / "missing.py"):
        with pytest.raises(ConfigError, match=r"(mine|missing)\.py .*experiment\(\)"):
            experiment(str(wrong))


def test_numbers_are_changed_where_one_phase_has_them() -> None:
    base = experiment("finetune_label")
    found = changed(base, iterations=7, batch=3, learning_rate=2e-5)
    assert (found.iterations, found.phases[0].batch, found.optimizer.learning_rate) == (7, 3, 2e-5)
    assert changed(base) == base
    two = experiment("sticker_tiny_label")
    assert changed(two, learning_rate=2e-5).optimizer.learning_rate == 2e-5
    with pytest.raises(ConfigError, match="2 phases, each with its own batch"):
        changed(two, batch=3)
