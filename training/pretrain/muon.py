"""Muon: momentum whose matrix updates are made orthogonal; learns small transformers in fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration (Jordan et al. 2024): fast, singular values end near 1."""


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: (n, m) to (n, m) with singular values in about [0.7, 1.2]."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    first, second, third = _QUINTIC
    for _ in range(iterations):
        gram = x @ x.T
        x = first * x + (second * gram + third * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the matrices and convolution kernels inside a network; give everything else to AdamW.

    Updates are scaled by ``0.2 * sqrt(max(n, m))`` (Liu et al. 2025), which makes AdamW's learning rates fit. A matrix
    of three times as many rows as columns is taken for joint query, key and value projections and treated as three; a
    kernel counts as a matrix of its output channels.

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

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every matrix that has a gradient; ``closure`` is not supported and must be None."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                rows, columns = direction.shape
                parts = 3 if rows == 3 * columns else 1
                update = torch.cat([orthogonalised(part) for part in direction.chunk(parts)]).view_as(parameter)
                scale = 0.2 * max(rows // parts, columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
