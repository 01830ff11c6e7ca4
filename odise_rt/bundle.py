"""A bundle on disk: the one contract between export and runtime.

::

    BUNDLE/bundle.json        schema version, model facts, stages with their specs and hashes, training vocabulary
    BUNDLE/onnx/<stage>.onnx  portable graphs, opset 20, standard operators (+ <stage>.onnx.data when large)
    BUNDLE/constants.npz      noise, null_text_embedding, and for the label variant no_object_embedding
    BUNDLE/tokenizer.json     `tokenizers` file of CLIP's text tower
    BUNDLE/engines/<key>/     engines for one device, each with the facts that its validity depends on

A bundle is treated as untrusted until :meth:`Bundle.open` has checked it: paths stay inside the folder, every listed
file has the recorded SHA-256, graphs name no weights but those listed with them, and every stage has the inputs and
outputs that this version expects.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from odise_rt.cores import usable_cores
from odise_rt.errors import BundleError
from odise_rt.files import given_path
from odise_rt.onnx_files import external_files
from odise_rt.specs import LATENT_CHANNELS, STAGES, ModelFacts, StageSpec, stage_specs

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"
CONSTANTS_NAME = "constants.npz"
TOKENIZER_NAME = "tokenizer.json"
PRECISIONS = ("fp32", "fp16")

MAX_MANIFEST_BYTES = 64 << 20
"""A manifest with a training vocabulary of 100,000 words is about 3 MB; more is not a manifest."""
_CHUNK = 1 << 20
_NPY_HEADER_BYTES = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REBUILD = "export the bundle again with `python -m export.build_engines`"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
    return digest.hexdigest()


@dataclass(frozen=True)
class StageFile:
    """A graph file of one stage, with its external weights."""

    path: Path
    sha256: str
    """Hash of the graph file itself."""
    extra_files: dict[str, str]
    """Relative path to SHA-256 of weight files that the graph refers to."""

    @property
    def digest(self) -> str:
        """Identity of graph and weights together: the SHA-256 over all hashes."""
        text = "\n".join([self.sha256, *(f"{k} {v}" for k, v in sorted(self.extra_files.items()))])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StageEntry:
    """One stage of the manifest."""

    spec: StageSpec
    file: StageFile
    variants: dict[str, StageFile]
    """Other graphs with the same inputs and outputs, for one engine each, e.g. ``"ort-cpu"``."""
    parameters: int | None
    flops: Any
    """The exporter's count of operations; for display only."""


