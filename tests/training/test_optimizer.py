"""Which parameters AdamW moves and which Muon, and the schedules of their rates."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from odise_rt.errors import ConfigError
from tests.training.conftest import mini_experiment
from training.experiment import OptimizerOptions
from training.models.odise import Odise
from training.muon import AdamWWithMuon
from training.optimizer import build_optimizer, matrix_names, undecayed_names

OPTIONS = OptimizerOptions(learning_rate=1e-3, matrix_rate=4e-3, warmup=0.25, decay="linear")


@pytest.fixture(scope="module")
def model() -> Odise:
    torch.manual_seed(0)
    return Odise(mini_experiment().model)


def test_muon_moves_weights_that_vectors_are_multiplied_with(model: Odise) -> None:
    names = matrix_names(model)
    trained = model.trained_parameters()
    assert names
    assert not names & undecayed_names(model)
    assert all(trained[name].ndim >= 2 for name in names)
    left = {name for name, parameter in trained.items() if parameter.ndim >= 2} - names
    assert {name.split(".")[-1] for name in left} <= {
        *("caption_gate", "caption_position", "time_position", "no_object_embedding", "level_embedding", "weight")
    }
    assert {n for n in left if n.endswith(".weight")} == {
        f"mask_generator.mask_decoder.{n}.weight" for n in ("query_features", "query_positions", "level_embedding")
    }


def test_every_parameter_is_in_one_group(model: Odise) -> None:
    groups = build_optimizer(model, OPTIONS).param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.trained_parameters().values())
    assert groups[-1]["rate_scale"] == pytest.approx(4)
    assert type(build_optimizer(model, OptimizerOptions())) is torch.optim.AdamW


def test_one_state_for_both_goes_on_as_if_never_broken() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(3, 4)

    def optimizer_of(module: nn.Linear) -> AdamWWithMuon:
        groups = [
            {"params": [module.bias], "weight_decay": 0.0},
            {"params": [module.weight], "weight_decay": 0.1, "orthogonal": True},
        ]
        return AdamWWithMuon(groups, lr=0.01)

    def descend(module: nn.Linear, optimizer: AdamWWithMuon, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    optimizer = optimizer_of(layer)
    before = copy.deepcopy(layer)
    descend(layer, optimizer, 2)
    assert not torch.equal(layer.weight, before.weight)
    assert not torch.equal(layer.bias, before.bias)
    assert set(optimizer.state[layer.weight]) == {"momentum", "step"}
    assert "exp_avg" in optimizer.state[layer.bias]
    resumed = copy.deepcopy(layer)
    other = optimizer_of(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    descend(layer, optimizer, 2)
    descend(resumed, other, 2)
    assert torch.equal(layer.weight, resumed.weight)
    assert torch.equal(layer.bias, resumed.bias)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0)


def test_linear_decay_falls_from_the_warm_up_to_the_end() -> None:
    found = dataclasses.replace(mini_experiment(), optimizer=OPTIONS)
    found = dataclasses.replace(found, phases=(dataclasses.replace(found.phases[0], iterations=100),))
    rates = [found.learning_rate(step) for step in range(100)]
    assert max(rates) == rates[25] == pytest.approx(1e-3)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 / 75)
    with pytest.raises(ConfigError, match="decay is 'cosine'"):
        OptimizerOptions(decay="cosine")  # type: ignore[arg-type]
