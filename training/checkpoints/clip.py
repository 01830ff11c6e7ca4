"""CLIP: OpenAI's files and open_clip's, into ``open_clip.model.CLIP``.

OpenAI publishes ``ViT-L-14-336px.pt`` as a TorchScript archive, others pass it on as a plain state dict; open_clip's
files hold the same names, under ``module.`` when a distributed trainer wrote them and with the text tower under
``text.`` in its newer layout.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from odise_rt.errors import CheckpointError
from training.checkpoints.key_table import KeyTable, Tensors, load_strict
from training.checkpoints.report import PartReport
from training.checkpoints.tensor_files import read_tensors
from training.config import ClipConfig

_ADVICE = "Expected an OpenAI or open_clip checkpoint of this config's size, e.g. ViT-L-14-336px.pt for odise-sd1"
_TEXT_TOWER = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
_FACT = "fact about the model, compared with the config"
_UNUSED = {
    "input_resolution": _FACT,
    "context_length": _FACT,
    "vocab_size": _FACT,
    "attn_mask": "causal mask, computed",
    "text.attn_mask": "causal mask, computed",
}


def load_clip(path: Path, clip: nn.Module, config: ClipConfig) -> PartReport:
    """Fill a CLIP of the right size in place; half precision is widened.

    Whether a checkpoint was trained with QuickGELU (OpenAI's were) is not in the file: ``config.quick_gelu`` says.

    Raises:
        CheckpointError: the file is of another kind or size, or incomplete.
    """
    file = read_tensors(path)
    tensors: Tensors = {key.removeprefix("module."): tensor for key, tensor in file.tensors.items()}
    if not any(key.startswith("visual.") for key in tensors):
        raise CheckpointError(f"{path} is {file.kind}, expected CLIP weights. {_ADVICE}")
    _check_facts(path, tensors, config)
    in_text = any(key.startswith("text.") for key in tensors)
    names = {"visual": "visual", "logit_scale": "logit_scale"}
    names |= {f"text.{name}" if in_text else name: name for name in _TEXT_TOWER}
    return load_strict(clip, tensors, KeyTable(names, _UNUSED), source=str(path), name="clip", advice=_ADVICE)


def _check_facts(path: Path, tensors: Tensors, config: ClipConfig) -> None:
    expected = {
        "input_resolution": config.image_size,
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
    }
    for key, value in expected.items():
        if key in tensors and tensors[key].numel() == 1 and int(tensors[key]) != value:
            raise CheckpointError(f"{path} has {key} {int(tensors[key])}, the config {value}. {_ADVICE}")
