"""Reads tensors from files of other projects without ever running code that a file brings along.

safetensors files are read as such. Files of ``torch.save`` go through ``torch.load(weights_only=True)``; where such a
file refers to Python objects of a training framework (Lightning puts its callbacks into Stable Diffusion's ``.ckpt``),
an inert placeholder takes their place. A file that refers to anything else is refused. TorchScript archives, the form
in which OpenAI publishes CLIP, are read the same way after their code has been left out.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from odise_rt.errors import CheckpointError
from training.checkpoints.key_table import Tensors, quote_keys

Container = Literal["safetensors", "torch", "torchscript"]

_WRAPPERS = ("state_dict", "model")
"""Under these names torch files keep their tensors beside optimizer states and counters."""

_FRAMEWORKS = (
    "pytorch_lightning.",
    "lightning.",
    "omegaconf.",
    "argparse.",
    "numpy.",
    "__torch__.",
    "torch.jit._pickle.",
)
"""Objects of these packages may be in a file; placeholders are read in their stead."""

_SCRIPT_FILES = ("data.pkl", "version", "byteorder", ".format_version")


class _Placeholder:
    """Stands for an object of a package that is not ours: takes any arguments, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors by name."""

    path: Path
    container: Container
    tensors: Tensors
    metadata: Mapping[str, str]
    """Text that a safetensors file carries; empty for other files."""

    @property
    def kind(self) -> str:
        """What the names look like, in words."""
        return kind_of(self.tensors)


_KINDS = (
    ("model.diffusion_model.", "a Stable Diffusion checkpoint in CompVis format"),
    ("sem_seg_head.", "a released ODISE checkpoint"),
    ("mask_generator.", "a checkpoint of this project"),
    ("visual.", "a CLIP checkpoint"),
    ("module.visual.", "a CLIP checkpoint"),
    ("encoder.down_blocks.", "a diffusers VAE"),
    ("down_blocks.", "a diffusers UNet"),
    ("text_model.", "a transformers CLIP text encoder"),
    ("embeddings.token_embedding.", "a transformers CLIP text encoder"),
)


def kind_of(names: Mapping[str, object]) -> str:
    """What a set of tensor names looks like, in words."""
    for prefix, kind in _KINDS:
        if any(name.startswith(prefix) for name in names):
            return kind
    first = quote_keys(sorted(names))
    return f"an unknown set of {len(names)} tensors ({first})" if names else "a file without tensors"


def read_tensors(path: Path) -> TensorFile:
    """Read every tensor of a file to the CPU; large files are memory-mapped.

    Raises:
        CheckpointError: not a readable file, truncated, or a pickle that asks for code.
    """
    if not path.is_file():
        what = "a directory" if path.is_dir() else "missing"
        raise CheckpointError(f"{path} is {what}: expected a file of tensors (.safetensors, .pth, .ckpt, .pt or .bin)")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(path, archive)
        return TensorFile(path, "torch", _unwrap(path, _load(path, path)), {})
    except CheckpointError:
        raise
    except MemoryError as exc:
        raise CheckpointError(f"{path} does not fit into memory") from exc
    except Exception as exc:
        # Damaged archives end in RuntimeError, EOFError, KeyError, UnpicklingError, BadZipFile and others.
        line = str(exc).strip().splitlines()[0][:200] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(
            f"{path} cannot be read as tensors ({line}): it is truncated or no checkpoint; get the file again"
        ) from exc


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return TensorFile(path, "safetensors", tensors, file.metadata() or {})
    except SafetensorError as exc:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({exc}): it is truncated or of another kind; get the file again"
        ) from exc


def _load(path: Path, file: Path | io.BytesIO) -> Any:
    """``torch.load`` that runs no code: unknown objects become placeholders, or an error if they may be code."""
    is_zip = zipfile.is_zipfile(file)
    if isinstance(file, io.BytesIO):
        file.seek(0)
    foreign = get_unsafe_globals_in_checkpoint(file) if is_zip else []
    refused = sorted(name for name in foreign if not name.startswith(_FRAMEWORKS))
    if refused:
        raise CheckpointError(
            f"{path} asks to run Python code ({quote_keys(refused)}) when it is loaded: refused. "
            "Expected tensors only; convert it to safetensors where you trust it"
        )
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with safe_globals([(_Placeholder, name) for name in foreign]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip and isinstance(file, Path))


def _read_torchscript(path: Path, archive: zipfile.ZipFile) -> TensorFile:
    """Read the tensors of a TorchScript archive as attributes of placeholders; its code is not even copied."""
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as out:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            if inner in _SCRIPT_FILES or inner.startswith("data/"):
                out.writestr(name, archive.read(name))
    plain.seek(0)
    tensors: Tensors = {}
    _collect(_load(path, plain), "", tensors)
    return TensorFile(path, "torchscript", tensors, {})


def _collect(node: object, prefix: str, found: Tensors) -> None:
    for name, value in vars(node).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Placeholder):
            _collect(value, f"{prefix}{name}.", found)


def _unwrap(path: Path, content: object) -> Tensors:
    """The dictionary of tensors in what ``torch.load`` returned."""
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            inner = content.get(wrapper)
            if isinstance(inner, Mapping):
                content = inner
                break
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(
        f"{path} holds {_describe(content)}: expected a dictionary of tensors, alone or under "
        f"{' or '.join(repr(name) for name in _WRAPPERS)}"
    )


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary without tensors (keys {quote_keys([str(key) for key in content])})"
    return f"a {type(content).__name__}"
