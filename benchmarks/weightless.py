"""A bundle in a few megabytes, for a machine that its weights cannot reach.

How long a network takes depends on its operators and shapes, hardly on its numbers. ``pack`` keeps all of a bundle but
its large weights, of which it keeps mean and standard deviation. ``fill`` makes a bundle of that, whose large weights
are noise: for one seed the same bits on every machine, so that the bundle has the same digest everywhere. It is named
as noise, it segments nothing, and engines are built from it as from any other::

    python -m benchmarks.weightless pack out/odise-sd1 out/odise-sd1.zip
    python -m benchmarks.weightless fill out/odise-sd1.zip out/odise-sd1-noise
    python -m export.build_engines --bundle out/odise-sd1-noise --engine ort-cuda --engine-precision fp16
    python -m benchmarks.gpu_check --full-bundle out/odise-sd1-noise
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from odise_rt.bundle import CONSTANTS_NAME, MANIFEST_NAME, TOKENIZER_NAME, Bundle, StageFile, file_sha256
from odise_rt.command_line import MAX_SEED, CommandParser, command, whole_number
from odise_rt.errors import BundleError
from odise_rt.files import atomic_writer, write_json
from odise_rt.partial_folder import partial_folder

SCHEMA_VERSION = 1
LARGE = 1 << 14
"""Elements from which a tensor of floating point numbers becomes noise."""
PERIOD = (1 << 22) - 3
"""Numbers after which the noise repeats: a prime, so that rows of a matrix do not."""
MAX_FILE_BYTES = 1 << 40
MAX_ARCHIVE_BYTES = 4 << 30
"""Largest size of all that an archive unpacks to."""
SEED = 5
"""Of several that were tried on odise-sd1, one whose masks are large. Where they are nearly empty, as chance may
have it, each pixel that rounding takes from a mask moves it, and no mask decoder in fp16 agrees."""
_TABLE = "weights.json"
_KEPT = "kept/"
"""Folder of the archive for the bytes that stay, one file for each weight file."""
_DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Noise:
    """One tensor that is filled with noise."""

    offset: int
    """Byte in its file."""
    count: int
    dtype: str
    mean: float
    deviation: float

    @property
    def nbytes(self) -> int:
        """Size in its file."""
        return self.count * np.dtype(self.dtype).itemsize

    def values(self, block: np.ndarray, key: str) -> Iterator[np.ndarray]:
        """The tensor in pieces.

        Args:
            block: from :func:`noise_block`.
            key: of the weight file, which decides where in the block the tensor starts.
        """
        at, left = zlib.crc32(f"{key}:{self.offset}".encode()) % len(block), self.count
        while left:
            piece = block[at : at + left]
            yield (piece * np.float32(self.deviation) + np.float32(self.mean)).astype(self.dtype)
            at, left = 0, left - len(piece)


@dataclass(frozen=True)
class WeightFile:
    """What becomes of one weight file."""

    nbytes: int
    kept: tuple[tuple[int, int], ...]
    """Offset and size of what stays; their bytes follow each other in the archive."""
    noise: tuple[Noise, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        noise = [[n.offset, n.count, n.dtype, n.mean, n.deviation] for n in self.noise]
        return {"bytes": self.nbytes, "kept": [list(span) for span in self.kept], "noise": noise}

    @classmethod
    def from_dict(cls, data: Any) -> WeightFile:
        """The inverse of :meth:`to_dict`; raises :class:`ValueError` if spans or numbers make no sense."""
        kept = tuple((int(offset), int(size)) for offset, size in data["kept"])
        noise = tuple(
            Noise(int(offset), int(count), str(dtype), float(mean), float(deviation))
            for offset, count, dtype, mean, deviation in data["noise"]
        )
        file = cls(int(data["bytes"]), kept, noise)
        if not 0 <= file.nbytes <= MAX_FILE_BYTES:
            raise ValueError(f"a weight file of {file.nbytes} bytes")
        for entry in noise:
            if entry.dtype not in _DTYPES or not math.isfinite(entry.mean) or not math.isfinite(entry.deviation):
                raise ValueError(f"{entry}")
        end = 0  # what does not overlap also bounds the work
        for offset, size in sorted([*kept, *((n.offset, n.nbytes) for n in noise)]):
            if offset < end or size < 0 or offset + size > file.nbytes:
                raise ValueError(f"{size} bytes at {offset} overlap others, or leave the file")
            end = offset + size
        return file


def noise_block() -> np.ndarray:
    """float32 (PERIOD,) of mean 0 and deviation 1, uniform: made of raw bits, which no version of numpy changes."""
    raw = np.random.PCG64(0).random_raw(-(-PERIOD // 4)).astype("<u8").view("<u2")[:PERIOD]
    half, deviation = 32767.5, math.sqrt((65536**2 - 1) / 12)
    return ((raw.astype(np.float64) - half) / deviation).astype(np.float32)


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(bundle_dir: Path, archive: Path) -> None:
    """Write the archive of a bundle; engines are left out, as they hold the weights once more.

    Raises:
        BundleError: no bundle, or one of which a file was altered.
    """
    bundle = Bundle.open(bundle_dir)
    graphs = sorted({file.path for file in _stage_files(bundle)})
    places = _external_tensors(graphs)
    with atomic_writer(archive) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in [*(bundle.root / name for name in (MANIFEST_NAME, CONSTANTS_NAME, TOKENIZER_NAME)), *graphs]:
            zipped.write(path, path.relative_to(bundle.root).as_posix())
        table = {}
        for path, tensors in tqdm(sorted(places.items()), desc="weights", unit="file"):
            relative = path.relative_to(bundle.root.resolve()).as_posix()
            with zipped.open(_KEPT + relative, "w", force_zip64=True) as kept:
                table[relative] = _pack_file(path, tensors, kept).to_dict()
        zipped.writestr(_TABLE, json.dumps({"schema_version": SCHEMA_VERSION, "files": table}))


def _stage_files(bundle: Bundle) -> Iterator[StageFile]:
    for entry in bundle.stages.values():
        yield from (entry.file, *entry.variants.values())


def _external_tensors(graphs: list[Path]) -> dict[Path, dict[int, tuple[int, str]]]:
    """Weight file to the tensors in it: offset to size in bytes and dtype."""
    import onnx_ir as ir

    places: dict[Path, dict[int, tuple[int, str]]] = {}
    for graph in graphs:
        for value in ir.load(graph).graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                dtype = str(np.dtype(tensor.dtype.numpy()))
                path = Path(tensor.path).resolve()
                places.setdefault(path, {})[tensor.offset or 0] = (int(tensor.length or tensor.nbytes), dtype)
    return places


def _pack_file(path: Path, tensors: dict[int, tuple[int, str]], kept: Any) -> WeightFile:
    """Write what stays of one file, and say what becomes of the rest."""
    data = np.memmap(path, np.uint8, "r")
    spans, noise = [], []
    for offset, (size, dtype) in sorted(tensors.items()):
        raw = data[offset : offset + size]
        values = raw.view(dtype) if dtype in _DTYPES and size >= LARGE * np.dtype(dtype).itemsize else None
        if values is None or not np.isfinite(values).all():
            spans.append((offset, size))
            kept.write(raw.tobytes())
            continue
        mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        noise.append(Noise(offset, len(values), dtype, mean, deviation))
    return WeightFile(len(data), tuple(spans), tuple(noise))


# ---- filling ---------------------------------------------------------------------------------------------------------


def fill(archive: Path, out: Path, seed: int = SEED) -> Bundle:
    """Make a bundle of noise from an archive.

    Args:
        archive: from :func:`pack`.
        out: a new folder; it appears when it is complete.
        seed: another one gives other noise.

    Raises:
        BundleError: the archive is damaged, or ``out`` is there already.
    """
    if out.exists():
        raise BundleError(f"{out} is there already: remove it, or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(out) as partial:
        try:
            with zipfile.ZipFile(archive) as zipped:
                _fill_folder(zipped, partial, seed)
        except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, RecursionError) as exc:
            raise BundleError(f"{archive} is no archive of a bundle ({exc!r}): pack the bundle again") from exc
        Bundle.open(partial, verify=False)
        partial.rename(out)
    return Bundle.open(out, verify=False)


def _fill_folder(zipped: zipfile.ZipFile, folder: Path, seed: int) -> None:
    if sum(member.file_size for member in zipped.infolist()) > MAX_ARCHIVE_BYTES:
        raise ValueError("it unpacks to more than a bundle without weights has")
    table = json.loads(zipped.read(_TABLE))
    if table["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {table['schema_version']!r}, expected {SCHEMA_VERSION}")
    files = {str(relative): WeightFile.from_dict(entry) for relative, entry in table["files"].items()}
    for name in zipped.namelist():
        if name != _TABLE and not name.startswith(_KEPT):
            zipped.extract(name, folder)  # which keeps every path inside the folder
    block = noise_block()
    total = sum(file.nbytes for file in files.values())
    hashes = {}
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True) as progress:
        for relative, file in files.items():
            path = folder / relative
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"path {relative!r} leaves the bundle")
            with zipped.open(_KEPT + relative) as kept:
                _fill_file(path, f"{seed}:{relative}", file, kept, block)
            hashes[relative] = file_sha256(path)
            progress.update(file.nbytes)
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    _name_as_noise(manifest, hashes)
    write_json(folder / MANIFEST_NAME, manifest)


def _fill_file(path: Path, key: str, file: WeightFile, kept: Any, block: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as target:
        for offset, size in file.kept:
            target.seek(offset)
            data = kept.read(size)
            if len(data) != size:
                raise ValueError(f"bytes of {path.name} are missing")
            target.write(data)
        for entry in file.noise:
            target.seek(entry.offset)
            for values in entry.values(block, key):
                target.write(values.tobytes())
        target.truncate(file.nbytes)


def _name_as_noise(manifest: dict[str, Any], hashes: dict[str, str]) -> None:
    manifest["name"] = f"{manifest['name']}-noise"
    manifest["created_from"] = {"kind": "noise", "instead_of": manifest.get("created_from")}
    for stage in manifest["stages"].values():
        for file in (stage, *stage.get("variants", {}).values()):
            for relative in file.get("extra_files", {}):
                file["extra_files"][relative] = hashes[relative]


@command("nothing was written")
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandParser(prog="python -m benchmarks.weightless", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="Bundle to archive.")
    packing.add_argument("bundle", type=Path, help="A bundle.")
    packing.add_argument("archive", type=Path, help="The archive, a zip file.")
    filling = commands.add_parser("fill", help="Archive to a bundle of noise.")
    filling.add_argument("archive", type=Path, help="What pack wrote.")
    filling.add_argument("out", type=Path, help="The new bundle's folder.")
    filling.add_argument("--seed", type=whole_number(0, MAX_SEED), default=SEED, help="Seed of the noise.")
    options = parser.parse_args(argv)
    if options.command == "pack":
        pack(options.bundle, options.archive)
        print(f"{options.archive}: {options.archive.stat().st_size / 1e6:.1f} MB")
    else:
        bundle = fill(options.archive, options.out, options.seed)
        print(f"{options.out}: {bundle.name}, digest {bundle.digest[:12]}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        raise SystemExit(main())
