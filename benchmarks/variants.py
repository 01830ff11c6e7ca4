"""The implementations that are compared, as data, and how a worker process opens each of them.

Importing this loads neither PyTorch nor an engine.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from odise_rt.backends.base import Stage
    from odise_rt.segmenter import Segmenter

Graphs = Literal["official", "portable", "fused"]


@dataclass(frozen=True)
class Variant:
    """One implementation of the whole way from pixels to segments."""

    label: str
    """What it is, for readers who do not know the code."""
    family: Literal["torch", "ort"]
    official_stages: tuple[str, ...] = ()
    """PyTorch: stages that compute all that the official code computes."""
    batched: bool = True
    """Whether several windows run at a time."""
    compiled: bool = False
    """PyTorch: every stage through ``torch.compile``."""
    graphs: Graphs = "fused"
    """ONNX Runtime: the unpruned structure, the bundle's portable graphs, or those for the engine."""
    own_session: bool = True
    """ONNX Runtime: odise_rt's session options; else the defaults of ONNX Runtime."""
    precision: Literal["fp32", "fp16"] = "fp32"


_LOOPED = ("unet_tap", "mask_decoder", "clip_mask")

VARIANTS: dict[str, Variant] = {
    "official": Variant("official structure, PyTorch eager", "torch", official_stages=_LOOPED, batched=False),
    "step-pruning": Variant(
        "+ no dead compute (UNet and VAE decoder end at the last tap, one pooling)",
        "torch",
        official_stages=("clip_mask",),
        batched=False,
    ),
    "step-batching": Variant("+ windows in batches", "torch", official_stages=("clip_mask",)),
    "pruned": Variant("our pruned structure, PyTorch eager", "torch"),
    "compile": Variant("our pruned structure, torch.compile", "torch", compiled=True),
    "ort-official": Variant(
        "official structure, ONNX Runtime as it comes", "ort", batched=False, graphs="official", own_session=False
    ),
    "ort-portable": Variant(
        "pruned portable graphs, ONNX Runtime as it comes", "ort", graphs="portable", own_session=False
    ),
    "ort-settings": Variant("pruned portable graphs, odise_rt's session settings", "ort", graphs="portable"),
    "runtime": Variant("odise_rt (fused graphs, ONNX Runtime)", "ort"),
    "runtime-again": Variant("odise_rt once more: what differs from the row above is noise", "ort"),
    "runtime-fp16": Variant("odise_rt, mixed fp16 graphs", "ort", precision="fp16"),
}

PEERS = ("official", "pruned", "compile", "ort-official", "runtime")
"""What a user could run instead."""
WATERFALL: tuple[tuple[str, str], ...] = (
    ("official", "official structure"),
    ("step-pruning", "pruning"),
    ("step-batching", "batched windows"),
    ("pruned", "split CLIP"),
    ("ort-portable", "ONNX Runtime"),
    ("ort-settings", "session settings"),
    ("runtime", "fusion, Winograd"),
)
"""Each variant adds one step to the one before it: variant and name of the step."""


@dataclass(frozen=True)
class Job:
    """What a worker runs."""

    variant: str
    """A key of :data:`VARIANTS`."""
    source: dict[str, Any]
    """PyTorch: ``{"checkpoint": DIR}`` or ``{"config": NAME, "seed": N}``. ONNX Runtime: ``{"bundle": DIR}`` and, for
    the official structure, ``{"graphs": DIR}`` as well."""
    height: int
    width: int
    """Pixels of the image; it is not resized further."""
    words: str
    """Vocabulary; its embeddings are cached before the first measurement."""
    threads: int
    device: Literal["cpu", "cuda"] = "cpu"
    cache_dir: str | None = None
    """Folder of the runtime's text cache; ``None``: nothing is kept on disk."""


