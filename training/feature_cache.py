"""Keeps on disk what the frozen networks compute of a fixed set of views, so that a small machine computes it once.

Stored in fp16: the VAE's posterior mean and its four taps, and CLIP's image embedding of every window. The UNet is not
cached: its conditioning, the implicit captioner, is trained, so it runs (with gradients to the conditioning) each step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from odise_rt.errors import DatasetError
from odise_rt.windows import WindowGrid, window_grid
from training.data.views import TrainingViews, View
from training.models.odise import Odise
from training.models.windows import cut_windows, stitch_levels

_FEATURES = ("mean", "encoder_s2", "encoder_s3", "decoder_s3", "decoder_s2", "image_embedding")
_INDEX = "segment_index"
_FACTS = "facts.json"
_VIEWS = "views.jsonl"


@dataclass(frozen=True)
class FrozenFeatures:
    """Results of VAE and CLIP for N windows of each of B views, flattened to B * N."""

    mean: Tensor
    """(B * N, 4, h, h) posterior mean, unscaled."""
    encoder_taps: tuple[Tensor, Tensor]
    decoder_taps: tuple[Tensor, Tensor]
    image_embedding: Tensor
    """(B * N, D)."""

    def to(self, device: torch.device | str) -> FrozenFeatures:
        """The same as float32 on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, torch.float32)

        first, second = self.encoder_taps
        third, fourth = self.decoder_taps
        return FrozenFeatures(
            move(self.mean), (move(first), move(second)), (move(third), move(fourth)), move(self.image_embedding)
        )


@torch.no_grad()
def frozen_features(model: Odise, images: Tensor) -> FrozenFeatures:
    """Run VAE and CLIP on all windows of images (B, 3, H, W) in [0, 1]."""
    windows = cut_windows(images, window_grid(images.shape[2], images.shape[3], model.config.window))
    features = model.diffusion_features
    mean, encoder_taps = features.encode(features.to_vae_pixels(windows))
    decoder_taps = features.decode_prefix(mean)
    embedding = model.clip_image(windows)
    return FrozenFeatures(mean, (encoder_taps[0], encoder_taps[1]), (decoder_taps[0], decoder_taps[1]), embedding)


def pyramid_from_features(model: Odise, features: FrozenFeatures, grid: WindowGrid) -> dict[str, Tensor]:
    """Stitched levels s2..s5 of views whose frozen features are known: the trained half of ``Odise.pyramid``."""
    context, time = model.implicit_captioner(features.image_embedding, model.null_text_embedding)
    latent = model.diffusion_features.add_noise(features.mean, model.noise)
    unet_taps = model.diffusion_features.denoise_prefix(latent, context, time)
    taps = [*features.encoder_taps, *unet_taps, *features.decoder_taps]
    return stitch_levels(model.feature_pyramid(taps, grid.side), grid)


def weights_fingerprint(modules: Sequence[nn.Module]) -> str:
    """Hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_key(facts: dict[str, Any]) -> str:
    """Folder name of a cache: a hash of all that its content depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class FeatureCache:
    """A finished cache, opened for reading. Views are numbered from 0 to ``len - 1``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / _FACTS).read_text("utf-8"))
            lines = (folder / _VIEWS).read_text("utf-8").splitlines()
            self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*_FEATURES, _INDEX)}
        except (OSError, ValueError) as exc:
            raise DatasetError(
                f"feature cache {folder} is broken ({exc}): delete the folder, it is made again"
            ) from exc
        self.notes = [json.loads(line) for line in lines]
        if any(len(array) != len(self.notes) for array in self.arrays.values()):
            raise DatasetError(f"feature cache {folder} is incomplete: delete the folder, it is made again")

    def __len__(self) -> int:
        return len(self.notes)

    def view(self, index: int) -> View:
        """The view without its picture (an empty array): what targets and words need."""
        note = self.notes[index]
        return View(
            np.empty((0, 0, 3), np.uint8),
            np.asarray(self.arrays[_INDEX][index]),
            tuple(note["labels"]),
            tuple(note["words"]),
            bool(note["words_valid"]),
            int(note["image_id"]),
        )

    def features(self, indices: Sequence[int]) -> FrozenFeatures:
        """fp16 features of some views."""

        def read(name: str) -> Tensor:
            return torch.from_numpy(np.stack([self.arrays[name][i] for i in indices])).flatten(0, 1)

        return FrozenFeatures(
            read("mean"),
            (read("encoder_s2"), read("encoder_s3")),
            (read("decoder_s3"), read("decoder_s2")),
            read("image_embedding"),
        )


def open_or_build(
    root: Path,
    facts: dict[str, Any],
    model: Odise,
    views: TrainingViews,
    count: int,
    batch: int = 16,
    progress: Callable[[Iterator[int], int], Iterator[int]] | None = None,
) -> FeatureCache:
    """The cache for ``facts`` under ``root``, computed first where it is not there yet.

    An interrupted build leaves its folder and continues at the last whole batch.

    Args:
        root: folder of all caches.
        facts: everything the content depends on, as JSON types: data set, frozen weights, augmentation, seed.
        model: supplies VAE and CLIP.
        views: source of the views; draws 0 to ``count - 1`` are stored.
        count: number of views.
        batch: views computed at once.
        progress: wraps the iterator over first draws, e.g. in a progress bar.
    """
    folder = root / cache_key(facts)
    if (folder / _FACTS).exists():
        return FeatureCache(folder)
    partial = root / f"{folder.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    notes_file = partial / _VIEWS
    done = _whole_lines(notes_file)
    arrays: dict[str, npt.NDArray[Any]] = {}
    starts = iter(range(done, count, batch))
    for start in progress(starts, (count - done + batch - 1) // batch) if progress else starts:
        drawn = [views[draw] for draw in range(start, min(start + batch, count))]
        images = torch.from_numpy(np.stack([view.image for view in drawn])).permute(0, 3, 1, 2).float() / 255.0
        result = frozen_features(model, images.to(next(model.parameters()).device))
        named = dict(
            zip(
                _FEATURES,
                (result.mean, *result.encoder_taps, *result.decoder_taps, result.image_embedding),
                strict=True,
            )
        )
        rows = {name: tensor.unflatten(0, (len(drawn), -1)).cpu().half().numpy() for name, tensor in named.items()}
        rows[_INDEX] = np.stack([view.segment_index for view in drawn])
        for name, values in rows.items():
            if not np.isfinite(values).all():
                raise DatasetError(
                    f"{name} of draws {start}.. is NaN or beyond fp16 (image ids {[v.image_id for v in drawn]}): the "
                    "frozen weights are broken, or the cache must be switched off (cached_views=0)"
                )
            if name not in arrays:
                path = partial / f"{name}.npy"
                mode: Any = "r+" if path.exists() and done else "w+"
                arrays[name] = np.lib.format.open_memmap(path, mode, values.dtype, (count, *values.shape[1:]))
            arrays[name][start : start + len(drawn)] = values
        with notes_file.open("a", encoding="utf-8") as file:
            for view in drawn:
                note = {
                    "labels": view.labels,
                    "words": view.words,
                    "words_valid": view.words_valid,
                    "image_id": view.image_id,
                }
                file.write(json.dumps(note) + "\n")
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    (partial / _FACTS).write_text(json.dumps(facts, indent=1), "utf-8")
    partial.rename(folder)
    return FeatureCache(folder)


def _whole_lines(path: Path) -> int:
    """Number of complete lines; a last line cut off by a kill is removed."""
    if not path.exists():
        return 0
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if len(whole) != len(text):
        path.write_text(whole, "utf-8")
    return whole.count("\n")
