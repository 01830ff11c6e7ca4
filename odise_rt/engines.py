"""Engines in a bundle: files that were compiled for certain devices, and when they may be used.

::

    BUNDLE/engines/<stage>.<engine>.<digest>/engine.json     facts, hashes, bounds, and where it was verified
                                             unet_tap.plan   the engine (or unet_tap.onnx and .data for ort-cuda)
                                             reference.npz   inputs and expected outputs, to verify it with

The digest is that of the facts on which the engine's validity depends: the graph, precision, shapes, flags, versions
and device. A fact that changes gives another folder, so an engine is never taken for one of other facts.
``bundle.json`` does not list engines: it stays the same whichever devices a bundle is prepared for, and so does the
bundle's identity. Each engine names the graph that it was made from by its hash, and is ignored when the bundle has
another one.

Engines are code for a device: take them only from where you would take a program.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.bundle import Bundle, file_sha256
from odise_rt.engine_check import Bounds, Case, OutputCheck
from odise_rt.engine_facts import TITLES, EngineFacts, EngineKind, Machine, Mismatch
from odise_rt.errors import BundleError
from odise_rt.files import write_json
from odise_rt.onnx_files import external_files
from odise_rt.specs import StageSpec

logger = logging.getLogger(__name__)

FOLDER = "engines"
ENGINE_FILE = "engine.json"
REFERENCE_FILE = "reference.npz"
SCHEMA_VERSION = 1
MAX_ENGINE_FILE_BYTES = 4 << 20
MAX_REFERENCE_BYTES = 4 << 30
"""Bound on all arrays of a reference file together."""
MAX_ENGINES = 1000
"""Most folders that are looked at; a bundle of this project never has more."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Engine:
    """One engine of a bundle, its description read and checked."""

    folder: Path
    facts: EngineFacts
    files: dict[str, str]
    """File name to SHA-256."""
    bounds: Bounds
    reference_by: str
    """Whose outputs it is compared with."""
    verified: tuple[Mapping[str, Any], ...]
    """Where it was compared and found to agree: ``gpu``, ``version`` and ``checks`` of each time."""
    build: Mapping[str, Any]
    """Seconds, workspace and so on; for display only."""

    @property
    def path(self) -> Path:
        """The file to load."""
        suffix = "onnx" if self.facts.engine == "ort-cuda" else "plan"
        return self.folder / f"{self.facts.stage}.{suffix}"

    @property
    def title(self) -> str:
        """A name for messages, e.g. ``"TensorRT-RTX engine of unet_tap"``."""
        return f"{TITLES[self.facts.engine]} engine of {self.facts.stage}"

    def is_verified_on(self, machine: Machine) -> bool:
        """Whether it was compared on a device of this name, with the version of its runtime that is installed here."""
        here = self._place(machine)
        return machine.gpu is not None and any(here.items() <= entry.items() for entry in self.verified)

    def _place(self, machine: Machine) -> dict[str, str | None]:
        """The device and the version of the runtime that a comparison is valid for. Any ONNX Runtime takes the graph of
        an ``ort-cuda`` engine, and another version may compute something else."""
        return {"gpu": machine.gpu, "version": machine.versions.get(self.facts.engine)}

    def mismatches(self, bundle: Bundle, machine: Machine) -> list[Mismatch]:
        """What keeps the engine from being used with this bundle on this machine; empty if nothing does."""
        facts, kind = self.facts, self.facts.engine
        found: list[Mismatch] = []

        def compare(fact: str, built: str | None, here: str | None) -> None:
            if built is not None and built != here:
                found.append(Mismatch(fact, built, here or "missing"))

        compare("the graph", facts.graph[:12], bundle.stages[facts.stage].file.digest[:12])
        if kind != "ort-cuda":  # a graph runs on every version that knows its operators
            compare(f"the version of {TITLES[kind]}", facts.engine_version, machine.versions.get(kind))
            compare("CUDA's major version", facts.cuda, machine.cuda.get(kind))
            compare("the platform", facts.platform, machine.platform)
        compare("the GPU", facts.gpu, machine.gpu)
        compare("the compute capability", facts.compute_capability, machine.compute_capability)
        if facts.targets and machine.compute_capability not in facts.targets:
            found.append(Mismatch("the compute capability", " or ".join(facts.targets), _here(machine)))
        return found

    def verify_files(self) -> None:
        """Compare the SHA-256 of every file; raises :class:`BundleError` on the first that differs."""
        for name, expected in self.files.items():
            actual = file_sha256(_inside(self.folder, name))
            if actual != expected:
                raise BundleError(
                    f"{self.folder / name} was altered: its SHA-256 is {actual[:12]}…, {ENGINE_FILE} says "
                    f"{expected[:12]}…; remove the folder {self.folder} and build the engine again"
                )

    def reference(self, spec: StageSpec) -> list[Case]:
        """Inputs and expected outputs, for :func:`odise_rt.engine_check.check_stage`.

        Raises:
            BundleError: the file is missing, damaged, or of another stage.
        """
        return read_reference(self.folder / REFERENCE_FILE, spec)

    def record_verification(self, machine: Machine, checks: Sequence[OutputCheck]) -> Engine:
        """Write into engine.json that the engine agreed here; returns the engine with that entry."""
        here = self._place(machine)
        entry = {**here, "checks": [check.to_dict() for check in checks]}
        others = [dict(known) for known in self.verified if not here.items() <= known.items()]
        engine = dataclasses.replace(self, verified=(*others, entry))
        write_engine_file(engine)
        return engine