@contextlib.contextmanager
def open_segmenter(job: Job) -> Iterator[Segmenter]:
    """Load a variant for the time of a ``with`` block."""
    variant = VARIANTS[job.variant]
    if variant.family == "ort":
        with _open_ort(job, variant) as segmenter:
            yield segmenter
    else:
        with _open_torch(job, variant) as segmenter:
            yield segmenter


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_torch(job: Job, variant: Variant) -> Iterator[Segmenter]:
    import torch

    from odise_rt.backends.base import Device
    from odise_rt.bundle import Bundle
    from training.torch_stages import TorchBackend, TorchStage, torch_segmenter

    torch.set_num_threads(job.threads)
    loaded = load_model(job.source)
    model = loaded.model.to(job.device)
    if "unet_tap" not in variant.official_stages:
        model.drop_sd_text()
    if variant.compiled:
        logging.getLogger("torch").setLevel(logging.ERROR)
        for method in ("clip_image", "unet_tap", "decode_masks", "clip_mask"):
            setattr(model, method, torch.compile(getattr(model, method)))

    class MixedStage(TorchStage):
        """A stage in the structure that the variant wants for it."""

        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            self.model.structure = "official" if self.spec.name in variant.official_stages else "pruned"
            return super().run(inputs)

    class MixedBackend(TorchBackend):
        """PyTorch with one structure for each stage."""

        @property
        def device(self) -> Device:
            return job.device

        @property
        def description(self) -> str:
            how = "torch.compile" if variant.compiled else "eager"
            return f"torch {torch.__version__} {how}, {torch.get_num_threads()} threads"

        def windows_per_batch(self, side: int) -> int:
            return super().windows_per_batch(side) if variant.batched else 1

        def load(self, bundle: Bundle, stage: str) -> TorchStage:
            return MixedStage(self.model, self.specs[stage])

    backend = MixedBackend(model)
    with torch_segmenter(model, loaded.tokenizer_json, loaded.training_vocabulary, backend) as segmenter:
        yield segmenter


def load_model(source: Mapping[str, Any]) -> Any:
    """The PyTorch model of a job's source, as a :class:`training.checkpoints.LoadedCheckpoint`."""
    from training.checkpoints import load_checkpoint
    from training.initialization import random_checkpoint

    if "checkpoint" in source:
        return load_checkpoint(Path(source["checkpoint"]))
    return random_checkpoint(source["config"], source["seed"])


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_ort(job: Job, variant: Variant) -> Iterator[Segmenter]:
    from odise_rt.segmenter import Segmenter

    if variant.graphs == "fused" and variant.own_session:
        # The product as it is: nothing of the benchmark is in the way.
        with Segmenter.load(
            job.source["bundle"],
            device=job.device,
            threads=job.threads,
            cache_dir=job.cache_dir,
            disk_cache=job.cache_dir is not None,
        ) as segmenter:
            yield segmenter
        return
    from odise_rt.backends.pool import StagePool
    from odise_rt.bundle import Bundle
    from odise_rt.specs import STAGES
    from odise_rt.text_embeddings import TextEmbedder

    bundle = Bundle.open(job.source["bundle"])
    stages = StagePool(_plain_backend(job, variant), bundle, keep=frozenset(STAGES))
    with Segmenter(bundle, stages._backend, stages, TextEmbedder(bundle, stages, cache=None)) as segmenter:
        stages.load(STAGES)
        yield segmenter


def _plain_backend(job: Job, variant: Variant) -> Any:
    """ONNX Runtime on graphs that the runtime would not choose, or with the settings that it would not."""
    from odise_rt.backends.base import StageFacts
    from odise_rt.backends.ort import PROVIDERS, OrtBackend, OrtStage, import_onnxruntime
    from odise_rt.bundle import Bundle

    ort = import_onnxruntime()

    class PlainBackend(OrtBackend):
        def windows_per_batch(self, side: int) -> int:
            return super().windows_per_batch(side) if variant.batched else 1

        @property
        def description(self) -> str:
            threads = f"{self.threads} threads" if variant.own_session else "default settings"
            return f"onnxruntime {ort.__version__} on {PROVIDERS[self.device]}, {threads}"

        def load(self, bundle: Bundle, stage: str) -> Stage:
            path = bundle.stage_file(stage).path
            if variant.graphs == "official" and stage != "clip_text":
                path = Path(job.source["graphs"]) / f"{stage}.onnx"
            if variant.own_session:
                options = self._session_options()
            else:
                options = ort.SessionOptions()
                options.log_severity_level = 3
            started = time.perf_counter()
            session = ort.InferenceSession(str(path), options, providers=[PROVIDERS[self.device]])
            wanted = {t.name for t in bundle.stages[stage].spec.outputs}
            facts = StageFacts(
                stage,
                f"onnxruntime {ort.__version__}",
                session.get_providers()[0],
                self.device,
                path.name,
                time.perf_counter() - started,
            )
            return OrtStage(_Narrowed(session, wanted), bundle.stages[stage].spec, facts)

    return PlainBackend(job.device, job.threads)


class _Narrowed:
    """A session that hides the outputs which only keep dead parts of a graph alive; they are computed all the same."""

    def __init__(self, session: Any, wanted: set[str]) -> None:
        self._session, self._wanted = session, wanted

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> list[Any]:
        return [value for value in self._session.get_outputs() if value.name in self._wanted]

    def run(self, outputs: Any, inputs: Any, options: Any) -> Any:
        return self._session.run(outputs, inputs, options)
