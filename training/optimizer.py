"""The optimizer of the trained parameters: AdamW, without decay of norms and biases; Muon for matrices if asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from training.experiment import OptimizerOptions
from training.models.odise import Odise
from training.muon import AdamWWithMuon

_NORMS = (nn.LayerNorm, nn.GroupNorm)
_TABLES = ("caption_gate", "caption_position", "time_position", "no_object_embedding", "level_embedding")
"""Parameters of two and more dimensions that no vector is multiplied with, beside ``nn.Embedding``."""


def undecayed_names(model: nn.Module) -> set[str]:
    """Parameters of norm layers, and parameters called ``bias``; attention's ``in_proj_bias`` decays, as published."""
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name == "bias":
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def matrix_names(model: Odise) -> set[str]:
    """Trained weights of linear layers, attentions and convolutions: what Muon can move."""
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.trained_parameters().items()
        if parameter.ndim >= 2 and name not in tables and name.rpartition(".")[2] not in _TABLES
    }


def build_optimizer(model: Odise, options: OptimizerOptions) -> torch.optim.AdamW:
    """Groups with and without weight decay, and one for Muon; ``rate_scale`` of a group multiplies the rate."""
    undecayed = undecayed_names(model)
    trained = model.trained_parameters()
    matrices = set() if options.matrix_rate is None else matrix_names(model)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for n, p in trained.items() if n not in undecayed and n not in matrices],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for n, p in trained.items() if n in undecayed], "weight_decay": 0.0},
    ]
    if options.matrix_rate is None:
        return torch.optim.AdamW(groups, lr=options.learning_rate)
    moved_by_muon = {
        "params": [p for n, p in trained.items() if n in matrices],
        "weight_decay": options.weight_decay,
        "orthogonal": True,
        "rate_scale": options.matrix_rate / options.learning_rate,
    }
    return AdamWWithMuon([*groups, moved_by_muon], lr=options.learning_rate)
