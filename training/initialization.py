"""Random weights that keep activations alive, for models that nobody trained: exports, benchmarks and tests of scale.

Every tensor depends on its name and a seed alone, so two processes on two machines hold the same model.
"""

from __future__ import annotations

import math
import re
import zlib

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from tqdm import tqdm

from odise_rt.errors import ConfigError
from training.checkpoints import LoadedCheckpoint, LoadReport, openai_clip_tokenizer_json
from training.checkpoints.own_format import uninitialised_model
from training.config import OdiseConfig, preset
from training.models.diffusion_features import fixed_noise
from training.models.mask_embedding import MaskEmbedding
from training.models.odise import Odise

OPENAI_VOCABULARY = 49408
_BYTES = 256
_EMBEDDING = re.compile(r"(embedding|embedding\.weight|position|query_(features|positions)\.weight)$")
"""Names of tables of vectors, which have no fan-in."""


def random_checkpoint(name: str, seed: int) -> LoadedCheckpoint:
    """A preset with random weights and a tokenizer that fits its text tower.

    Args:
        name: a key of :data:`training.config.PRESETS`.
        seed: any integer.

    Raises:
        ConfigError: an unknown preset, or one whose text vocabulary no tokenizer here fits.
    """
    config = preset(name)
    model = uninitialised_model(config)
    initialise(model, seed)
    return LoadedCheckpoint(model.eval(), config, (), tokenizer_for(config), LoadReport(()))


@torch.no_grad()
def initialise(model: Odise, seed: int) -> None:
    """Fill every parameter and buffer of a model.

    Weights are normal with the variance that keeps the scale of activations (1 / fan-in), norms start at one, biases at
    zero, and the captioner's gates are half open so that the image matters to the UNet.
    """
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm)
    }
    parameters = list(model.named_parameters())
    for name, parameter in tqdm(parameters, desc="random weights", unit="tensor", delay=2.0):
        generator = torch.Generator(parameter.device).manual_seed(
            zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF)
        )
        if name in norms:
            parameter.fill_(1.0)
        elif name.endswith("bias") and "sampling_offsets" not in name:
            parameter.zero_()
        elif parameter.dim() == 0:
            parameter.fill_(math.log(1.0 / 0.07))
        else:
            parameter.normal_(0.0, _scale(name, parameter), generator=generator)
    for module in model.modules():
        if hasattr(module, "position_ids") and isinstance(module.position_ids, Tensor):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[-1]).expand_as(module.position_ids))
        if isinstance(module, MaskEmbedding):
            module.log_logit_scale.fill_(math.log(1.0 / 0.07))
    if model.clip.attn_mask is not None:
        length = model.clip.attn_mask.shape[0]
        model.clip.attn_mask.copy_(torch.full((length, length), float("-inf")).triu(1))
    model.noise.copy_(fixed_noise(model.config))
    model.refresh_null_text_embedding()


def _scale(name: str, parameter: Tensor) -> float:
    """Standard deviation of a weight."""
    if "gate" in name:
        return 0.5
    if "sampling_offsets.bias" in name:
        return 2.0  # pixels
    if _EMBEDDING.search(name):
        if "query" in name:
            return 3.0  # larger than what attention adds, so that queries stay different from each other
        return 0.02 if name.startswith(("clip.", "sd_text.")) else 0.5
    return float(math.prod(parameter.shape[1:])) ** -0.5


def tokenizer_for(config: OdiseConfig) -> str:
    """OpenAI's tokenizer where the text tower has its vocabulary, else one of single bytes.

    Raises:
        ConfigError: the vocabulary is too small for bytes.
    """
    if config.clip.vocab_size == OPENAI_VOCABULARY:
        return openai_clip_tokenizer_json()
    if config.clip.start_token < _BYTES:
        raise ConfigError(
            f"config {config.name!r} has start_token {config.clip.start_token}: random weights need a text vocabulary "
            f"of at least {_BYTES} pieces below it"
        )
    pieces = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    text: str = tokenizer.to_str()
    return text
