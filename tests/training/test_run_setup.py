"""What a run starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from odise_rt.errors import CheckpointError
from tests.training.conftest import mini_experiment
from training.batches import LiveBatches
from training.checkpoints.own_format import load_checkpoint
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
