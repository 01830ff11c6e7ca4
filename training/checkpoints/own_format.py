"""This project's checkpoints: a directory that says all about itself and holds no code.

::

    config.json          format version, OdiseConfig, training vocabulary, storage precision
    model.safetensors    every parameter and stored buffer; the diffusion text encoder may be left out
    tokenizer.json       `tokenizers` file of CLIP's text tower
    README.md            model card

A directory is written beside its final place and renamed, so what is there is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from odise_rt.bundle import file_sha256
from odise_rt.errors import CheckpointError, ConfigError, first_line
from odise_rt.files import flush_folder, replace_folder
from odise_rt.partial_folder import partial_folder
from odise_rt.version import __version__
from training.checkpoints.key_table import KeyTable, Tensors, load_strict
from training.checkpoints.report import LoadReport
from training.checkpoints.stable_diffusion import text_prefix
from training.checkpoints.tensor_files import read_tensors
from training.config import OdiseConfig
from training.models.odise import Odise
from training.models.variants import build_odise

FORMAT = "odise_rt-checkpoint"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
CARD_NAME = "README.md"

Storage = Literal["fp16", "fp32"]

_SD_TEXT = "sd_text."
_ALWAYS_FP32 = ("null_text_embedding",)
"""Tensors that stay float32 in an fp16 file, as do all scalars and vectors (norms, biases, scales): they take little
space and have much effect."""
_ADVICE = "Save it again with this version, or convert the original files with `python -m training.checkpoints convert`"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model with all that belongs to it."""

    model: Odise
    """The model on the CPU, in float32 and eval mode."""
    config: OdiseConfig
    training_vocabulary: tuple[str, ...]
    """Every name and synonym seen in training: decides which ensemble weight a class gets."""
    tokenizer_json: str
    """Text of the ``tokenizers`` file of CLIP's text tower."""
    report: LoadReport


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint directory that its model comes from, by name."""
    files = (p for p in sorted(path.iterdir()) if p.suffix in (".json", ".safetensors") and p.is_file())
    return {p.name: file_sha256(p) for p in files}


def save_checkpoint(
    path: Path,
    model: Odise,
    *,
    tokenizer_json: str,
    training_vocabulary: Sequence[str],
    storage: Storage = "fp32",
    include_sd_text: bool = True,
    card: str | None = None,
) -> Path:
    """Write a checkpoint directory, replacing an earlier one at the same place.

    Args:
        path: the directory; its parents are made.
        model: what to save, on any device.
        tokenizer_json: text of the ``tokenizers`` file.
        training_vocabulary: names and synonyms seen in training.
        storage: fp16 halves the file; vectors and scalars stay float32 in it.
        include_sd_text: keep the diffusion text encoder, which only further training of the diffusion model or its
            sampling needs; its output for "" is stored in any case.
        card: text of README.md; by default a short one is made from the config.

    Returns:
        The path.

    Raises:
        CheckpointError: something else is in the way, the disk is full, or a value does not fit into fp16.
    """
    check_tokenizer(tokenizer_json, model.config, "the tokenizer to be saved")
    has_sd_text = include_sd_text and model.sd_text is not None
    tensors = _stored(model, storage, has_sd_text)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "producer": {"odise_rt": __version__},
        "storage": storage,
        "sd_text": has_sd_text,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "config": model.config.to_dict(),
        "training_vocabulary": list(training_vocabulary),
    }
    with _written_beside(path) as folder:
        save_file(tensors, str(folder / WEIGHTS_NAME), metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / TOKENIZER_NAME).write_text(tokenizer_json, "utf-8")
        (folder / CARD_NAME).write_text(card or _default_card(description), "utf-8")
        # safetensors makes a file that only its owner may read.
        shutil.copymode(folder / CARD_NAME, folder / WEIGHTS_NAME)
    return path


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Read a checkpoint directory.

    Raises:
        CheckpointError: it is not a checkpoint, is incomplete, of a newer format, or its weights do not fit its config.
    """
    description = read_description(path)
    config = OdiseConfig.from_dict(description["config"])
    tokenizer_json = _read_text(path / TOKENIZER_NAME)
    check_tokenizer(tokenizer_json, config, str(path / TOKENIZER_NAME))
    file = read_tensors(path / WEIGHTS_NAME)
    model = uninitialised_model(config)
    names = {"": ""}
    if not description["sd_text"]:
        model.drop_sd_text()
    elif model.sd_text is not None and text_prefix(model.sd_text):
        names["sd_text"] = f"sd_text.{text_prefix(model.sd_text)}"
    part = load_strict(
        model, file.tensors, KeyTable(names), source=str(path / WEIGHTS_NAME), name="model", advice=_ADVICE
    )
    vocabulary = tuple(description["training_vocabulary"])
    return LoadedCheckpoint(model.eval(), config, vocabulary, tokenizer_json, LoadReport((part,)))