def _here(machine: Machine) -> str:
    return machine.compute_capability or f"missing ({machine.no_gpu})"


def write_engine_file(engine: Engine) -> None:
    """Write engine.json, atomically."""
    write_json(
        engine.folder / ENGINE_FILE,
        {
            "schema_version": SCHEMA_VERSION,
            "facts": engine.facts.to_dict(),
            "files": engine.files,
            "bounds": dataclasses.asdict(engine.bounds),
            "reference_by": engine.reference_by,
            "verified": [dict(entry) for entry in engine.verified],
            "build": dict(engine.build),
        },
    )


def open_engine(folder: Path) -> Engine:
    """Read and check an engine's description; its files are not read.

    Raises:
        BundleError: the description is missing, damaged, newer, or belongs elsewhere.
    """
    if folder.is_symlink() or folder.is_file():
        raise BundleError(f"{folder} is a link or a file, expected an engine's folder: remove it")
    path = folder / ENGINE_FILE
    again = f"remove the folder {folder} and build the engine again"
    try:
        if path.stat().st_size > MAX_ENGINE_FILE_BYTES:
            raise BundleError(f"{path} is larger than {MAX_ENGINE_FILE_BYTES >> 20} MiB: no engine's file; {again}")
        data = json.loads(path.read_bytes())
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise BundleError(f"{path} has schema version {version!r}, this odise_rt reads {SCHEMA_VERSION}; {again}")
        facts = EngineFacts.from_dict(data["facts"])
        bounds = Bounds(float(data["bounds"]["max"]), float(data["bounds"]["mean"]))
        files = dict(data["files"])
        verified = tuple(entry for entry in data["verified"] if isinstance(entry, dict))
        if not all(isinstance(v, str) and _SHA256.fullmatch(v) for v in files.values()):
            raise ValueError("a file has no SHA-256")
        if not (0 <= bounds.max < 1 and 0 <= bounds.mean < 1):
            raise ValueError(f"bounds {bounds}")
        engine = Engine(folder, facts, files, bounds, str(data["reference_by"]), verified, dict(data["build"]))
    except OSError as exc:
        raise BundleError(f"{folder} has no readable {ENGINE_FILE} ({exc.strerror}); {again}") from exc
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise BundleError(f"{path} is damaged ({exc}); {again}") from exc
    if folder.name != facts.key:
        raise BundleError(f"{path} describes {facts.key}, but its folder is {folder.name}: facts were altered; {again}")
    for needed in (engine.path.name, REFERENCE_FILE):
        if needed not in files:
            raise BundleError(f"{path} has no SHA-256 for {needed}; {again}")
    for name in files:
        _inside(folder, name)
    if facts.engine == "ort-cuda":
        for location in external_files(engine.path) - files.keys():
            raise BundleError(
                f"{engine.path} takes weights from {location[:200]!r}, and {ENGINE_FILE} has no SHA-256 for that; "
                f"{again}"
            )
    return engine


