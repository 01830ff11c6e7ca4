"""Strict loading by key tables: every tensor of a file has a named place in a module, or a reason to be ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from odise_rt.errors import CheckpointError
from training.checkpoints.report import PartReport, Shape

Tensors = dict[str, Tensor]

_SHOWN = 5
"""Keys that an error names before it only counts."""


@dataclass(frozen=True)
class KeyTable:
    """Names in a file against names in a module.

    Both sides of ``names`` are whole keys or dotted prefixes; of several that fit, the longest counts.
    """

    names: Mapping[str, str]
    """Key or prefix in the file to key or prefix in the module; an empty prefix stands for the whole module."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Key or prefix in the file to the reason why the model needs nothing of it."""

    def __post_init__(self) -> None:
        back = {ours: theirs for theirs, ours in self.names.items()}
        if len(back) != len(self.names):
            raise AssertionError("two names of a key table lead to the same place")
        object.__setattr__(self, "_back", back)

    def ours(self, key: str) -> str | None:
        """The module's name of a file's key, ``None`` if the table has none."""
        return _replace_prefix(key, self.names)

    def theirs(self, key: str) -> str:
        """The file's name of a module's key; the key itself if the table has none."""
        back: Mapping[str, str] = self._back  # type: ignore[attr-defined]
        return _replace_prefix(key, back) or key

    def reason(self, key: str) -> str | None:
        """Why a file's key is ignored, ``None`` if it is not."""
        prefix = _longest_prefix(key, self.ignored)
        return None if prefix is None else self.ignored[prefix]


def rename(tensors: Mapping[str, Tensor], table: KeyTable) -> tuple[Tensors, dict[str, str], list[str]]:
    """Give tensors the names of the module.

    Returns:
        Tensors under the module's names, ignored keys with their reasons, and keys that the table does not know.
    """
    renamed: Tensors = {}
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        reason = table.reason(key)
        ours = table.ours(key)
        if reason is not None:
            ignored[key] = reason
        elif ours is None or ours in renamed:
            unknown.append(key)
        else:
            renamed[ours] = tensor
    return renamed, ignored, unknown


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    table: KeyTable,
    *,
    source: str,
    name: str,
    advice: str,
    expected: Iterable[str] | None = None,
) -> PartReport:
    """Fill a module, converting to its dtypes, if and only if the file holds exactly what the module needs.

    Args:
        module: filled in place; untouched if an error is raised.
        tensors: the file's tensors.
        table: how the file names them.
        source: the file, for messages.
        name: the module, for messages and the report.
        advice: what a user whose file does not fit should do.
        expected: keys of the module that must be filled; by default its whole state dict.

    Raises:
        CheckpointError: missing, unexpected, misshapen, mistyped or non-finite tensors, naming up to five of each.
    """
    state = module.state_dict()
    wanted = list(state) if expected is None else list(expected)
    renamed, ignored, unknown = rename(tensors, table)
    wanted_set = set(wanted)
    unknown += [table.theirs(key) for key in renamed if key not in wanted_set]
    missing = [table.theirs(key) for key in wanted if key not in renamed]
    problems = []
    if missing:
        problems.append(f"it lacks {quote_keys(missing)} of the {len(wanted)} expected")
    if unknown:
        problems.append(f"it holds the unexpected {quote_keys(unknown)}")
    fitting = [key for key in wanted if key in renamed]
    misshapen = [
        f"{table.theirs(key)} {_show(renamed[key])}, expected {_show(state[key])}"
        for key in fitting
        if renamed[key].shape != state[key].shape
    ]
    if misshapen:
        problems.append(f"shapes differ: {quote_keys(misshapen)}")
    mistyped = [
        f"{table.theirs(key)} {_dtype(renamed[key])}, expected {_dtype(state[key])}"
        for key in fitting
        if renamed[key].is_floating_point() != state[key].is_floating_point()
    ]
    if mistyped:
        problems.append(f"types differ: {quote_keys(mistyped)}")
    if problems:
        raise CheckpointError(f"{source} does not fit {name}: {'; '.join(problems)}. {advice}")
    # A float64 may be beyond float32, and nothing can be asked of fp8 before it is converted.
    broken = [table.theirs(key) for key in fitting if not torch.isfinite(renamed[key].to(state[key].dtype)).all()]
    if broken:
        raise CheckpointError(f"{source} holds NaN or infinite values in {quote_keys(broken)}: get the file again")
    with torch.no_grad():
        for key in wanted:
            state[key].copy_(renamed[key])
    return PartReport(source, name, {key: _shape(renamed[key]) for key in wanted}, ignored)


def quote_keys(keys: list[str]) -> str:
    """Up to five keys and the number of the others."""
    shown = ", ".join(keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _longest_prefix(key: str, prefixes: Mapping[str, str]) -> str | None:
    candidate = key
    while candidate not in prefixes:
        if not candidate:
            return None
        candidate = candidate.rpartition(".")[0]
    return candidate


def _replace_prefix(key: str, prefixes: Mapping[str, str]) -> str | None:
    prefix = _longest_prefix(key, prefixes)
    if prefix is None:
        return None
    rest = key[len(prefix) :].lstrip(".")
    return ".".join(part for part in (prefixes[prefix], rest) if part)


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _show(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"
