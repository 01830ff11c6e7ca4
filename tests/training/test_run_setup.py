"""What a run starts from."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path

import pytest
import torch

import training.run_setup
from odise_rt.errors import CheckpointError
from tests.training.conftest import mini_experiment
from training.batches import LiveBatches
from training.checkpoints import LoadedCheckpoint
from training.checkpoints.own_format import load_checkpoint
from training.models.variants import build_odise
from training.run_setup import prepare_run, starting_model


@pytest.mark.parametrize("keep_heads", [False, True])
def test_heads_are_fresh_or_the_checkpoints(mini_frozen: Path, keep_heads: bool) -> None:
    experiment = dataclasses.replace(mini_experiment(), seed=7)
    model, _ = starting_model(experiment, mini_frozen, mini_frozen if keep_heads else None)
    stored = load_checkpoint(mini_frozen).model
    for name, parameter in model.clip.named_parameters():
        assert torch.equal(parameter, stored.clip.get_parameter(name))
    kept = stored.trained_parameters()
    same = [torch.equal(parameter, kept[name]) for name, parameter in model.trained_parameters().items()]
    assert all(same) == keep_heads


@pytest.mark.parametrize("keep_heads", [False, True])
def test_one_set_of_frozen_networks_is_in_memory(
    mini_frozen: Path, keep_heads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = shutil.copytree(mini_frozen, tmp_path / "heads") if keep_heads else None
    experiment = dataclasses.replace(mini_experiment(), seed=7)
    torch.manual_seed(7)
    fresh = build_odise(experiment.model)
    random_state = torch.get_rng_state()
    alive: list[int] = []

    def networks() -> int:
        gc.collect()
        weights = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter) and not t.is_meta]
        return sum(t.shape == fresh.unet.conv_in.weight.shape for t in weights)

    before = networks()  # that of this test, and what others keep

    def load(path: Path) -> LoadedCheckpoint:
        loaded = load_checkpoint(path)
        alive.append(networks() - before)
        return loaded

    monkeypatch.setattr(training.run_setup, "load_checkpoint", load)
    model, _ = starting_model(experiment, mini_frozen, heads)
    assert alive == [1] * (1 + keep_heads)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(model.trained_parameters())
    if not keep_heads:  # what a seed gives stays what it was
        expected = fresh.trained_parameters()
        different = [n for n, p in model.trained_parameters().items() if not torch.equal(p, expected[n])]
        assert different == ["mask_classifier.no_object_embedding"]


def test_heads_of_another_shape_are_refused(mini_frozen: Path) -> None:
    experiment = mini_experiment()
    head = dataclasses.replace(experiment.model.head, queries=9)
    wider = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, head=head))
    starting_model(wider, mini_frozen)
    with pytest.raises(CheckpointError, match=r"has head HeadConfig\(.*queries=6.* needs .*queries=9"):
        starting_model(wider, mini_frozen, mini_frozen)


def test_cropped_out_targets_reach_the_views_and_have_caches_of_their_own(
    mini_data: Path, mini_frozen: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    folders = []
    for keep in (False, True):
        experiment = dataclasses.replace(mini_experiment(), cropped_out_targets=keep)
        cached, live = prepare_run(
            experiment, mini_data, split="train", frozen=mini_frozen, cache=tmp_path, device="cpu", workers=0
        ).sources
        cached()
        views = live()
        assert isinstance(views, LiveBatches)
        assert views.views.cropped_out_targets == keep
        folders.append(set(tmp_path.iterdir()))
    assert len(folders[1]) == 2 * len(folders[0])


def test_caches_that_are_older_than_diagonal_crops_stay_valid(
    mini_data: Path, mini_frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[dict[str, object]] = []
    monkeypatch.setattr(training.run_setup, "CachedBatches", lambda *arguments: None)
    monkeypatch.setattr(
        training.run_setup, "open_or_build", lambda cache, key, *rest, **more: keys.append(key) or object()
    )
    for diagonal in (False, True):
        experiment = mini_experiment()
        first, second = experiment.phases
        first = dataclasses.replace(first, jitter=dataclasses.replace(first.jitter, diagonal_crops=diagonal))
        experiment = dataclasses.replace(experiment, phases=(first, second))
        prepare_run(
            experiment, mini_data, split="train", frozen=mini_frozen, cache=tmp_path, device="cpu", workers=0
        ).sources[0]()
    jitters = [key["jitter"] for key in keys]
    assert jitters[0] == {"target": 64, "crop": 64, "smallest": 0.7, "largest": 1.3, "flip": 0.5, "pad_value": 128}
    assert jitters[1] == {**jitters[0], "diagonal_crops": True}
