"""What a suite needs before it can measure: bundles, the official structure's graphs, scenes to segment.

Made once and kept in ``out/bench``, under a key over the weights, the code that makes them and the versions of the
packages, so that nothing stale is ever measured. An export reads, opens and runs so much of the runtime that all of its
code counts. What cannot be made is remembered with the reason, which becomes a row of the report.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY, package_versions
from benchmarks.results import Status, without_places
from odise_rt.bundle import Bundle
from odise_rt.errors import BundleError

TINY_CHECKPOINT = REPOSITORY / "training" / "pretrained" / "odise-tiny"
KEPT = REPOSITORY / "out" / "bench"
_MODEL_CODE = ("training/models", "training/config.py", "training/initialization.py", "training/torch_stages.py")
"""What decides the numbers of the official structure."""
SCENES_SEED = 2
"""Held-out scenes: odise-tiny was trained on other seeds."""


@dataclass(frozen=True)
class Missing:
    """Why something is not there."""

    reason: str
    status: Status = "failed"


@dataclass
class Preparation:
    """Where everything that is measured lies, or why it is missing."""

    config: str
    source: dict[str, Any]
    """Where PyTorch's weights come from, as in :class:`benchmarks.variants.Job`."""
    bundles: dict[str, Path | Missing] = field(default_factory=dict)
    """Precision to bundle."""
    official: Path | Missing = field(default_factory=lambda: Missing("not asked for", "absent"))
    scenes: Path | Missing = field(default_factory=lambda: Missing("not asked for", "absent"))

    def describe(self) -> dict[str, Any]:
        """Model and bundles for the results file; hashes and names, no paths."""
        weights = Path(str(self.source["checkpoint"])).name if "checkpoint" in self.source else "random"
        data: dict[str, Any] = {"config": self.config, "weights": weights, "bundles": {}}
        if "seed" in self.source:
            data["seed"] = self.source["seed"]
        for precision, place in self.bundles.items():
            if isinstance(place, Path):
                bundle = Bundle.open(place, verify=False)
                parameters = {name: entry.parameters for name, entry in bundle.stages.items()}
                files = [path for path in place.rglob("*") if path.is_file()]
                data["bundles"][precision] = {
                    "name": bundle.name,
                    "digest": bundle.digest,
                    "parameters": parameters,
                    "bytes": sum(path.stat().st_size for path in files),
                }
        return data

    @property
    def weight_bytes(self) -> int:
        """float32 weights of the whole model; 0 if no bundle says."""
        place = self.bundles.get("fp32")
        if not isinstance(place, Path):
            return 0
        parameters = {n: e.parameters or 0 for n, e in Bundle.open(place, verify=False).stages.items()}
        parameters.pop("clip_mask", None)  # the same tower as clip_image
        return 4 * sum(parameters.values())


def prepare_bundle(prepared: Preparation, precision: str, given: Path | None = None) -> None:
    """The bundle of a precision: the given one, the one kept from before, or a new export.

    Raises:
        BundleError: the given one cannot be opened, or comes from other weights than PyTorch's.
    """
    if given is not None:
        _check_origin(given, prepared.source)
        prepared.bundles[precision] = given
        return
    out = KEPT / f"{prepared.config}-{_key(prepared.source, 'export', 'training', 'odise_rt')}" / precision
    if not (out / "bundle.json").is_file():
        command = ["export.build_engines", "--out", str(out), "--precision", precision, *_source_arguments(prepared)]
        problem = _make(command, f"export {prepared.config} ({precision})")
        if problem:
            prepared.bundles[precision] = problem
            return
    prepared.bundles[precision] = out


def _check_origin(bundle: Path, source: dict[str, Any]) -> None:
    """Refuse a bundle that was exported from other weights than PyTorch takes."""
    from training.checkpoints.own_format import file_hashes

    created = Bundle.open(bundle, verify=False).manifest.get("created_from", {})
    if "checkpoint" in source:
        same = created == {"kind": "checkpoint", "files": file_hashes(Path(source["checkpoint"]))}
    else:
        same = created == {"kind": "random", **source}
    if not same:
        raise BundleError(
            f"the bundle {bundle} was made from {json.dumps(created)[:300]}, and PyTorch takes "
            f"{json.dumps(source, default=str)}: name a bundle of the same weights, or let one be exported"
        )


def prepare_official(prepared: Preparation, height: int, width: int) -> None:
    """Graphs of the official structure for one image size."""
    key = _key(prepared.source, *_MODEL_CODE, "odise_rt", "benchmarks/official_graphs.py")
    out = KEPT / f"{prepared.config}-official-{key}" / f"{height}x{width}"
    if not out.is_dir():
        command = ["benchmarks.official_graphs", "--size", str(height), str(width), "--out", str(out)]
        source = ["--checkpoint", str(prepared.source["checkpoint"])] if "checkpoint" in prepared.source else []
        if not source:
            source = ["--config", prepared.source["config"], "--seed", str(prepared.source["seed"])]
        problem = _make([*command, *source], "export the official structure")
        if problem:
            prepared.official = problem
            return
    prepared.official = out


def prepare_scenes(prepared: Preparation, count: int) -> None:
    """Held-out scenes of Sticker World."""
    out = KEPT / f"sticker-world-{_key({}, 'training/data/sticker_world')}" / f"{SCENES_SEED}-{count}"
    if not (out / "annotations").is_dir():
        command = ["training.data.sticker_world", str(out), "--images", str(count), "--seed", str(SCENES_SEED)]
        problem = _make([*command, "--split", "val", "--overwrite"], "draw scenes")
        if problem:
            prepared.scenes = Missing(problem.reason, "absent")
            return
    prepared.scenes = out


def _source_arguments(prepared: Preparation) -> list[str]:
    source = prepared.source
    if "checkpoint" in source:
        return ["--checkpoint", str(source["checkpoint"])]
    return ["--config", str(source["config"]), "--init", "random", "--seed", str(source["seed"])]


def _make(arguments: Sequence[str], what: str) -> Missing | None:
    """Run a module of this repository; its last line is the reason if it fails."""
    print(f"{what} ...", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    reason = without_places(f"{what}: {lines[-1][:500] if lines else f'status {done.returncode}'}")
    print(f"  failed: {reason}", flush=True)
    return Missing(reason, "oom" if done.returncode == -9 else "failed")


def _key(source: dict[str, Any], *code: str) -> str:
    """Hash over weights, code and versions of packages."""
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in source.items() if k != "checkpoint")).encode())
    digest.update(repr(package_versions()).encode())
    paths = [REPOSITORY / part for part in code]
    files = sorted(f for p in paths for f in ([p] if p.is_file() else p.rglob("*.py")))
    if "checkpoint" in source:
        files += sorted(p for p in Path(source["checkpoint"]).iterdir() if p.suffix in (".json", ".safetensors"))
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
