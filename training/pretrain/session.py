"""What the small trainings share: options, learning-rate schedule, log, progress, atomic checkpoints, resume."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from odise_rt.command_line import MAX_SEED, whole_number
from odise_rt.errors import CheckpointError, first_line
from odise_rt.files import atomic_writer
from training.command_line import parse_arguments
from training.config import PRESETS
from training.muon import Muon
from training.pretrain.closeups import LARGEST_SIDE
from training.run_log import LOG_NAME, cut_log
from training.run_state import UNREADABLE

STATE_FILE = "state.pt"
_CLIP_NORM = 1.0
"""Gradient norm above which gradients are scaled down."""
CONFIGS = [name for name, config in PRESETS.items() if config.window <= LARGEST_SIDE]
"""Models of which these trainings can draw a window."""


def cosine_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of a step: linear warm-up to ``peak``, then a cosine down to 2 % of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def add_world_arguments(parser: argparse.ArgumentParser, sized: bool = True) -> None:
    """Options of what is trained on drawn scenes: where these are and, if ``sized``, the preset of its networks."""
    parser.add_argument("--scenes", type=Path, required=True, help="Sticker World drawn with --classes all.")
    if sized:
        parser.add_argument("--config", choices=CONFIGS, default="odise-tiny", help="Preset that sizes the networks.")


def parse_options(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a training's command line with the options that all of them have, and set the number of threads."""
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="Seed of all that is drawn.")
    parser.add_argument(
        "--font", type=Path, help="Noto Color Emoji font file. Default: searched for in the usual places."
    )
    return parse_arguments(parser, arguments, device="cpu")


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename, so that a kill leaves the old file or the new one."""
    with atomic_writer(path) as file:
        file.write(content)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG as :func:`write_atomically` does."""
    with atomic_writer(path) as file:
        picture.save(file, "PNG")


class Session:
    """A training that can be killed and resumed.

    Args:
        folder: Where ``state.pt`` and ``log.jsonl`` live; made if absent.
        modules: What is trained (and saved), by name.
        peak_rate: Highest learning rate.
        steps: Length of the whole training.
        warmup: Steps of linear warm-up.
        weight_decay: AdamW's, for matrices and kernels only.
        average: Decay of an exponential moving average of the weights; 0 keeps none.
        orthogonal: Muon moves matrices and kernels whose name contains one of these; AdamW moves the rest.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        peak_rate: float,
        steps: int,
        warmup: int = 100,
        weight_decay: float = 0.05,
        average: float = 0.0,
        orthogonal: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.steps, self.peak_rate, self.warmup = folder, steps, peak_rate, warmup
        self.average, self.step = average, 0
        self.modules = nn.ModuleDict(modules)
        named = [(name, value) for name, value in self.modules.named_parameters() if value.requires_grad]
        matrices = [value for name, value in named if value.ndim >= 2 and any(part in name for part in orthogonal)]
        chosen = {id(value) for value in matrices}
        parameters = [value for _, value in named if id(value) not in chosen]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), eps=1e-8)
        ]
        if matrices:
            self.optimizers.append(Muon(matrices, peak_rate, weight_decay=weight_decay))
        self.averaged: dict[str, Tensor] = {}
        if average:
            self.averaged = {name: value.detach().clone() for name, value in self.modules.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        self._sums: dict[str, float] = {}
        self._count = 0

    def resume(self) -> bool:
        """Load ``state.pt`` if there is one; returns whether there was.

        Raises:
            CheckpointError: The file belongs to another training or is damaged.
        """
        path = self.folder / STATE_FILE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.modules.load_state_dict(state["modules"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            for name, value in state["averaged"].items():
                self.averaged[name].copy_(value)
            self.step = int(state["step"])
        except UNREADABLE as exc:
            raise CheckpointError(f"cannot resume from {path} ({first_line(exc)}): delete it to start again") from exc
        return True

    def save(self) -> None:
        """Write ``state.pt`` atomically.

        Raises:
            CheckpointError: the disk is full or not writable; the state before is kept.
        """
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averaged": self.averaged,
            "step": self.step,
        }
        path = self.folder / STATE_FILE
        try:
            with atomic_writer(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as exc:
            raise CheckpointError(f"cannot save {path} ({first_line(exc)}): free some space, then go on") from exc

    def iterate(self, name: str, save_every: float = 120.0) -> Iterator[int]:
        """Yield step numbers up to the end, saving now and then and at the end."""
        saved_at = time.monotonic()
        cut_log(self.folder, self.step + 1)  # lines count finished steps
        with tqdm(total=self.steps, initial=self.step, desc=name, mininterval=5.0) as progress:
            while self.step < self.steps:
                rate = cosine_rate(self.step, self.steps, self.peak_rate, self.warmup)
                for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                    group["lr"] = rate
                yield self.step
                self.step += 1
                progress.update()
                if time.monotonic() - saved_at > save_every:
                    self.save()
                    saved_at = time.monotonic()
        self.save()

    def descend(self, loss: Tensor, **logged: float) -> None:
        """One optimiser step on ``loss``; the other values only go to the log.

        Raises:
            CheckpointError: The loss or its gradient is not finite; weights and the last checkpoint are kept.
        """
        self._check_finite("loss", loss)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), _CLIP_NORM)
        self._check_finite("the gradient", norm)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average:
            with torch.no_grad():
                decay = min(self.average, (1 + self.step) / (10 + self.step))
                for name, value in self.modules.state_dict().items():
                    self.averaged[name].lerp_(value, 1 - decay)
        for key, value in {"loss": loss.item(), "gradient": float(norm), **logged}.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)
        self._count += 1
        if self._count == 20:
            self.log(**{key: value / self._count for key, value in self._sums.items()})
            self._sums, self._count = {}, 0

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise CheckpointError(
                f"{what} is {value.item()} at step {self.step}: {self.folder / STATE_FILE} holds the last good state; "
                "resume with a lower --rate"
            )

    def log(self, **values: float) -> None:
        """Append a line to ``log.jsonl``."""
        line = {"step": self.step + 1, "time": round(time.time(), 1), **{k: round(v, 5) for k, v in values.items()}}
        with (self.folder / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def use_average(self) -> None:
        """Put the averaged weights into the modules (after training)."""
        if self.average:
            self.modules.load_state_dict(self.averaged)
