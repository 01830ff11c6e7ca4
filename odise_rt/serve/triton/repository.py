"""Writes a model repository beside its place and puts it there in one rename, or not at all.

::

    OUT/odise/config.pbtxt              what clients call: IMAGE or PIXELS, VOCABULARY -> SEGMENT_MAP, RESULT
    OUT/odise/1/model.py                three lines; the code is odise_rt.serve.triton.orchestrator
    OUT/odise/1/bundle/                 manifest, constants and tokenizer (with the graphs when stages are "inside")
    OUT/odise_<stage>/config.pbtxt      one model for each graph
    OUT/odise_<stage>/1/model.onnx      or model.plan, with its weight files

Who runs the graphs is chosen by ``stages``: Triton's ONNX Runtime and TensorRT backends (``"triton"``), Python-backend
models with ONNX Runtime for servers without those (``"python"``), or the orchestrator itself (``"inside"``).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from odise_rt.bundle import CONSTANTS_NAME, MANIFEST_NAME, TOKENIZER_NAME, Bundle, StageFile
from odise_rt.engines import find_engines, rebuild_command
from odise_rt.errors import BundleError, OptionsError
from odise_rt.files import flush_folder, make_partial_folder, replace_folder
from odise_rt.options import DEFAULT_MAX_PIXELS
from odise_rt.serve.limits import DEFAULT_MAX_WORDS
from odise_rt.serve.triton.model_config import Kind, ModelConfig, orchestrator_config, stage_config
from odise_rt.specs import STAGES

Stages = Literal["triton", "python", "inside"]
VERSION = "1"
_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
_BACKENDS = {".onnx": "onnxruntime", ".plan": "tensorrt", ".engine": "tensorrt"}
_ORCHESTRATOR = "orchestrator"
_STAGE_MODEL = "stage_model"


@dataclass(frozen=True)
class RepositoryOptions:
    """How the repository is laid out.

    Raises:
        OptionsError: a value is out of range.
    """

    name: str = "odise"
    """Of the model that clients call; stages are called ``<name>_<stage>``."""
    stages: Stages = "triton"
    variant: str | None = None
    """Graphs or engines of this key of the bundle where it has them, e.g. a TensorRT plan; else the portable graphs."""
    plans: str | None = None
    """Name of a GPU: its TensorRT plans are taken where the bundle has them, ``"any"`` if there is no choice."""
    kind: Kind = "cpu"
    """Device of the stages."""
    instances: int = 1
    """Copies of each stage on each device."""
    orchestrators: int = 1
    """Images in work at a time."""
    batch_delay: int = 500
    """Microseconds that a request may wait for others, where Triton stacks them."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_words: int = DEFAULT_MAX_WORDS
    """Of a request's vocabulary, synonyms counted."""
    environment: str | None = None
    """Path, as Triton sees it, of a conda-pack archive with odise_rt for the Python backend."""

    def __post_init__(self) -> None:
        if not self.name or any(c not in _NAME for c in self.name):
            raise OptionsError(f"the model's name {self.name[:40]!r} is no name: expected letters, digits, '_' and '-'")
        if self.stages not in get_args(Stages):
            raise OptionsError(f"stages is {self.stages!r}: expected one of {', '.join(get_args(Stages))}")
        if self.plans is not None and (self.stages != "triton" or self.kind != "gpu"):
            raise OptionsError("TensorRT plans need Triton's TensorRT backend on a GPU: --stages triton --kind gpu")
        if self.kind not in get_args(Kind):
            raise OptionsError(f"kind is {self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        for field in ("instances", "orchestrators", "max_pixels", "max_words"):
            if getattr(self, field) < 1:
                raise OptionsError(f"{field} is {getattr(self, field)}: expected at least 1")
        if self.batch_delay < 0:
            raise OptionsError(f"batch_delay is {self.batch_delay} µs: expected 0 or more")


def export_repository(bundle: Bundle, out: Path, options: RepositoryOptions, force: bool = False) -> list[str]:
    """Write the repository.

    Args:
        bundle: opened, with its hashes compared.
        out: the repository's folder; made, and replaced only by ``force`` and only if it is one of ours.
        options: its layout.
        force: replace a repository that is there.

    Returns:
        Names of its models.

    Raises:
        OptionsError: something is in the way, or the bundle has no such variant.
        BundleError: a file of the bundle has no place in a repository.
    """
    _check_place(out, force)
    if options.variant is not None and not any(options.variant in e.variants for e in bundle.stages.values()):
        known = sorted({key for e in bundle.stages.values() for key in e.variants})
        raise OptionsError(f"the bundle has no variant {options.variant!r}: it has {', '.join(known) or 'none'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = make_partial_folder(out)
    try:
        models = _write(bundle, partial, options)
        flush_folder(partial)
        _put_in_place(partial, out, force)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return models


def _write(bundle: Bundle, root: Path, options: RepositoryOptions) -> list[str]:
    parameters = {
        "stages": options.stages,
        "device": "cuda" if options.kind == "gpu" else "cpu",
        "max_pixels": str(options.max_pixels),
        "max_words": str(options.max_words),
    }
    orchestrator = orchestrator_config(
        options.name, instances=options.orchestrators, parameters=parameters, environment=options.environment
    )
    models = [orchestrator.name]
    folder = _start(root, orchestrator)
    _script(folder, _ORCHESTRATOR)
    _copy_bundle(bundle, folder / "bundle", graphs=options.stages == "inside")
    if options.stages == "inside":
        return models
    plans = _plans(bundle, options.plans) if options.plans is not None else {}
    for stage in STAGES:
        file = plans.get(stage) or bundle.stage_file(stage, options.variant)
        backend = _BACKENDS.get(file.path.suffix)
        if backend is None:
            raise BundleError(f"stage {stage} is in {file.path.name}: expected a file ending in {', '.join(_BACKENDS)}")
        if options.stages == "python" and backend != "onnxruntime":
            raise OptionsError(f"stage {stage} is a {backend} engine: the Python backend runs ONNX graphs only")
        graph = f"model{'.onnx' if backend == 'onnxruntime' else '.plan'}"
        config = stage_config(
            bundle.stages[stage].spec,
            f"{options.name}_{stage}",
            "python" if options.stages == "python" else backend,
            "model.py" if options.stages == "python" else graph,
            instances=options.instances,
            kind=options.kind,
            delay=options.batch_delay,
            environment=options.environment if options.stages == "python" else None,
        )
        folder = _start(root, config)
        _copy_graph(bundle, file, folder, graph)
        if options.stages == "python":
            _script(folder, _STAGE_MODEL)
        models.append(config.name)
    return models


def _plans(bundle: Bundle, gpu: str) -> dict[str, StageFile]:
    """The plan of each stage that has one for the GPU, its files compared with their hashes.

    Raises:
        OptionsError: there is none, or more than one for a stage.
    """
    engines = find_engines(bundle)
    plans = {}
    for stage in STAGES:
        graph = bundle.stages[stage].file.digest
        made = [e for e in engines.of(stage, "tensorrt") if e.facts.graph == graph]
        fitting = [e for e in made if gpu in ("any", e.facts.gpu)]
        if len(fitting) > 1:
            found = ", ".join(sorted(f"{e.facts.gpu} ({e.folder.name})" for e in fitting))
            raise OptionsError(f"the bundle has several plans of {stage}: {found}; name the GPU, or remove all but one")
        for engine in fitting:
            engine.verify_files()
            plans[stage] = StageFile(engine.path, engine.files[engine.path.name], {})
    if not plans:
        names = sorted({str(e.facts.gpu) for e in engines.found if e.facts.engine == "tensorrt"})
        raise OptionsError(
            f"the bundle has no TensorRT plan for {gpu!r}: it has some for {', '.join(names) or 'no GPU'}; build them "
            f"with `{rebuild_command(bundle, 'tensorrt')}`"
        )
    return plans


def _start(root: Path, config: ModelConfig) -> Path:
    """Write the configuration of a model and make the folder of its version."""
    folder = root / config.name / VERSION
    folder.mkdir(parents=True)
    (root / config.name / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")
    return folder


def _script(folder: Path, module: str) -> None:
    code = f"""# Triton's Python backend looks for this class here; its code is in the package odise_rt.
from odise_rt.serve.triton.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
    (folder / "model.py").write_text(code, encoding="utf-8")


def _copy_graph(bundle: Bundle, file: StageFile, folder: Path, name: str) -> None:
    """A graph and its weights. A graph names its weight files without a folder, so they keep their names."""
    shutil.copyfile(file.path, folder / name)
    for relative in file.extra_files:
        source = bundle.root / relative
        if source.parent != file.path.parent:
            raise BundleError(f"the weights {relative} do not lie beside their graph {file.path.name}: export it again")
        shutil.copyfile(source, folder / source.name)


def _copy_bundle(bundle: Bundle, folder: Path, graphs: bool) -> None:
    """The bundle as the orchestrator opens it; its manifest is the same, so hashes and digest are, too."""
    names = [MANIFEST_NAME, CONSTANTS_NAME, TOKENIZER_NAME, *bundle.manifest["files"]]
    if graphs:
        for entry in bundle.stages.values():
            for file in (entry.file, *entry.variants.values()):
                names += [file.path.relative_to(bundle.root).as_posix(), *file.extra_files]
    for name in dict.fromkeys(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.root / name, folder / name)


def _check_place(out: Path, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OptionsError(f"{out} is a file or a link: a model repository is a folder; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not any((child / VERSION / "bundle" / MANIFEST_NAME).is_file() for child in out.iterdir()):
        raise OptionsError(f"{out} holds something else: refused to replace it; choose another --out")
    if not force:
        raise OptionsError(
            f"there is a repository at {out} already: pass --force to replace it, or choose another --out"
        )


def _put_in_place(partial: Path, out: Path, force: bool) -> None:
    _check_place(out, force)
    replace_folder(partial, out)


def parameters_of(model_config: str) -> dict[str, str]:
    """The parameters of a model, as Triton hands its configuration to the Python backend (JSON)."""
    data: dict[str, Any] = json.loads(model_config)
    return {key: str(value["string_value"]) for key, value in data.get("parameters", {}).items()}