@dataclass(frozen=True)
class Bundle:
    """An opened and checked bundle. Holds no weights: backends read the files when a stage is loaded."""

    root: Path
    name: str
    precision: str
    facts: ModelFacts
    stages: dict[str, StageEntry]
    training_vocabulary: frozenset[str]
    """Every name and synonym seen in training; decides which ensemble weight a class gets."""
    manifest: dict[str, Any]
    """The whole of bundle.json, e.g. for display."""
    digest: str
    """SHA-256 of bundle.json, which holds the hashes of all other files: the identity of the bundle."""
    verified: bool
    """Whether the hashes have been compared."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True, *, graphs: bool = True) -> Bundle:
        """Read and check a bundle.

        Args:
            path: the bundle's folder.
            verify: compare the SHA-256 of every listed file (about 1 GB/s for each core). Leave it on for bundles
                from elsewhere; structure, version and paths, those inside the graphs as well, are checked in any case.
            graphs: whether the files of the stages must be there. ``False``: another server (Triton) runs the stages,
                and the bundle holds facts, constants and the tokenizer alone.

        Raises:
            BundleError: the folder is no bundle, is incomplete, altered, unsafe, or of another schema version.
        """
        root = given_path(path, "the bundle", BundleError)
        try:
            str(root).encode()
        except UnicodeEncodeError as exc:  # the tokenizer and engines open files by text
            raise BundleError(
                f"the bundle's path {str(root)!r} is no text (UTF-8): move the bundle to a path that is"
            ) from exc
        manifest, digest = _read_manifest(root)
        try:
            bundle = cls._from_manifest(root, manifest, digest, verify, graphs)
        except RecursionError as exc:
            raise BundleError(f"{root / MANIFEST_NAME} is nested too deeply to be a manifest; {_REBUILD}") from exc
        files = dict(bundle._listed_files()) if graphs else dict(manifest["files"])
        for relative in files:
            _safe_path(root, relative)
        if verify:
            bundle._compare_hashes(files)
        if graphs:
            for entry in bundle.stages.values():
                _check_weights(root, entry.file)
                for key, file in entry.variants.items():
                    # TensorRT's engines hold their weights. ONNX Runtime would take a graph of any name.
                    if key.startswith("ort-") or file.path.suffix not in (".plan", ".engine"):
                        _check_weights(root, file)
        return bundle

    @classmethod
    def _from_manifest(cls, root: Path, manifest: dict[str, Any], digest: str, verify: bool, graphs: bool) -> Bundle:
        name = _field(manifest, "name", str)
        precision = _field(manifest, "precision", str)
        if precision not in PRECISIONS:
            raise BundleError(
                f"precision in {MANIFEST_NAME} is {precision!r}, expected one of {PRECISIONS}; {_REBUILD}"
            )
        facts = ModelFacts.from_dict(_field(manifest, "model", dict))
        stages = _field(manifest, "stages", dict)
        missing = [s for s in STAGES if s not in stages]
        if missing:
            raise BundleError(f"bundle {root} lacks the stages {missing}; {_REBUILD}")
        specs = stage_specs(facts)
        entries = {s: _stage_entry(root, specs[s], _field(stages, s, dict), graphs) for s in STAGES}
        words = _field(manifest, "training_vocabulary", list)
        if not all(isinstance(w, str) for w in words):
            raise BundleError(f"training_vocabulary in {MANIFEST_NAME} must be a list of words; {_REBUILD}")
        files = _hashes(_field(manifest, "files", dict), "files")
        for needed in (CONSTANTS_NAME, TOKENIZER_NAME):
            if needed not in files:
                raise BundleError(f"{MANIFEST_NAME} lists no {needed} under 'files'; {_REBUILD}")
        return cls(root, name, precision, facts, entries, frozenset(words), manifest, digest, verify)

    def _listed_files(self) -> Iterator[tuple[str, str]]:
        """Relative path and SHA-256 of every file of the manifest."""
        yield from self.manifest["files"].items()
        for entry in self.stages.values():
            for file in (entry.file, *entry.variants.values()):
                yield file.path.relative_to(self.root).as_posix(), file.sha256
                yield from file.extra_files.items()

    def verify(self) -> Bundle:
        """This bundle, with the SHA-256 of every listed file compared now, where that was put off when it was opened.

        Raises:
            BundleError: a file was altered, or is no longer there.
        """
        if self.verified:
            return self
        files = dict(self._listed_files())
        for relative in files:
            _safe_path(self.root, relative)
        self._compare_hashes(files)
        return dataclasses.replace(self, verified=True)

    def _compare_hashes(self, files: Mapping[str, str]) -> None:
        # hashlib releases the GIL while it works on 1 MiB, so threads use the cores there are.
        with ThreadPoolExecutor(max_workers=min(4, usable_cores())) as pool:
            found = pool.map(lambda relative: file_sha256(self.root / relative), files)
            for (relative, expected), actual in zip(files.items(), found, strict=True):
                if actual != expected:
                    raise BundleError(
                        f"{self.root / relative} was altered: its SHA-256 is {actual[:12]}…, {MANIFEST_NAME} says "
                        f"{expected[:12]}…; copy the bundle again, or {_REBUILD}"
                    )
        logger.info("bundle %s: %d files match their SHA-256", self.root, len(files))

    def stage_file(self, stage: str, variant: str | None = None) -> StageFile:
        """The graph of a stage: the variant for an engine if the bundle has it, else the portable one."""
        entry = self.stages[stage]
        return entry.variants.get(variant, entry.file) if variant else entry.file

    def graph_bytes(self, variant: str | None = None) -> int:
        """Size of the graphs of all stages with their weights, each file counted once; see :meth:`stage_file`."""
        files = [self.stage_file(stage, variant) for stage in self.stages]
        paths = {path for file in files for path in (file.path, *(self.root / extra for extra in file.extra_files))}
        return sum(path.stat().st_size for path in paths)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.root / TOKENIZER_NAME

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer's file: part of what text embeddings depend on."""
        return str(self.manifest["files"][TOKENIZER_NAME])

    def constants(self) -> dict[str, np.ndarray]:
        """Read the constant inputs.

        Returns:
            ``noise`` float32 (1, 4, h, h), ``null_text_embedding`` float32 (1, T, Dc) and, for the label variant,
            ``no_object_embedding`` float32 (P,), unnormalised.

        Raises:
            BundleError: an array is missing, of another shape or dtype, or not finite.
        """
        facts = self.facts
        expected: dict[str, tuple[int, ...]] = {
            "noise": (1, LATENT_CHANNELS, facts.latent_side, facts.latent_side),
            "null_text_embedding": (1, facts.null_text_length, facts.null_text_dim),
        }
        if facts.variant == "label":
            expected["no_object_embedding"] = (facts.classification_dim,)
        path = self.root / CONSTANTS_NAME
        arrays: dict[str, np.ndarray] = {}
        try:
            # np.load leaves a file open that it cannot read, unless it is given one.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                for name, shape in expected.items():
                    # A few bytes can unpack to gigabytes; what belongs here has a known size.
                    size = stored.zip.getinfo(f"{name}.npy").file_size
                    if size > 4 * math.prod(shape) + _NPY_HEADER_BYTES:
                        raise ValueError(f"{name} unpacks to {size:,} bytes")
                    arrays[name] = stored[name]
        except Exception as exc:  # numpy and zipfile raise many kinds for archives that are not what they seem
            raise BundleError(f"{path} cannot be read ({exc}): expected arrays {sorted(expected)}; {_REBUILD}") from exc
        for name, shape in expected.items():
            array = arrays[name]
            if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
                raise BundleError(
                    f"{name} in {path} is {array.dtype} {array.shape}, expected finite float32 {shape}; {_REBUILD}"
                )
        return arrays


