"""Stable Diffusion 1.x: CompVis ``.ckpt`` files and diffusers directories, into diffusers' modules.

The two formats hold the same tensors under other names, but for the 1x1 convolutions of the VAE's attention, which are
linear layers in diffusers. Names of the CompVis side are those of ``v1-inference.yaml`` (odise.md section 2.3).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import CLIPTextModel

from odise_rt.errors import CheckpointError
from training.checkpoints.key_table import KeyTable, Tensors, load_strict, quote_keys
from training.checkpoints.report import PartReport
from training.checkpoints.tensor_files import read_tensors

UNET_LEVELS = 4
VAE_LEVELS = 4

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_DIFFUSERS_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}

_ADVICE = "Expected a Stable Diffusion 1.x checkpoint of this config's size, e.g. sd-v1-3.ckpt for odise-sd1"
_SCHEDULE = "noise schedule, computed from the config"
_COUNTED = "position ids count from 0"
_UNUSED_IN_COMPVIS = {
    "model_ema": "moving average of the UNet: ODISE uses the plain weights (use_ema is off)",
    "first_stage_model.loss": "training loss of the VAE",
    "cond_stage_model.transformer.text_model.embeddings.position_ids": _COUNTED,
    "scale_factor": "latent scale, given by the config",
    "logvar": "training loss of the UNet",
    **dict.fromkeys(
        (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "lvlb_weights",
        ),
        _SCHEDULE,
    ),
}


def unet_names(layers_per_block: int) -> dict[str, str]:
    """CompVis ``model.diffusion_model.*`` against ``UNet2DConditionModel``, as prefixes."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def resnet(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.{their}": f"{ours}.{our}" for their, our in _UNET_RESNET.items()})

    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    block = 1
    for level in range(UNET_LEVELS):
        down = f"down_blocks.{level}"
        for layer in range(layers_per_block):
            resnet(f"input_blocks.{block}.0", f"{down}.resnets.{layer}")
            if level < UNET_LEVELS - 1:
                names[f"input_blocks.{block}.1"] = f"{down}.attentions.{layer}"
            block += 1
        if level < UNET_LEVELS - 1:
            names[f"input_blocks.{block}.0.op"] = f"{down}.downsamplers.0.conv"
            block += 1
    block = 0
    for level in range(UNET_LEVELS):
        up = f"up_blocks.{level}"
        for layer in range(layers_per_block + 1):
            resnet(f"output_blocks.{block}.0", f"{up}.resnets.{layer}")
            if level > 0:
                names[f"output_blocks.{block}.1"] = f"{up}.attentions.{layer}"
            block += 1
        if level < UNET_LEVELS - 1:
            # The upsampler follows the level's last residual block and, where there is one, its attention.
            names[f"output_blocks.{block - 1}.{2 if level else 1}.conv"] = f"{up}.upsamplers.0.conv"
    return names


