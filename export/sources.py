"""Sources of the model of an export, each with a description that depends on its content alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odise_rt.bundle import file_sha256
from odise_rt.errors import ExportError
from odise_rt.vocabulary import Vocabulary
from training.checkpoints import LoadedCheckpoint, load_checkpoint, load_released
from training.checkpoints.own_format import file_hashes
from training.checkpoints.stable_diffusion import diffusers_files
from training.config import preset
from training.initialization import random_checkpoint


@dataclass(frozen=True)
class Source:
    """A loaded model and the facts that bundle.json records of it."""

    loaded: LoadedCheckpoint
    created_from: dict[str, Any]
    """Kind, and SHA-256 of every file, by its name inside the source; no path and no time."""


def from_checkpoint(path: Path) -> Source:
    """Read a checkpoint directory of this project.

    Raises:
        CheckpointError: it is not a checkpoint directory.
        ExportError: the runtime's stages cannot express the model.
    """
    loaded = load_checkpoint(path)
    config = loaded.config
    if config.features != "diffusion" or config.conditioning == "caption":
        raise ExportError(
            f"{path} has features {config.features!r} and conditioning {config.conditioning!r}: a bundle's stages "
            "compute diffusion features under implicit or empty conditioning. This model is an ablation: measure it "
            "with `python -m training.ablation`, and export one that was trained as published"
        )
    return Source(loaded, {"kind": "checkpoint", "files": file_hashes(path)})


def from_released(
    config_name: str, odise: Path, stable_diffusion: Path, clip: Path, training_labels: Path | None = None
) -> Source:
    """Read the published files.

    Args:
        config_name: size and variant that they have.
        odise: ``odise_*.pth``.
        stable_diffusion: ``sd-v1-*.ckpt`` or a diffusers directory.
        clip: OpenAI's ``.pt`` or an open_clip checkpoint.
        training_labels: OpenSeg's label file with the words that the heads were trained with; by default COCO's 133
            names, which are fewer.

    Raises:
        CheckpointError: a file is missing, of another kind or of another size.
        VocabularyError: the label file is not in OpenSeg's format.
    """
    seen = None if training_labels is None else Vocabulary.from_openseg(training_labels).words
    loaded = load_released(
        preset(config_name), odise=odise, stable_diffusion=stable_diffusion, clip=clip, training_vocabulary=seen
    )
    # The role keeps files of one name apart.
    sources = {"odise": odise, "stable_diffusion": stable_diffusion, "clip": clip}
    if training_labels is not None:
        sources["training_labels"] = training_labels
    hashes = {f"{role}/{name}": value for role, path in sources.items() for name, value in _hashes(path).items()}
    return Source(loaded, {"kind": "released", "config": config_name, "files": hashes})


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of those of a diffusers directory, by name."""
    if path.is_file():
        return {path.name: file_sha256(path)}
    return {p.relative_to(path).as_posix(): file_sha256(p) for p in diffusers_files(path)}


def from_random(config_name: str, seed: int) -> Source:
    """Make a preset with random weights, for tests of scale.

    Raises:
        ConfigError: an unknown preset.
    """
    return Source(random_checkpoint(config_name, seed), {"kind": "random", "config": config_name, "seed": seed})