def _read_manifest(root: Path) -> tuple[dict[str, Any], str]:
    path = root / MANIFEST_NAME
    if not os.path.isdir(root):  # noqa: PTH112  (of a name that is too long, is_dir raises)
        raise BundleError(f"no bundle at {root}: expected a folder with {MANIFEST_NAME}; check the path, or {_REBUILD}")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB: not a manifest; {_REBUILD}")
        raw = path.read_bytes()
    except OSError as exc:
        raise BundleError(
            f"{root} has no readable {MANIFEST_NAME} ({exc.strerror}): it is not a bundle; {_REBUILD}"
        ) from exc
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{path} is not valid JSON ({exc}); copy the bundle again, or {_REBUILD}") from exc
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} holds a {type(manifest).__name__}, expected an object; {_REBUILD}")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade odise_rt to read it" if newer else _REBUILD
        raise BundleError(f"{path} has schema version {version!r}, this odise_rt reads {SCHEMA_VERSION}: {advice}")
    return manifest, hashlib.sha256(raw).hexdigest()


def _field(data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        found = f"a {type(value).__name__}" if key in data else "missing"
        raise BundleError(f"{key!r} in {MANIFEST_NAME} is {found}, expected {kind.__name__}; {_REBUILD}")
    return value


def _hashes(data: Mapping[str, Any], where: str) -> dict[str, str]:
    for relative, digest in data.items():
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise BundleError(f"{where} in {MANIFEST_NAME}: {relative!r} has no SHA-256 (got {digest!r}); {_REBUILD}")
    return dict(data)


def _stage_file(root: Path, stage: str, data: Mapping[str, Any], present: bool) -> StageFile:
    relative = _field(data, "file", str)
    _hashes({relative: data.get("sha256")}, f"stage {stage}")
    extra = _hashes(_field(data, "extra_files", dict) if "extra_files" in data else {}, f"stage {stage}")
    weights = f"{relative}.data"
    path = _safe_path(root, relative, present)
    if weights not in extra and (root / weights).exists():
        raise BundleError(f"{weights} lies beside its graph but {MANIFEST_NAME} has no hash for it; {_REBUILD}")
    return StageFile(path, data["sha256"], extra)


def _check_weights(root: Path, file: StageFile) -> None:
    """Refuse a graph that names weights which are not listed with it: an engine would read them all the same."""
    if file.path.suffix != ".onnx":  # an engine would take it for a file of another format
        raise BundleError(f"the graph {file.path} in {MANIFEST_NAME} has another name than *.onnx; {_REBUILD}")
    listed = {PurePosixPath(relative) for relative in file.extra_files}
    folder = PurePosixPath(file.path.relative_to(root).as_posix()).parent
    for location in external_files(file.path):
        # ONNX Runtime takes names with an asterisk for addresses in its memory.
        if "*" in location or folder / location not in listed:
            raise BundleError(
                f"{file.path} takes weights from {location[:200]!r}, and {MANIFEST_NAME} has no hash for that: "
                "refused; get the bundle elsewhere"
            )


def _stage_entry(root: Path, spec: StageSpec, data: Mapping[str, Any], present: bool) -> StageEntry:
    written = StageSpec.from_dict(spec.name, data)
    if written != spec:
        raise BundleError(
            f"stage {spec.name!r} has inputs {_signature(written.inputs)} and outputs {_signature(written.outputs)}, "
            f"expected {_signature(spec.inputs)} and {_signature(spec.outputs)}; {_REBUILD}"
        )
    variants = _field(data, "variants", dict) if "variants" in data else {}
    files = {key: _stage_file(root, spec.name, _field(variants, key, dict), present) for key in variants}
    parameters = data.get("parameters")
    count = parameters if isinstance(parameters, int) and not isinstance(parameters, bool) else None
    return StageEntry(spec, _stage_file(root, spec.name, data, present), files, count, data.get("flops"))


def _signature(tensors: tuple[Any, ...]) -> str:
    return ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors)


def _safe_path(root: Path, relative: str, present: bool = True) -> Path:
    """The file inside the bundle, or an error if the path would leave the folder or, if ``present``, is no file."""
    pure = PurePosixPath(relative)
    unsafe = (
        not pure.parts  # "" or ".", which are the folder itself
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in relative
        or "\0" in relative
        or ":" in pure.parts[0]
    )
    path = root.joinpath(*pure.parts)
    try:
        inside = not unsafe and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file system takes
        inside = False
    if not inside:
        raise BundleError(f"path {relative!r} in {MANIFEST_NAME} leaves the bundle: refused; get the bundle elsewhere")
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # e.g. a name that is too long
        is_file = False
    if present and not is_file:
        raise BundleError(f"bundle {root} lacks {relative}: incomplete copy? copy it again, or {_REBUILD}")
    return path