def vae_names(layers_per_block: int) -> dict[str, str]:
    """CompVis ``first_stage_model.*`` against ``AutoencoderKL``, as prefixes."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        mid = f"{half}.mid_block"
        names |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
            f"{half}.mid.block_1": f"{mid}.resnets.0",
            f"{half}.mid.block_2": f"{mid}.resnets.1",
        }
        names |= {f"{half}.mid.attn_1.{their}": f"{mid}.attentions.0.{our}" for their, our in _VAE_ATTENTION.items()}
    for level in range(VAE_LEVELS):
        # CompVis counts the decoder's levels from the finest, diffusers in the order in which they run.
        for theirs, ours, layers in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", layers_per_block),
            (f"decoder.up.{level}", f"decoder.up_blocks.{VAE_LEVELS - 1 - level}", layers_per_block + 1),
        ):
            for layer in range(layers):
                for their, our in _VAE_RESNET.items():
                    names[f"{theirs}.block.{layer}.{their}"] = f"{ours}.resnets.{layer}.{our}"
        if level < VAE_LEVELS - 1:
            names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        if level > 0:
            up = VAE_LEVELS - 1 - level
            names[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return names


def text_prefix(encoder: CLIPTextModel) -> str:
    """``"text_model"`` before transformers 5, which dropped this level of names, and ``""`` since."""
    return "text_model" if hasattr(encoder, "text_model") else ""


def load_stable_diffusion(
    path: Path, vae: nn.Module, unet: nn.Module, text: CLIPTextModel, layers_per_block: tuple[int, int]
) -> list[PartReport]:
    """Fill diffusers' modules from a CompVis file or a diffusers directory.

    Args:
        path: ``sd-v1-*.ckpt`` (or ``.safetensors`` with the same names), or a directory with ``vae/``, ``unet/`` and
            ``text_encoder/``.
        vae: an ``AutoencoderKL`` of the right size, filled in place.
        unet: a ``UNet2DConditionModel``, likewise.
        text: the text encoder, likewise.
        layers_per_block: residual blocks of a level on the way down, of VAE and UNet.

    Raises:
        CheckpointError: the file is of another kind or size, or incomplete.
    """
    if path.is_dir():
        return _load_diffusers(path, vae, unet, text)
    file = read_tensors(path)
    if not any(key.startswith("model.diffusion_model.") for key in file.tensors):
        raise CheckpointError(f"{path} is {file.kind}, expected Stable Diffusion weights. {_ADVICE}")
    if any(key.startswith("cond_stage_model.model.") for key in file.tensors):
        raise CheckpointError(f"{path} is Stable Diffusion 2 (its text encoder is OpenCLIP's). {_ADVICE}")
    parts = {
        "model.diffusion_model": (unet, "unet", unet_names(layers_per_block[1])),
        "first_stage_model": (vae, "vae", vae_names(layers_per_block[0])),
        "cond_stage_model.transformer": (text, "sd_text", {"text_model": text_prefix(text)}),
    }
    used = KeyTable(names={prefix: name for prefix, (_, name, _) in parts.items()}, ignored=_UNUSED_IN_COMPVIS)
    others = {key: used.reason(key) for key in file.tensors if used.ours(key) is None or used.reason(key) is not None}
    unknown = [key for key, reason in others.items() if reason is None]
    if unknown:
        raise CheckpointError(f"{path} holds the unexpected {quote_keys(unknown)}. {_ADVICE}")
    reports = []
    for prefix, (module, name, names) in parts.items():
        tensors = {k: v for k, v in file.tensors.items() if k.startswith(f"{prefix}.") and k not in others}
        table = KeyTable({f"{prefix}.{theirs}": ours for theirs, ours in names.items()})
        if name == "vae":
            tensors = _attention_as_linear(tensors)
        reports.append(load_strict(module, tensors, table, source=str(path), name=name, advice=_ADVICE))
    ignored = {key: reason for key, reason in others.items() if reason is not None}
    reports[0] = replace(reports[0], ignored={**reports[0].ignored, **ignored})
    return reports


def _attention_as_linear(tensors: Tensors) -> Tensors:
    """1x1 convolutions of the VAE's attention, ``(C, C, 1, 1)``, as linear weights ``(C, C)``."""
    return {
        key: tensor[:, :, 0, 0] if ".attn_1." in key and tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in tensors.items()
    }


def _load_diffusers(root: Path, vae: nn.Module, unet: nn.Module, text: CLIPTextModel) -> list[PartReport]:
    reports = []
    parts = ((vae, "vae", "AutoencoderKL"), (unet, "unet", "UNet2DConditionModel"), (text, "sd_text", "CLIPTextModel"))
    for folder, (module, name, kind) in zip(_DIFFUSERS_FOLDERS, parts, strict=True):
        _check_diffusers_config(root / folder, kind)
        file = read_tensors(_diffusers_weights(root / folder))
        table = _diffusers_table(name, file.tensors, text)
        reports.append(load_strict(module, file.tensors, table, source=str(file.path), name=name, advice=_ADVICE))
    return reports


def _diffusers_table(name: str, tensors: Tensors, text: CLIPTextModel) -> KeyTable:
    """Names are the module's own, but for what diffusers and transformers renamed over the years."""
    if name == "sd_text":
        theirs = "text_model" if any(key.startswith("text_model.") for key in tensors) else ""
        position_ids = f"{theirs}.embeddings.position_ids".lstrip(".")
        return KeyTable({theirs: text_prefix(text)}, {position_ids: _COUNTED})
    names = {"": ""}
    if name == "vae":
        for half in ("encoder", "decoder"):
            attention = f"{half}.mid_block.attentions.0"
            names |= {f"{attention}.{their}": f"{attention}.{our}" for their, our in _OLD_DIFFUSERS_ATTENTION.items()}
    return KeyTable(names)


_DIFFUSERS_FOLDERS = ("vae", "unet", "text_encoder")
_DIFFUSERS_FILES = tuple(
    f"{stem}{precision}.{suffix}"
    for suffix in ("safetensors", "bin")
    for precision in ("", ".fp16")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)


def diffusers_files(root: Path) -> list[Path]:
    """The files of a diffusers directory that hold the weights; nothing else in it changes the model.

    Raises:
        CheckpointError: a part has none.
    """
    return [_diffusers_weights(root / folder) for folder in _DIFFUSERS_FOLDERS]


def _diffusers_weights(folder: Path) -> Path:
    for name in _DIFFUSERS_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    raise CheckpointError(
        f"{folder} holds no weights (found {', '.join(found) or 'nothing'}): expected a diffusers directory with "
        "vae/, unet/ and text_encoder/, each with diffusion_pytorch_model.safetensors or model.safetensors in one piece"
    )


def _check_diffusers_config(folder: Path, kind: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} is no readable JSON ({exc}): download the directory again") from exc
    found = config if isinstance(config, Mapping) else {}
    names = [found.get("_class_name"), *(found.get("architectures") or [])]
    if any(names) and kind not in names:
        shown = ", ".join(str(name) for name in names if name)
        raise CheckpointError(f"{path} describes {shown}, expected {kind}. {_ADVICE}")