def _inside(folder: Path, name: str) -> Path:
    """The path of a file that lies directly in an engine's folder; engines have no folders in it."""
    path = folder / name
    if not _FILE_NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{ENGINE_FILE} in {folder} lists {name!r}, which is no plain file in there: remove the folder and build "
            "the engine again"
        )
    return path


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle."""

    found: tuple[Engine, ...]
    broken: dict[str, str]
    """Folder name to what is wrong with it."""

    def of(self, stage: str, kind: EngineKind) -> list[Engine]:
        """Engines of one kind for one stage."""
        return [e for e in self.found if e.facts.stage == stage and e.facts.engine == kind]

    def knows(self, stage: str, kind: EngineKind) -> bool:
        """Whether there is an engine of one kind for one stage, sound or broken."""
        return bool(self.of(stage, kind) or self._problems(stage, kind))

    def _problems(self, stage: str, kind: EngineKind) -> list[str]:
        return [text for name, text in self.broken.items() if name.startswith(f"{stage}.{kind}.")]

    def fitting(self, bundle: Bundle, machine: Machine, stage: str, kind: EngineKind) -> Engine | None:
        """An engine that may be used here: of several, the one that needs no verification, else the first by name."""
        fit = [e for e in self.of(stage, kind) if not e.mismatches(bundle, machine)]
        return min(fit, key=lambda e: (not e.is_verified_on(machine), e.folder.name), default=None)

    def why_not(self, bundle: Bundle, machine: Machine, stage: str, kind: EngineKind) -> str:
        """Why no engine of a kind can serve a stage here, and what to do."""
        candidates = self.of(stage, kind)
        command = rebuild_command(bundle, kind)
        broken = self._problems(stage, kind)
        if not candidates:
            return (
                broken[0]
                if broken
                else f"the bundle has no {TITLES[kind]} engine of {stage}: build it with `{command}`"
            )
        reasons = [
            f"{e.folder.name}: " + " and ".join(str(m) for m in e.mismatches(bundle, machine)) for e in candidates
        ]
        return f"no {TITLES[kind]} engine of {stage} fits ({'; '.join(reasons)}): build one here with `{command}`"


def rebuild_command(bundle: Bundle, kind: EngineKind) -> str:
    """The command that builds the engines of a kind for a bundle."""
    return f"python -m export.build_engines --bundle {bundle.root} --engine {kind}"


def find_engines(bundle: Bundle) -> Engines:
    """Look into ``BUNDLE/engines``. A broken engine is reported, and keeps no other from being found."""
    root = bundle.root / FOLDER
    found, broken = [], {}
    folders = sorted(p for p in root.iterdir() if not p.name.startswith(".")) if root.is_dir() else []
    if len(folders) > MAX_ENGINES:
        raise BundleError(
            f"{root} holds {len(folders)} folders, at most {MAX_ENGINES} are looked at: remove old engines"
        )
    for folder in folders:
        try:
            found.append(open_engine(folder))
        except BundleError as exc:
            broken[folder.name] = str(exc)
            logger.warning("engine ignored: %s", exc)
    return Engines(tuple(found), broken)


# ---- reference files -----------------------------------------------------------------------------------------------


def write_reference(path: Path, cases: Sequence[Case]) -> None:
    """Write inputs and expected outputs as one compressed ``.npz``."""
    arrays: dict[str, Any] = {}
    for number, case in enumerate(cases):
        for side, values in (("inputs", case.inputs), ("outputs", case.outputs)):
            arrays |= {f"{number}.{side}.{name}": np.ascontiguousarray(array) for name, array in values.items()}
    np.savez_compressed(path, **arrays)


def read_reference(path: Path, spec: StageSpec) -> list[Case]:
    """Read :func:`write_reference`'s file and check it against the stage."""
    problem = f"{path} is damaged or of another stage: build the engine again"
    cases: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    try:
        # np.load leaves a file open that it cannot read, unless it is given one.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            size = sum(entry.file_size for entry in stored.zip.infolist())
            if size > MAX_REFERENCE_BYTES:
                raise ValueError(f"{size} bytes, more than {MAX_REFERENCE_BYTES}")
            for entry in stored.files:
                number, side, name = entry.split(".", 2)
                cases.setdefault(int(number), {"inputs": {}, "outputs": {}})[side][name] = stored[entry]
        finite = all(np.isfinite(array).all() for case in cases.values() for array in case["outputs"].values())
    except Exception as exc:  # numpy and zipfile raise many kinds for archives that are not what they seem
        raise BundleError(f"{problem} ({exc})") from exc
    names = {t.name for t in spec.outputs}
    if not cases or not finite or any(set(case["outputs"]) != names for case in cases.values()):
        raise BundleError(problem)
    return [Case(**cases[number]) for number in sorted(cases)]
