"""Checkpoints: this project's format, and strict readers of the published ODISE, Stable Diffusion and CLIP files."""

from training.checkpoints.clip_tokenizer import openai_clip_tokenizer_json
from training.checkpoints.own_format import LoadedCheckpoint, Storage, load_checkpoint, save_checkpoint
from training.checkpoints.released import load_released
from training.checkpoints.report import LoadReport, PartReport

__all__ = [
    "LoadReport",
    "LoadedCheckpoint",
    "PartReport",
    "Storage",
    "load_checkpoint",
    "load_released",
    "openai_clip_tokenizer_json",
    "save_checkpoint",
]
