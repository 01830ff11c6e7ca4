"""Keeps on disk what the frozen networks compute of a fixed set of views, so that a small machine computes it once.

The results are those of :mod:`training.frozen_features`, e.g. the VAE's posterior mean and its four taps, and CLIP's
image embedding of every window, in fp16. Each network has a folder of its own, so that training one of them anew leaves
the other's results valid, and models that share a network share its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from odise_rt.errors import DatasetError
from odise_rt.files import locked_file
from training.data.views import TrainingViews, View
from training.frozen_features import FrozenFeatures, FrozenNetwork, frozen_networks, network_features
from training.models.odise import Odise

_INDEX = "segment_index"
_FACTS = "facts.json"
_VIEWS = "views.jsonl"
_CHUNK = 1 << 20

Progress = Callable[[Iterator[int], int], Iterator[int]]
"""Wraps an iterator of known length, e.g. in a progress bar."""


def weights_fingerprint(module: nn.Module, without: Collection[str] = ()) -> str:
    """Hash of all parameters and buffers but those of these names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_key(facts: dict[str, Any]) -> str:
    """Folder name of a cache: a hash of all that its content depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class ArrayStore:
    """Arrays with one row for each view, in a finished folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            lines = (folder / _VIEWS).read_text("utf-8").splitlines()
            self.notes: list[dict[str, Any]] = [json.loads(line) for line in lines]
            self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        except (OSError, ValueError, EOFError) as exc:
            raise DatasetError(
                f"feature cache {folder} is broken ({exc}): delete the folder, it is made again"
            ) from exc
        if any(len(array) != len(self.notes) for array in self.arrays.values()):
            raise DatasetError(f"feature cache {folder} is incomplete: delete the folder, it is made again")

    @classmethod
    def open_or_build(
        cls,
        root: Path,
        facts: dict[str, Any],
        views: TrainingViews,
        count: int,
        compute: Callable[[Sequence[View]], dict[str, npt.NDArray[Any]]],
        batch: int,
        progress: Progress | None,
    ) -> ArrayStore:
        """The store for ``facts`` under ``root``, computed first where it is not there yet.

        An interrupted build leaves its folder and continues after the last whole batch. Of several processes one
        computes, and the others wait for it.

        Raises:
            DatasetError: a feature is not finite, what an interrupted build left is damaged, or the disk is full.
        """
        folder = root / cache_key(facts)
        if (folder / _FACTS).exists():
            return cls(folder)
        partial = root / f"{folder.name}.partial"
        with _only_builder(partial, root / f".{folder.name}.lock"):
            if (folder / _FACTS).exists():  # made while this process waited
                return cls(folder)
            partial.mkdir(exist_ok=True)
            notes_file = partial / _VIEWS
            done = _whole_lines(notes_file)
            arrays: dict[str, npt.NDArray[Any]] = {}
            starts = iter(range(done, count, batch))
            for start in progress(starts, (count - done + batch - 1) // batch) if progress else starts:
                drawn = [views[draw] for draw in range(start, min(start + batch, count))]
                for name, values in compute(drawn).items():
                    _check_finite(name, values, drawn)
                    if name not in arrays:
                        shape = (count, *values.shape[1:])
                        arrays[name] = _rows_on_disk(partial / f"{name}.npy", bool(done), values.dtype, shape)
                    arrays[name][start : start + len(drawn)] = values
                for array in arrays.values():
                    array.flush()  # type: ignore[attr-defined]
                with notes_file.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(_note(view)) + "\n" for view in drawn)
            (partial / _FACTS).write_text(json.dumps(facts, indent=1), "utf-8")
            partial.rename(folder)
        return cls(folder)


class FeatureCache:
    """Results of the frozen networks for a fixed set of views, numbered from 0 to ``len - 1``."""

    def __init__(self, stores: Sequence[ArrayStore]) -> None:
        first, *others = stores
        self.notes = first.notes
        self.arrays = {name: array for store in stores for name, array in store.arrays.items()}
        for other in others:
            if other.notes != first.notes:
                raise DatasetError(f"feature caches {first.folder} and {other.folder} disagree: delete both folders")

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
            note["image_id"],
        )

    def features(self, indices: Sequence[int]) -> FrozenFeatures:
        """fp16 features of some views."""

        def read(name: str) -> Tensor:
            return torch.from_numpy(np.stack([self.arrays[name][i] for i in indices])).flatten(0, 1)

        return FrozenFeatures({name: read(name) for name in self.arrays if name != _INDEX})


