"""A very small model, and its weights in every published format, made by reading the key tables backwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.checkpoints.key_table import KeyTable
from training.checkpoints.odise_heads import odise_key_table
from training.checkpoints.stable_diffusion import text_prefix, unet_names, vae_names
from training.config import ODISE_TINY, OdiseConfig
from training.models.odise import TRAINED, Odise


def smallest_config() -> OdiseConfig:
    """The structure of odise-tiny with as few numbers as it allows."""
    tiny = ODISE_TINY
    return dataclasses.replace(
        tiny,
        name="smallest",
        vae=dataclasses.replace(tiny.vae, channels=(8, 8, 16, 16), norm_groups=4),
        unet=dataclasses.replace(tiny.unet, channels=(8, 8, 16, 16), heads=2, context_dim=16, norm_groups=4),
        sd_text=dataclasses.replace(
            tiny.sd_text, vocab_size=300, width=16, layers=1, heads=2, mlp_width=32, start_token=298, end_token=299
        ),
        clip=dataclasses.replace(
            tiny.clip,
            image_size=32,
            width=32,
            layers=1,
            head_width=16,
            embed_dim=16,
            text_width=16,
            text_layers=1,
            text_heads=2,
            vocab_size=300,
            start_token=298,
            end_token=299,
        ),
        head=dataclasses.replace(
            tiny.head,
            pyramid_channels=32,
            hidden_dim=32,
            classification_dim=32,
            queries=4,
            attention_heads=2,
            pixel_decoder_layers=1,
            pixel_decoder_ffn=16,
            mask_decoder_layers=2,
            mask_decoder_ffn=16,
        ),
        window=64,
        test_short_edge=64,
        test_long_edge=128,
    )


@dataclass(frozen=True)
class Published:
    """One model's weights in the formats of the originals."""

    model: Odise
    odise: Path
    compvis: Path
    diffusers: Path
    clip: Path

    @property
    def config(self) -> OdiseConfig:
        """Of the model."""
        return self.model.config

    def files(self) -> dict[str, Any]:
        """As ``load_released`` takes them."""
        return {"odise": self.odise, "stable_diffusion": self.compvis, "clip": self.clip}


def _backwards(state: Mapping[str, Tensor], table: KeyTable) -> dict[str, Tensor]:
    return {table.theirs(key): tensor.clone() for key, tensor in state.items()}


def compvis_tensors(model: Odise) -> dict[str, Tensor]:
    """Stable Diffusion under CompVis names, with the extras that such files hold."""
    assert model.sd_text is not None
    vae = _backwards(model.vae.state_dict(), KeyTable(vae_names(model.config.vae.layers_per_block)))
    unet = _backwards(model.unet.state_dict(), KeyTable(unet_names(model.config.unet.layers_per_block)))
    text = _backwards(model.sd_text.state_dict(), KeyTable({"text_model": text_prefix(model.sd_text)}))
    linear = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    vae = {k: v[:, :, None, None] if ".attn_1." in k and k.endswith(linear) else v for k, v in vae.items()}
    return {
        **{f"first_stage_model.{k}": v for k, v in vae.items()},
        **{f"model.diffusion_model.{k}": v for k, v in unet.items()},
        **{f"cond_stage_model.transformer.{k}": v for k, v in text.items()},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
    }


def odise_tensors(model: Odise) -> dict[str, Tensor]:
    """The trained parts under official names, with the loss's weights that the released files hold."""
    trained = {key: tensor for key, tensor in model.state_dict().items() if key.split(".")[0] in TRAINED}
    classes = 134 if model.config.variant == "label" else 2
    return {**_backwards(trained, odise_key_table(model.config)), "criterion.empty_weight": torch.ones(classes)}


def publish(config: OdiseConfig, folder: Path) -> Published:
    """Write a model with random weights in the published formats."""
    torch.manual_seed(0)
    model = Odise(config).eval()
    for parameter in model.parameters():  # many start at a constant, under which a swap of two would not show
        torch.nn.init.normal_(parameter, std=0.1)
    model.refresh_null_text_embedding()
    odise, compvis, clip = (folder / name for name in ("odise.pth", "sd.ckpt", "clip.pt"))
    torch.save({"model": odise_tensors(model), "iteration": 9}, odise)
    torch.save({"state_dict": compvis_tensors(model), "global_step": 470000}, compvis)
    torch.save(model.clip.state_dict(), clip)
    diffusers = folder / "diffusers"
    for name, module, file in (
        ("vae", model.vae, "diffusion_pytorch_model.safetensors"),
        ("unet", model.unet, "diffusion_pytorch_model.safetensors"),
        ("text_encoder", model.sd_text, "model.safetensors"),
    ):
        assert module is not None
        (diffusers / name).mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, diffusers / name / file)
    return Published(model, odise, compvis, diffusers, clip)