def read_description(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint's config.json; weights are not touched.

    Raises:
        CheckpointError: no checkpoint of this project, or of a newer format.
    """
    if not path.is_dir():
        what = f"a file, {read_tensors(path).kind}" if path.is_file() else "missing"
        raise CheckpointError(f"{path} is {what}: expected a checkpoint directory with {CONFIG_NAME}. {_ADVICE}")
    source = path / CONFIG_NAME
    try:
        description = json.loads(_read_text(source))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{source} is not valid JSON ({exc}): copy the checkpoint again") from exc
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{source} does not describe a checkpoint of this project. {_ADVICE}")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "upgrade odise_rt to read it" if newer else _ADVICE
        raise CheckpointError(f"{source} has format version {version!r}, this version reads {FORMAT_VERSION}: {advice}")
    words = description.get("training_vocabulary")
    sound = isinstance(description.get("config"), dict) and isinstance(description.get("sd_text"), bool)
    if not sound or not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(
            f"{source} lacks config, sd_text or training_vocabulary, or they are malformed. {_ADVICE}"
        )
    try:
        OdiseConfig.from_dict(description["config"])
    except ConfigError as exc:
        raise CheckpointError(f"{source}: {exc}") from exc
    return description


def uninitialised_model(config: OdiseConfig) -> Odise:
    """A model whose random initialisation is skipped, to be filled from a file: saves a minute at full size.

    Raises:
        ConfigError: the sizes of the config are too large for this machine.
    """
    try:
        with _NoRandomInitialisation():
            return build_odise(config)
    except (RuntimeError, MemoryError) as exc:  # torch's of an allocation is a RuntimeError
        raise ConfigError(
            f"config {config.name!r} describes a model that cannot be made here ({first_line(exc)}): check its sizes"
        ) from exc


class _NoRandomInitialisation(TorchFunctionMode):
    """Keeps constructors from drawing random numbers.

    torch's usual initialisers do nothing. Where a tensor is filled directly, it becomes the centre of the distribution
    instead: ``trunc_normal_`` draws until every number lies in its range, so it must not find what memory held.
    """

    _LEFT_ALONE = frozenset({torch.nn.init.uniform_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._LEFT_ALONE:
            return args[0] if args else kwargs["tensor"]
        if func is torch.Tensor.normal_:
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("mean", 0.0))
        if func is torch.Tensor.uniform_:
            low = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
            high = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
            return args[0].fill_((low + high) / 2)
        return func(*args, **kwargs)


def read_tokenizer(path: Path) -> str:
    """Text of a ``tokenizers`` file.

    Raises:
        CheckpointError: it is not there, or is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{path} cannot be read as a tokenizers file ({str(exc)[:200]}): name the tokenizer.json "
            "that belongs to the CLIP in use"
        ) from exc
    return text


def check_tokenizer(tokenizer_json: str, config: OdiseConfig, source: str) -> None:
    """Refuse a tokenizer that cannot be read or makes ids beyond CLIP's vocabulary.

    Raises:
        CheckpointError: naming ``source``.
    """
    try:
        size = Tokenizer.from_str(tokenizer_json).get_vocab_size()
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(f"{source} is no tokenizers file ({str(exc)[:200]}): copy the checkpoint again") from exc
    if size > config.clip.vocab_size:
        raise CheckpointError(
            f"{source} has {size} tokens, CLIP's text tower {config.clip.vocab_size}: they do not belong together"
        )


def _stored(model: Odise, storage: Storage, sd_text: bool) -> Tensors:
    tensors: Tensors = {}
    for key, tensor in model.state_dict().items():
        if key.startswith(_SD_TEXT):
            if not sd_text:
                continue
            key = _SD_TEXT + key.removeprefix(_SD_TEXT).removeprefix("text_model.")
        tensors[key] = _as_stored(key, tensor.detach().cpu(), storage)
    return tensors


def _as_stored(key: str, tensor: Tensor, storage: Storage) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous()
    wide = tensor.float()
    if not torch.isfinite(wide).all():
        raise CheckpointError(f"{key} holds NaN or infinite values: refused to save a broken model")
    if storage == "fp32" or wide.dim() < 2 or key in _ALWAYS_FP32:
        return wide.contiguous()
    half = wide.half()
    if not torch.isfinite(half).all():
        raise CheckpointError(f"{key} holds {wide.abs().max():.3g}, beyond fp16's 65504: save with storage fp32")
    return half.contiguous()


@contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    if path.exists() and not is_checkpoint(path):
        raise CheckpointError(f"{path} exists and is no checkpoint: refused to replace it; choose another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(path) as folder:
            yield folder
            flush_folder(folder)
            replace_folder(folder, path)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(
            f"cannot write the checkpoint {path} ({exc}): free space or choose another place"
        ) from exc


def is_checkpoint(path: Path) -> bool:
    """Whether a folder describes itself as a checkpoint of this project that this version reads."""
    try:
        read_description(path)
    except CheckpointError:
        return False
    return True


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path} cannot be read ({exc}): the checkpoint is incomplete, copy it again") from exc


def _default_card(description: dict[str, Any]) -> str:
    config = description["config"]
    return (
        f"# {config['name']} ({config['variant']} supervision)\n\n"
        f"An ODISE checkpoint: {description['parameters']:,} numbers stored in {description['storage']}, written by "
        f"odise_rt {description['producer']['odise_rt']}.\n"
        f"Training vocabulary: {len(description['training_vocabulary'])} names.\n"
    )
