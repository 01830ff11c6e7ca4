"""AdamW over the trained parameters, without decay of norms and biases."""

from __future__ import annotations

import torch
from torch import nn

from training.experiment import OptimizerOptions
from training.models.odise import Odise

_NORMS = (nn.LayerNorm, nn.GroupNorm)


def undecayed_names(model: nn.Module) -> set[str]:
    """Parameters of norm layers, and parameters called ``bias``; attention's ``in_proj_bias`` decays, as published."""
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name == "bias":
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def build_optimizer(model: Odise, options: OptimizerOptions) -> torch.optim.AdamW:
    """Two groups: with and without weight decay."""
    undecayed = undecayed_names(model)
    trained = model.trained_parameters()
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in trained.items() if n not in undecayed], "weight_decay": options.weight_decay},
            {"params": [p for n, p in trained.items() if n in undecayed], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
    )
