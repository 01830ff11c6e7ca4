"""The implementations that are compared, as data, and how a worker process opens each of them.

Importing this loads neither PyTorch nor an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from odise_rt.backends.base import Stage, StageFacts
    from odise_rt.backends.select import CpuEngine
    from odise_rt.bundle import Bundle
    from odise_rt.segmenter import Segmenter

Graphs = Literal["official", "portable", "fused"]

_LOOPED = ("unet_tap", "mask_decoder", "clip_mask")
"""Stages in which the official structure computes more than is needed."""


@dataclass(frozen=True)
class Variant:
    """One implementation of the whole way from pixels to segments."""

    label: str
    """What it is, for readers who do not know the code."""
    family: Literal["torch", "ort"]
    """PyTorch, or a bundle: in ONNX Runtime unless :attr:`cpu_engine` says otherwise."""
    official_stages: tuple[str, ...] = ()
    """PyTorch: stages that compute all that the official code computes."""
    batched: bool = True
    """Whether several windows run at a time."""
    compiled: bool = False
    """PyTorch: every stage through ``torch.compile``."""
    graphs: Graphs = "fused"
    """ONNX Runtime: the unpruned structure, the bundle's portable graphs, or those for the engine."""
    own_session: bool = True
    """ONNX Runtime: odise_rt's session options; else the defaults of ONNX Runtime, but for the number of threads."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """fp16: of the bundle. bf16: of products, but for the mask decoder; PyTorch under autocast, or OpenVINO."""
    cpu_engine: CpuEngine = "onnxruntime"
    """odise_rt: what runs its graphs on a CPU."""

    @property
    def bundle_precision(self) -> str:
        """Precision of the bundle that it runs."""
        return "fp16" if self.precision == "fp16" else "fp32"

    @property
    def official_work(self) -> tuple[str, ...]:
        """Stages that do the official amount of work."""
        return _LOOPED if self.graphs == "official" else self.official_stages


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
    "compile-bf16": Variant(
        "our pruned structure, torch.compile, bfloat16 autocast", "torch", compiled=True, precision="bf16"
    ),
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
    "runtime-openvino": Variant("odise_rt, OpenVINO", "ort", graphs="portable", cpu_engine="openvino"),
    "runtime-openvino-bf16": Variant(
        "odise_rt, OpenVINO, bfloat16 networks", "ort", graphs="portable", precision="bf16", cpu_engine="openvino-bf16"
    ),
}

PEERS = (
    *("official", "pruned", "compile", "compile-bf16", "ort-official"),
    *("runtime", "runtime-openvino", "runtime-openvino-bf16"),
)
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
HALF = ("runtime-fp16", "fp16 graphs instead of fp32")
"""A step after the last, which costs accuracy."""


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
    from odise_rt.backends.openvino import KEPT_IN_FP32
    from odise_rt.specs import IMAGE_STAGES
    from training.torch_pipeline import TorchPipeline
    from training.torch_stages import TorchBackend, TorchStage, torch_segmenter

    torch.set_num_threads(job.threads)
    # float32 is float32, as in the runtime's engines: PyTorch's default would round the inputs of convolutions.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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

        def on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
            self.model.structure = "official" if self.spec.name in variant.official_stages else "pruned"
            rounded = variant.precision == "bf16" and self.spec.name not in KEPT_IN_FP32
            with torch.autocast(job.device, torch.bfloat16, enabled=rounded):
                return super().on_device(inputs)

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
    pipeline = None
    if job.device == "cuda":  # as the runtime does there
        pipeline = TorchPipeline(model, {name: MixedStage(model, backend.specs[name]) for name in IMAGE_STAGES})
    with torch_segmenter(model, loaded.tokenizer_json, loaded.training_vocabulary, backend, pipeline) as segmenter:
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
    from odise_rt.backends.pool import StagePool
    from odise_rt.bundle import Bundle
    from odise_rt.segmenter import Segmenter
    from odise_rt.specs import STAGES
    from odise_rt.text_embeddings import TextEmbedder

    if variant.own_session:
        source: str | Bundle = job.source["bundle"]
        if variant.graphs == "portable":
            bundle = Bundle.open(job.source["bundle"])
            without = {name: dataclasses.replace(entry, variants={}) for name, entry in bundle.stages.items()}
            source = dataclasses.replace(bundle, stages=without)
        # The product as it is: nothing of the benchmark is in the way.
        with Segmenter.load(
            source,
            device=job.device,
            threads=job.threads,
            cpu_engine=variant.cpu_engine,
            cache_dir=job.cache_dir,
            disk_cache=job.cache_dir is not None,
        ) as segmenter:
            yield segmenter
        return
    bundle = Bundle.open(job.source["bundle"])
    backend = DefaultOrtBackend(job, variant)
    stages = StagePool(backend, bundle, keep=frozenset(STAGES))
    with Segmenter(bundle, backend, stages, TextEmbedder(bundle, stages, cache=None)) as segmenter:
        stages.load(STAGES)
        yield segmenter


class DefaultOrtBackend:
    """ONNX Runtime with the settings that it comes with, on the portable or the unpruned graphs.

    Only the number of threads is the job's, as it is for every implementation: else all cores would run.
    """

    def __init__(self, job: Job, variant: Variant) -> None:
        from odise_rt.backends.ort import PROVIDERS, import_onnxruntime

        self._ort = import_onnxruntime(job.device)
        self._variant = variant
        self._threads = job.threads
        self._official = Path(job.source["graphs"]) if variant.graphs == "official" else None
        self.device = job.device
        self._provider = PROVIDERS[job.device]

    @property
    def description(self) -> str:
        """Engine and settings in one line."""
        return f"onnxruntime {self._ort.__version__} on {self._provider}, {self._threads} threads, default settings"

    def windows_per_batch(self, side: int) -> int:
        """As many as odise_rt runs at a time, or one."""
        from odise_rt.backends.base import windows_that_fill

        return windows_that_fill(self.device, side) if self._variant.batched else 1

    def keeps_loaded(self, _bundle: Bundle, _stage: str) -> bool:
        """Always: nobody asked to spare memory."""
        return True

    def load(self, bundle: Bundle, stage: str) -> Stage:
        """A session of one graph.

        Raises:
            RuntimeError: ONNX Runtime chose another provider than asked for.
        """
        from odise_rt.backends.base import StageFacts

        path = bundle.stage_file(stage).path
        if self._official is not None and stage != "clip_text":
            path = self._official / f"{stage}.onnx"
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        started = time.perf_counter()
        session = self._ort.InferenceSession(str(path), options, providers=[self._provider])
        provider = session.get_providers()[0]
        if provider != self._provider:
            raise RuntimeError(f"ONNX Runtime fell back to {provider}")
        engine, seconds = f"onnxruntime {self._ort.__version__}", time.perf_counter() - started
        facts = StageFacts(stage, engine, provider, self.device, path.name, seconds)
        return _PlainStage(session, [tensor.name for tensor in bundle.stages[stage].spec.outputs], facts)


class _PlainStage:
    """A session. Outputs that only keep dead parts of a graph alive are computed and not fetched."""

    def __init__(self, session: Any, outputs: list[str], facts: StageFacts) -> None:
        self._session, self._outputs, self.facts = session, outputs, facts

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays in, arrays out."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def close(self) -> None:
        """Release the session."""
        self._session = None
