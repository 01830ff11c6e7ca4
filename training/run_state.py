"""Saved states of a run: enough to go on after a kill as if nothing had happened.

::

    RUN/states/000500/trained.safetensors   trained parameters
    RUN/states/000500/optimizer.pt          optimizer and gradient scaler, loadable with weights_only
    RUN/states/000500/state.json            iteration and experiment

A state is written to a hidden folder beside and renamed, so what has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from odise_rt.bundle import file_sha256
from odise_rt.errors import CheckpointError, first_line
from odise_rt.files import PARTIAL_SUFFIX
from training.experiment import Experiment
from training.feature_cache import weights_fingerprint
from training.models.odise import Odise
from training.sharding import like, whole

_KEPT = 2
UNREADABLE = (
    *(OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError),
    *(SafetensorError, UnpicklingError),
)
"""What PyTorch and safetensors raise for files that are damaged, cut off or of another kind."""


def saved_states(run: Path) -> list[Path]:
    """Whole states, oldest first."""
    folder = run / "states"
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def run_origin(model: Odise, classes: Sequence[Sequence[str]], split: str, files: Mapping[str, Path]) -> dict[str, str]:
    """What a run is made of beside its experiment.

    Args:
        model: before it is trained or sharded.
        classes: the words of each class, in their order.
        split: of the data set.
        files: of its annotations, by what they are; of pictures there are too many.
    """
    frozen = weights_fingerprint(model, without=model.trained_parameters())
    return {
        "frozen networks": frozen,
        "training vocabulary": content_hash([word for words in classes for word in words]),
        # Apart from the words, which older states have alone.
        "division of words into classes": content_hash([len(words) for words in classes]),
        "split": split,
        **{what: file_sha256(path) for what, path in files.items()},
    }


def content_hash(content: object) -> str:
    """SHA-256 over plain JSON types."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class TrainerState:
    """What a state holds of model and optimizer: whole tensors on the CPU, however many processes share them."""

    trained: dict[str, Tensor]
    """Trained parameters by name."""
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


def trainer_state(
    model: Odise,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    shapes: dict[str, torch.Size],
) -> TrainerState:
    """The present state; under FSDP all processes must call this together.

    Args:
        model: as it trains.
        optimizer: over its trained parameters.
        scaler: of gradients, if there is one.
        shapes: of the trained parameters before they were sharded.
    """
    parameters = model.trained_parameters()
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def kept(tensor: Tensor, name: str) -> Tensor:
        return whole(tensor).cpu().reshape(shapes[name]).contiguous()

    described = optimizer.state_dict()
    moments = {
        index: {key: value if key == "step" else kept(value, order[index]) for key, value in values.items()}
        for index, values in described["state"].items()
    }
    return TrainerState(
        {name: kept(parameter, name) for name, parameter in parameters.items()},
        {**described, "state": moments},
        scaler.state_dict() if scaler else {},
    )


def save_state(
    run: Path, step: int, state: TrainerState, experiment: Experiment, origin: Mapping[str, str] | None = None
) -> Path:
    """Write the state before iteration ``step`` and drop all but the latest two.

    Raises:
        CheckpointError: the disk is full or not writable; earlier states are untouched.
    """
    final = run / "states" / f"{step:06d}"
    # Of one name, whoever writes: what a kill leaves is replaced when the resumed run comes here again.
    beside = final.with_name(f".{final.name}{PARTIAL_SUFFIX}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(state.trained, str(beside / "trained.safetensors"))
        torch.save({"optimizer": state.optimizer, "scaler": state.scaler}, beside / "optimizer.pt")
        (beside / "state.json").write_text(
            json.dumps({"step": step, "experiment": experiment.to_dict(), "origin": dict(origin or {})}, indent=1),
            "utf-8",
        )
        for path in beside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
    except (OSError, SafetensorError, RuntimeError) as exc:
        raise CheckpointError(f"cannot save the training state {final}: {exc}; free some space and --resume") from exc
    finally:  # Ctrl-C, too, leaves nothing half written
        shutil.rmtree(beside, ignore_errors=True)
    for old in saved_states(run)[:-_KEPT]:
        shutil.rmtree(old)
    return final


def load_state(
    path: Path,
    model: Odise,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None,
    experiment: Experiment | None,
    origin: Mapping[str, str] | None = None,
) -> int:
    """Restore a state in place.

    Args:
        path: a folder of :func:`saved_states`.
        model: gets the trained parameters.
        optimizer: gets its state, unless None.
        scaler: gets its state, unless None.
        experiment: must equal the one of the run, unless None.
        origin: of :func:`run_origin`; what it names must be as it was, where the state says what it was.

    Returns:
        The iteration to continue with.

    Raises:
        CheckpointError: unreadable, of another model or of another experiment.
    """
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        trained = load_file(path / "trained.safetensors")
        extra = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        step, described, before = int(state["step"]), state["experiment"], dict(state.get("origin", {}))
        moments, scale = extra["optimizer"]["state"], extra["scaler"]
    except UNREADABLE as exc:
        raise CheckpointError(
            f"training state {path} cannot be read ({first_line(exc)}): delete it to use the one before"
        ) from exc
    if experiment is not None and not experiment.is_described_by(described):
        raise CheckpointError(
            f"{path} belongs to another experiment than the one asked for: resume with the same config, or start a new "
            "run folder"
        )
    changed = [what for what, value in (origin or {}).items() if before.get(what, value) != value]
    if changed:
        raise CheckpointError(
            f"{path} was trained with another {' and another '.join(changed)}: resume with the same --data, --split, "
            "--classes and --frozen, or start a new run folder"
        )
    parameters = model.trained_parameters()
    # Sharded scalars have one dimension, saved ones none.
    unlike = [n for n, p in parameters.items() if n in trained and not _same_shape(trained[n], p)]
    if set(trained) != set(parameters) or unlike:
        raise CheckpointError(f"{path} holds other parameters than the model: it was saved with another config")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(trained[name], parameter))
    if optimizer is not None:
        owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own = {
            index: {key: value if key == "step" else like(value, owners[index]) for key, value in values.items()}
            for index, values in moments.items()
        }
        optimizer.load_state_dict({**extra["optimizer"], "state": own})
    if scaler is not None and scale:
        scaler.load_state_dict(scale)
    return step


def _same_shape(saved: Tensor, parameter: Tensor) -> bool:
    return saved.shape == parameter.shape or (saved.dim() == 0 and parameter.shape == (1,))