def network_store(
    root: Path,
    facts: dict[str, Any],
    model: Odise,
    network: FrozenNetwork,
    with_index: bool,
    views: TrainingViews,
    count: int,
    batch: int = 16,
    progress: Progress | None = None,
) -> ArrayStore:
    """One network's features of views 0 to ``count - 1``, and their segment maps if asked for; see
    :func:`open_or_build`.
    """

    def compute(drawn: Sequence[View]) -> dict[str, npt.NDArray[Any]]:
        found = network_features(model, network, _pictures(drawn, model))
        rows = {name: _rows(tensor, len(drawn)) for name, tensor in found.items()}
        return {**rows, _INDEX: np.stack([view.segment_index for view in drawn])} if with_index else rows

    facts = {**facts, "weights": weights_fingerprint(network.module), "network": network.name}
    return ArrayStore.open_or_build(root, facts, views, count, compute, batch, progress)


def open_or_build(
    root: Path,
    facts: dict[str, Any],
    model: Odise,
    views: TrainingViews,
    count: int,
    batch: int = 16,
    progress: Progress | None = None,
) -> FeatureCache:
    """The cache for ``facts`` under ``root``, computed first where it is not there yet.

    Args:
        root: folder of all caches.
        facts: what the views depend on, as JSON types: data set, augmentation, seed. Weights are added here.
        model: supplies the frozen networks.
        views: source of the views; draws 0 to ``count - 1`` are stored.
        count: number of views.
        batch: views computed at once.
        progress: wraps the iterator over first draws, e.g. in a progress bar.
    """
    return FeatureCache(
        [
            network_store(root, facts, model, network, position == 0, views, count, batch, progress)
            for position, network in enumerate(frozen_networks(model))
        ]
    )


def _pictures(views: Sequence[View], model: Odise) -> Tensor:
    images = torch.from_numpy(np.stack([view.image for view in views])).permute(0, 3, 1, 2)
    return images.to(model.noise.device).float() / 255.0


def _rows(tensor: Tensor, views: int) -> npt.NDArray[Any]:
    """(B * N, ...) to fp16 (B, N, ...)."""
    rows: npt.NDArray[Any] = tensor.unflatten(0, (views, -1)).cpu().half().numpy()
    return rows


def _note(view: View) -> dict[str, Any]:
    return {
        "labels": list(view.labels),
        "words": list(view.words),
        "words_valid": view.words_valid,
        "image_id": view.image_id,
    }


def _check_finite(name: str, values: npt.NDArray[Any], drawn: Sequence[View]) -> None:
    if not np.isfinite(values).all():
        raise DatasetError(
            f"{name} of image ids {[view.image_id for view in drawn]} is NaN or beyond fp16: the frozen weights are "
            "broken, or the cache must be switched off (cached_views=0)"
        )


@contextlib.contextmanager
def _only_builder(partial: Path, lock: Path) -> Iterator[None]:
    """Hold the folder of a build for this process alone; others wait. The lock's file stays: who removed it could
    take it from one who waits.

    Raises:
        DatasetError: the disk is full, or not to be written to.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(lock, wait=True):
            yield
    except OSError as exc:
        raise DatasetError(
            f"feature cache {partial} cannot be written ({exc}): free space, or name another --cache"
        ) from exc


def _rows_on_disk(path: Path, there: bool, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An array in a file. Its place on the disk is taken at once: mapped memory that the disk has no room for ends the
    process without a word. One that is there must be whole: numpy would fill it with zeros."""
    if there:
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                found = np.lib.format.read_array_header_1_0(file)
                whole = file.tell() + int(np.prod(shape)) * dtype.itemsize
            size = path.stat().st_size
        except (OSError, ValueError, EOFError) as exc:
            raise DatasetError(f"{path} is missing or damaged ({exc}): delete {path.parent}, it is made again") from exc
        if found != (shape, False, dtype) or size != whole:
            raise DatasetError(f"{path} is cut off or of another shape: delete {path.parent}, it is made again")
        return np.load(path, mmap_mode="r+")
    array: npt.NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.seek(size - array.nbytes)
            for left in range(array.nbytes, 0, -_CHUNK):
                file.write(bytes(min(left, _CHUNK)))
    return array


def _whole_lines(path: Path) -> int:
    """Number of complete lines; a last line cut off by a kill is removed."""
    if not path.exists():
        return 0
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if len(whole) != len(text):
        path.write_text(whole, "utf-8")
    return whole.count("\n")
