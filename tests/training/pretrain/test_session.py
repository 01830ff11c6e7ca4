"""Resuming, averaging and the learning-rate schedule of the small trainings, and the Muon optimizer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from odise_rt.errors import CheckpointError
from training.muon import Muon, orthogonalised
from training.pretrain.session import Session, cosine_rate
from training.run_log import read_log


class Killed(Exception):
    """Stands for kill -9: nothing after it runs."""


def train(folder: Path, stop_after: int | None = None, steps: int = 9) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    session = Session(folder, {"model": model}, 0.01, steps, warmup=3, average=0.9, orthogonal=("0.weight",))
    session.resume()
    for step in session.iterate("test", save_every=0.0):
        if step == stop_after:
            raise Killed
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        session.descend(nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)))
    session.use_average()
    return model.state_dict()


@pytest.mark.parametrize("stop_after", [1, 4, 8])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, stop_after: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "broken", stop_after)
    resumed = train(tmp_path / "broken")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        train(tmp_path)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError, match="cannot resume"):
        Session(tmp_path, {"other": nn.Linear(2, 2)}, 0.01, 5).resume()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_weights(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    session = Session(tmp_path, {"model": model}, 0.1, 5)
    with pytest.raises(CheckpointError, match="loss is nan at step 0"):
        session.descend(model(torch.full((1, 2), float("nan"))).sum())
    torch.testing.assert_close(model.weight, before)


def test_the_log_has_a_line_every_twenty_steps(tmp_path: Path) -> None:
    train(tmp_path, steps=41)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert lines[1]["loss"] < lines[0]["loss"]


def test_a_resumed_log_has_each_line_once(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, 20, steps=41)
    (tmp_path / "state.pt").unlink()
    train(tmp_path, steps=41)
    assert [line["step"] for line in read_log(tmp_path)] == [20, 40]


def test_the_rate_warms_up_then_falls_to_a_fiftieth() -> None:
    rates = [cosine_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert cosine_rate(100, 100, 1.0, 10) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_treats_joint_projections_as_three_and_kernels_as_matrices() -> None:
    joint = nn.Parameter(torch.zeros(12, 4))
    joint.grad = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    kernel = nn.Parameter(torch.zeros(5, 2, 3, 3))
    kernel.grad = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    optimizer = Muon([joint, kernel], lr=0.1, momentum=0.0, weight_decay=0.0)
    optimizer.step()
    expected = torch.cat([orthogonalised(part) for part in joint.grad.chunk(3)]) * (-0.1 * 0.2 * 4**0.5)
    torch.testing.assert_close(joint.detach(), expected)
    expected = orthogonalised(kernel.grad.flatten(1)).view_as(kernel) * (-0.1 * 0.2 * 18**0.5)
    torch.testing.assert_close(kernel.detach(), expected)


def test_muon_decays_weights_and_refuses_closures() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    optimizer = Muon([weight], lr=0.5, weight_decay=0.1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_weights(tmp_path: Path) -> None:
    """The root of zero is finite, and its slope is not."""
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    session = Session(tmp_path, {"model": model}, 0.1, 5)
    with pytest.raises(CheckpointError, match=r"the gradient is (nan|inf) at step 0"):
        session.descend((model.weight * 0).sum().sqrt())
    torch.testing.assert_close(model.weight, before)
