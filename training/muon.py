"""Muon: momentum whose matrix updates are made orthogonal; learns small transformers in fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration (Jordan et al. 2024): fast, singular values end near 1."""
_ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: (n, m) to (n, m) with singular values in about [0.7, 1.2]."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    first, second, third = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = first * x + (second * gram + third * gram @ gram) @ x
    return x.T if tall else x


@torch.no_grad()
def muon_step(
    parameter: Tensor, state: dict[str, Tensor], rate: float, momentum: float = 0.95, weight_decay: float = 0.05
) -> None:
    """Move one matrix or convolution kernel by its gradient.

    Updates are scaled by ``0.2 * sqrt(max(n, m))`` (Liu et al. 2025), which makes AdamW's learning rates fit. A matrix
    of three times as many rows as columns is taken for joint query, key and value projections and treated as three; a
    kernel counts as a matrix of its output channels.

    Args:
        parameter: Two or more dimensions; left alone if it has no gradient.
        state: What is remembered of this parameter from step to step; empty at first.
        rate: Learning rate.
        momentum: Decay of the (Nesterov) momentum.
        weight_decay: Decoupled weight decay.
    """
    if parameter.grad is None:
        return
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(parameter)
    state["momentum"].lerp_(parameter.grad, 1 - momentum)
    direction = parameter.grad.lerp(state["momentum"], momentum).flatten(1)
    rows, columns = direction.shape
    parts = 3 if rows == 3 * columns else 1
    update = torch.cat([orthogonalised(part) for part in direction.chunk(parts)]).view_as(parameter)
    scale = 0.2 * max(rows // parts, columns) ** 0.5
    parameter.mul_(1 - rate * weight_decay)
    parameter.add_(update, alpha=-rate * scale)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices and convolution kernels inside a network; give everything else to AdamW.

    Args:
        parameters: Tensors of two or more dimensions.
        lr: Learning rate.
        momentum: Decay of the (Nesterov) momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        """Move every matrix that has a gradient; ``closure`` is not supported and must be None."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                muon_step(parameter, self.state[parameter], group["lr"], group["momentum"], group["weight_decay"])


class AdamWWithMuon(torch.optim.AdamW):
    """AdamW, but for the groups marked ``"orthogonal": True``, which Muon moves: one optimizer, one state."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Any = None) -> None:
        """Move everything that has a gradient; ``closure`` is not supported and must be None."""
        if closure is not None:
            raise ValueError("AdamWWithMuon takes no closure")
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("orthogonal")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group.get("orthogonal") else ():
                # AdamW, when it loads a state, expects a count of steps for every parameter that has one.
                count = self.state[parameter].setdefault("step", torch.tensor(0.0))
                count += 1
                muon_step(parameter, self.state[parameter], group["lr"], weight_decay=group["weight_decay"])
