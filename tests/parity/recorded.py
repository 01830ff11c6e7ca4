"""Recorded tensors of the official implementation, from the fixture or in full precision from the original files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.parity.quantised import Steps, decode, decompress

FIXTURE = Path(__file__).parents[1] / "fixtures" / "reference"
VARIANTS = ("label", "caption")
MANIFEST = "manifest.json"
CONTENT = "recorded.zip"
IMAGE = "input.png"


@dataclass(frozen=True)
class Expected:
    """One recorded tensor to compare with."""

    values: np.ndarray
    stride: tuple[int, ...]
    """Which entries were kept along each axis: every stride-th, from the first."""
    scale: float
    """Largest magnitude of the whole tensor, to which errors are related."""

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The entries of a whole tensor that were kept."""
        return whole[tuple(slice(None, None, step) for step in self.stride)]


class Recorded:
    """The tensors of one variant's run by their recorded names."""

    def __init__(self, expected: Callable[[str], Expected | None]) -> None:
        self._expected = expected
        self._cache: dict[str, Expected | None] = {}

    def expected(self, key: str) -> Expected | None:
        """What to compare with; ``None`` if the tensor was not recorded for this variant."""
        if key not in self._cache:
            self._cache[key] = self._expected(key)
        return self._cache[key]

    def __getitem__(self, key: str) -> np.ndarray:
        """A whole tensor, to feed a stage with."""
        found = self.expected(key)
        assert found is not None, f"{key} was not recorded"
        assert set(found.stride) <= {1}, f"{key} was not recorded as a whole"
        return found.values

    def json(self, key: str) -> Any:
        """A recorded JSON text, decoded."""
        return json.loads(self[key].tobytes().decode())


def from_npz(folder: Path, variant: str) -> Recorded:
    """The original recording in full precision: ``recorded_<variant>.npz`` in a folder."""
    return from_arrays(np.load(folder / f"recorded_{variant}.npz", allow_pickle=False))


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Recorded:
    """Whole tensors by their recorded names."""

    def expected(key: str) -> Expected | None:
        if key not in arrays:
            return None
        values = arrays[key]
        return Expected(values, (1,) * values.ndim, scale_of(values))

    return Recorded(expected)


def from_fixture(variant: str, folder: Path = FIXTURE) -> Recorded:
    """The recording that is kept with the tests; see README.md beside it for its precision."""
    archive = zipfile.ZipFile(folder / CONTENT)
    tensors: dict[str, Any] = json.loads(archive.read(MANIFEST))["tensors"]

    def expected(key: str) -> Expected | None:
        if key == "input.image":
            with Image.open(folder / IMAGE) as image:
                values = np.asarray(image).transpose(2, 0, 1)
            return Expected(values, (1, 1, 1), scale_of(values))
        name = f"{variant}/{key}" if f"{variant}/{key}" in tensors else key
        if name not in tensors:
            return None
        entry = tensors[name]
        if "corner_of" in entry:
            whole = expected(entry["corner_of"])
            assert whole is not None
            values = whole.values[tuple(slice(0, side) for side in entry["shape"])]
        else:
            values = _read(archive, name, entry)
        return Expected(values, tuple(entry["stride"]), entry["scale"])

    return Recorded(expected)


def _read(archive: zipfile.ZipFile, name: str, entry: dict[str, Any]) -> np.ndarray:
    shape = tuple(entry["shape"])
    if "dtype" in entry:
        values = np.frombuffer(decompress(archive.read(f"{name}/exact")), np.dtype(entry["dtype"]))
        return values.reshape(shape)
    parts = {part: archive.read(f"{name}/{part}") for part in entry["parts"]}
    return decode(parts, Steps(**entry["steps"]), shape)


def scale_of(values: np.ndarray) -> float:
    """Largest magnitude."""
    return float(np.abs(values.astype(np.float64)).max()) if values.size else 0.0
